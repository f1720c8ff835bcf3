"""Several models and several replica groups behind one gateway."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil
import pytest

from protos import inference_pb2 as pb
from serving.client.client import Client, chat_prompt
from serving.config import parse_config
from serving.driver.app import RunningApp
from tests.support.small_llama import save_small_llama
from tests.support.stack import MODEL, group_handle, running_stack, story, wait_until
from tests.support.waiting import PATIENCE_S


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    tiny = save_small_llama(tmp_path_factory.mktemp("models") / "tiny", dim=70, num_heads=5)
    models = [
        {"name": MODEL, "source": MODEL, "num_groups": 2, "cpus_per_rank": 0.5, "kv_cache_tokens": 2048},
        {
            "name": "tiny/llama-2",
            "source": str(tiny),
            "tensor_parallel_size": 2,
            "cpus_per_rank": 0.5,
            "chat": {"format": "llama-2"},
        },
    ]
    data = {
        "models": models,
        "gateway": {"port": 0, "http_port": 0},
        "admin": {"metrics_port": 0},
        "ray": {"spare_processes": False},
    }
    with running_stack(parse_config(data, origin="test")) as app:
        yield app


def _ask(client: Client, model: str, text: str, **sampling: object) -> pb.GenerateResponse:
    request = pb.GenerateRequest(
        model=model,
        prompt=chat_prompt([("system", "Be brief."), ("user", text)]),
        sampling=pb.Sampling(max_tokens=8, ignore_eos=True, **sampling),  # type: ignore[arg-type]
    )
    response: pb.GenerateResponse = client.stub.Generate(request, timeout=60)
    return response


def test_both_models_answer_by_their_own_rules(app: RunningApp) -> None:
    with Client(app.address) as client:
        cards = {card.name: card for card in client.models()}
        assert {
            name: (card.tensor_parallel_size, card.num_groups, card.chat_format) for name, card in cards.items()
        } == {
            MODEL: (1, 2, "chatml"),
            "tiny/llama-2": (2, 1, "llama-2"),
        }
        for name in cards:
            assert len(_ask(client, name, "Hello there").choices[0].token_ids) == 8
        with pytest.raises(grpc.RpcError) as unknown:
            _ask(client, "llama-3", "Hello")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]


def test_groups_of_a_model_share_its_work_and_give_the_same_answers(app: RunningApp) -> None:
    leaders = group_handle().broadcast("pids").results(timeout_s=PATIENCE_S)
    assert len({pids[0] for pids in leaders}) == 2
    with Client(app.address) as client, ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda _: _ask(client, MODEL, "Tell me a story", seed=4), range(16)))
    assert len({tuple(answer.choices[0].token_ids) for answer in answers}) == 1
    totals = group_handle().broadcast("stats").results(timeout_s=PATIENCE_S)
    assert all(stats["num_prefix_query_tokens"] > 0 for stats in totals), "both groups took part"


def test_every_request_goes_to_the_group_with_the_fewest_open_sequences(app: RunningApp) -> None:
    """Long after Serve has done with them: each is counted until it ends."""
    with Client(app.address) as client:
        streams = []
        for num_choices in (4, 1, 1, 1, 1, 1, 1):
            streams.append(client.stub.GenerateStream(story(900, n=num_choices), timeout=100))
            next(streams[-1])
        assert _num_open_by_group() == [5, 5]
        for stream in streams:
            stream.cancel()
        wait_until(lambda: sum(_num_open_by_group()) == 0, PATIENCE_S, "all are cancelled in their groups")


def _num_open_by_group() -> list[float]:
    totals = group_handle().broadcast("stats").results(timeout_s=PATIENCE_S)
    return [sum(stats[f"num_{state}"] for state in ("running", "waiting", "paused")) for stats in totals]


def test_while_one_group_is_lost_another_serves(app: RunningApp) -> None:
    """The lost group's stream goes on in the other, and nothing that comes after the loss fails."""
    with Client(app.address) as client, ThreadPoolExecutor(2) as threads:
        streams = [client.stub.GenerateStream(story(900), timeout=300) for _ in range(2)]
        assert all(next(stream) for stream in streams)
        ends = [threads.submit(_end_of, stream) for stream in streams]
        leader, rank = group_handle().broadcast("pids").results(timeout_s=PATIENCE_S)[0]
        os.kill(rank, signal.SIGKILL)
        for _ in range(20):
            assert len(_ask(client, MODEL, "Hello").choices[0].token_ids) == 8
        assert [end.result(timeout=300) for end in ends] == [grpc.StatusCode.OK] * 2
        wait_until(lambda: not psutil.pid_exists(leader), PATIENCE_S, "the lost group is gone")


def _end_of(stream: grpc.Call) -> grpc.StatusCode:
    try:
        for _ in stream:
            pass
    except grpc.RpcError:
        return stream.code()
    return grpc.StatusCode.OK
