"""The whole road: gRPC client → gateway → Serve handle → leader → two tensor-parallel ranks, and back."""

import asyncio
import json
import random
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest
import torch
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from serving.client.client import Client, chat_prompt
from serving.driver.app import RunningApp
from serving.text.tokenizer import load_tokenizer
from tests.support.converted import reference_model
from tests.support.stack import (
    MODEL,
    group_handle,
    group_stats,
    ray_processes,
    running_stack,
    stack_config,
    story,
    wait_until,
)
from tests.support.waiting import PATIENCE_S

QUESTION = chat_prompt([("user", "What is the capital of France?")])


@pytest.fixture(scope="module")
def app() -> Iterator[RunningApp]:
    with running_stack(stack_config()) as app:
        yield app


@pytest.fixture
def client(app: RunningApp) -> Iterator[Client]:
    with Client(app.address) as client:
        yield client


def _assert_idle() -> None:
    """Nothing runs, every KV block has come back, and the books agree."""
    wait_until(
        lambda: group_stats()["num_running"] == group_stats()["num_waiting"] == 0, PATIENCE_S, "all requests have ended"
    )
    assert group_stats()["kv_usage"] == 0
    group_handle().check_integrity.remote().result(timeout_s=PATIENCE_S)  # type: ignore[attr-defined]


def test_a_sensible_answer_is_streamed(client: Client) -> None:
    request = pb.GenerateRequest(model=MODEL, prompt=QUESTION, sampling=pb.Sampling(temperature=0, max_tokens=64))
    chunks, times = client.stream(request, timeout_s=60)
    received = list(chunks)
    assert "Paris" in "".join(chunk.text for chunk in received)
    assert len(received) > 3, "it must come in pieces"
    last = received[-1]
    assert last.finish_reason == pb.FINISH_REASON_STOP
    assert last.usage.prompt_tokens == 37
    assert last.usage.completion_tokens == times.num_tokens
    for stage in ("gateway_s", "queue_s", "prefill_s", "decode_s", "total_s"):
        assert getattr(last.timings, stage) >= 0, stage
    assert last.timings.prefill_s + last.timings.decode_s <= last.timings.total_s
    assert client.stub.Generate(request).choices[0].text == "".join(chunk.text for chunk in received)
    _assert_idle()


def test_nobody_but_this_machine_reaches_a_private_cluster(app: RunningApp) -> None:
    listening = {
        (" ".join(process.cmdline())[:80], ip_address(connection.laddr.ip.removeprefix("::ffff:")))
        for process in ray_processes()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert len({name for name, _ in listening}) >= 4, "the control store, the raylet, the gateway and the group"
    assert [(name, address) for name, address in listening if not address.is_loopback] == []


def test_a_client_with_only_reflection_can_generate(app: RunningApp) -> None:
    with grpc.insecure_channel(app.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"packtrain.v1.Inference", "grpc.health.v1.Health"} <= set(database.get_services())
        service = DescriptorPool(database).FindServiceByName("packtrain.v1.Inference")

        def call(method: str, body: dict[str, object]) -> object:
            described = service.methods_by_name[method]
            request = json_format.ParseDict(body, GetMessageClass(described.input_type)())
            path, answer = f"/{service.full_name}/{method}", GetMessageClass(described.output_type)
            kind = channel.unary_stream if described.server_streaming else channel.unary_unary
            return kind(path, type(request).SerializeToString, answer.FromString)(request, timeout=60)

        body: dict[str, object] = {
            "model": MODEL,
            "prompt": {"text": "The sky is"},
            "sampling": {"maxTokens": 5, "temperature": 0},
        }
        whole = call("Generate", body).choices[0].text  # type: ignore[attr-defined]
        streamed = "".join(chunk.text for chunk in call("GenerateStream", body))  # type: ignore[attr-defined]
        assert whole == streamed != ""


def test_health_is_serving(app: RunningApp) -> None:
    with grpc.insecure_channel(app.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "packtrain.v1.Inference"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_models_are_described(client: Client) -> None:
    (card,) = client.models()
    assert client.stub.GetModel(pb.GetModelRequest(model=MODEL)).model == card
    assert (card.num_parameters, card.tensor_parallel_size, card.chat_format) == (134_515_008, 2, "chatml")
    assert card.deterministic
    assert card.kernels == "reference" or card.kernels.startswith("cpu-")
    assert card.licence.name.lower() == "apache-2.0"
    assert "/" not in json_format.MessageToJson(card).replace("application/", ""), "no path of the server's"


def test_scores_are_the_models_own(client: Client, smollm2_path: Path) -> None:
    context, continuations = "The capital of France is", [" Paris", " a city in the south of Spain", " 7"]
    request = pb.ScoreRequest(model=MODEL, context=pb.Prompt(text=context))
    request.continuations.extend(pb.Continuation(text=text) for text in continuations)
    scores = client.stub.Score(request, timeout=60).scores
    model, tokenizer = reference_model(smollm2_path), load_tokenizer(smollm2_path)
    for text, score in zip(continuations, scores, strict=True):
        ids, start = tokenizer.encode(context + text), len(tokenizer.encode(context))
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(logprobs[p - 1, ids[p]].item() for p in range(start, len(ids)))
        assert score.logprob == pytest.approx(expected, abs=1e-3)
        assert score.num_tokens == len(ids) - start
    _assert_idle()


async def test_64_streams_with_cancels_deadlines_and_disconnects(app: RunningApp) -> None:
    draw = random.Random(7)
    outcomes: list[str] = []

    async def one(index: int, channel: grpc.aio.Channel) -> None:
        kind = ("finish", "cancel", "deadline", "disconnect")[index % 4]
        own = grpc.aio.insecure_channel(app.address) if kind == "disconnect" else channel
        timeout_s = draw.uniform(0.05, 3.0) if kind == "deadline" else 100
        call = InferenceStub(own).GenerateStream(story(8 + index % 24, seed=index), timeout=timeout_s)
        num_last = 0
        try:
            stop_after = draw.randrange(0, 6)
            async for number, chunk in _enumerated(call):
                num_last += chunk.HasField("usage")
                if kind == "cancel" and number >= stop_after:
                    call.cancel()
                if kind == "disconnect" and number >= stop_after:
                    await own.close()
            outcomes.append(kind if kind == "finish" else f"{kind}: finished first")
            assert num_last == 1, "exactly one terminal message"
        except asyncio.CancelledError:
            assert kind in ("cancel", "disconnect")
            outcomes.append(kind)
        except grpc.aio.AioRpcError as error:
            assert (kind, error.code()) in (
                ("deadline", grpc.StatusCode.DEADLINE_EXCEEDED),
                ("deadline", grpc.StatusCode.RESOURCE_EXHAUSTED),
                ("cancel", grpc.StatusCode.CANCELLED),
                ("disconnect", grpc.StatusCode.CANCELLED),
            ), error
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                # A group that has learned how slow it is refuses at once what cannot be in time, and says when to come again.
                assert "its deadline is in" in (error.details() or "")
                assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
            outcomes.append(kind)
        finally:
            if own is not channel:
                await own.close()

    async with grpc.aio.insecure_channel(app.address) as channel:
        await asyncio.wait_for(asyncio.gather(*(one(i, channel) for i in range(64))), 4 * PATIENCE_S)
    assert len(outcomes) == 64
    assert outcomes.count("finish") == 16
    await asyncio.to_thread(_assert_idle)


async def _enumerated(call: "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateStreamResponse]"):  # type: ignore[no-untyped-def]
    number = 0
    async for chunk in call:
        yield number, chunk
        number += 1


async def test_an_answer_is_the_same_in_company_and_bad_requests_disturb_nobody(app: RunningApp) -> None:
    async with grpc.aio.insecure_channel(app.address) as channel:
        stub = InferenceStub(channel)
        request = story(24, temperature=0.8, top_p=0.9, seed=42)

        async def ask() -> str:
            return "".join([chunk.text async for chunk in stub.GenerateStream(request, timeout=100)])

        async def nonsense(sampling: pb.Sampling, prompt: str) -> grpc.StatusCode:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(pb.GenerateRequest(model=MODEL, prompt=pb.Prompt(text=prompt), sampling=sampling))
            return caught.value.code()

        alone = await ask()
        bad = [
            (pb.Sampling(temperature=-1.0), "x"),
            (pb.Sampling(), ""),
            (pb.Sampling(n=10_000), "x"),
            (pb.Sampling(), "x " * 9000),
        ]
        answers, others, codes = await asyncio.gather(
            asyncio.gather(*(ask() for _ in range(3))),
            asyncio.gather(*(stub.Generate(story(16, seed=s), timeout=100) for s in range(12))),
            asyncio.gather(*(nonsense(*arguments) for arguments in bad)),
        )
        assert set(answers) == {alone}
        assert len({answer.choices[0].text for answer in others}) > 6
        assert set(codes) == {grpc.StatusCode.INVALID_ARGUMENT}


def test_choices_stop_strings_and_logprobs(client: Client) -> None:
    sampling = pb.Sampling(n=3, seed=5, max_tokens=12, temperature=1.0, logprobs=2, ignore_eos=True)
    answer = client.stub.Generate(pb.GenerateRequest(model=MODEL, prompt=QUESTION, sampling=sampling), timeout=60)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3
    assert all(len(choice.logprobs) == len(choice.token_ids) == 12 for choice in answer.choices)
    assert answer.usage.completion_tokens == 36
    stopped = pb.Sampling(temperature=0, max_tokens=32, stop=["Paris"])
    answer = client.stub.Generate(pb.GenerateRequest(model=MODEL, prompt=QUESTION, sampling=stopped), timeout=60)
    assert answer.choices[0].text == "The capital of France is "
    assert answer.choices[0].finish_reason == pb.FINISH_REASON_STOP
    _assert_idle()


def test_tokenize_and_detokenize(client: Client) -> None:
    text = "A </s> <|im_end|> [INST] is just text: ünïcode 🚂"
    tokens = client.stub.Tokenize(pb.TokenizeRequest(model=MODEL, text=text))
    assert min(tokens.token_ids) > 16, "control tokens are the first 17"
    assert client.stub.Detokenize(pb.DetokenizeRequest(model=MODEL, token_ids=tokens.token_ids)).text == text
    assert json.loads(json_format.MessageToJson(tokens))["tokenIds"]
