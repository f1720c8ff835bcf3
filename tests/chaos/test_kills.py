"""Groups are killed at random, again and again, while 16 streams run; clients see what they would have seen without it.

The gateway, its continuation of requests and the groups' schedulers are the real ones; ranks are fake, so that there is time for
many kills, and for bugs that are put in on purpose: each must be found.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import msgspec
import pytest

from bench.chaos.history import History, Reference, check_faults, violations
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from protos import inference_pb2 as pb
from serving.gateway.core import generation
from serving.gateway.core.metering import Meter
from serving.gateway.core.resumption import MAX_LOSSES, Resumption
from tests.support.effort import rest_by_night
from tests.support.fake_groups import FakeGroup, FakeGroups, solo_answer
from tests.unit.gateway.conftest import Serve, serve

__all__ = ["serve"]

NUM_STREAMS = 16
NUM_GROUPS = 2
NUM_TOKENS = 60
NUM_ROUNDS = 10
MAX_SEEDS = 5
"""Within so many a bug that is put in is met by a kill and found."""
KILLS_A_ROUND = MAX_LOSSES
"""As many as a request may meet before it is taken to be their cause."""


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "MIN_RECOVERY_PAUSE_S", 0.0)


def _query(number: int) -> tuple[pb.GenerateRequest, Reference]:
    """Every fourth request has two choices; seeds differ."""
    prompt, num_choices = [1 + number, 2, 3], 2 if number % 4 == 0 else 1
    request = pb.GenerateRequest(
        model="tiny",
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=prompt)),
        sampling=pb.Sampling(max_tokens=NUM_TOKENS, n=num_choices, seed=number, ignore_eos=True),
    )
    answer = solo_answer(prompt, number, NUM_TOKENS)
    return request, Reference(choices=(answer,) * num_choices, num_prompt_tokens=len(prompt))


async def _read(stub: Any, request: pb.GenerateRequest) -> History:
    history = History()
    call = stub.GenerateStream(request, timeout=60)
    try:
        async for message in call:
            history.record(message)
    except grpc.aio.AioRpcError:
        pass
    history.status = await call.code()
    return history


async def _kill_some(backend: FakeGroups, draw: random.Random) -> Counter[str]:
    """How many groups were told to die. Each of them is at work when it is."""
    planned: Counter[str] = Counter()
    for _ in range(KILLS_A_ROUND):
        at_work: list[FakeGroup] = []
        while not at_work:
            await asyncio.sleep(0)
            at_work = [g for g in backend.living if g is not None and not g.is_lost and g.harness.engine.has_work]
        victim = draw.choice(at_work)
        await victim.steps(draw.randrange(12))
        victim.kill()
        planned[victim.name] += 1
        await victim.steps(1)
    return planned


async def _run(serve: Serve, seed: int, num_rounds: int) -> list[str]:
    """What was wrong."""
    draw, found = random.Random(seed), list[str]()
    queries, references = zip(*map(_query, range(NUM_STREAMS)), strict=True)
    for _ in range(num_rounds):
        backend = FakeGroups(NUM_GROUPS)
        async with serve(backend) as gateway:
            reading = [asyncio.create_task(_read(gateway.stub, request)) for request in queries]
            planned = await _kill_some(backend, draw)
            histories: Sequence[History] = await asyncio.gather(*reading)
        observed = Counter(group.name for group in backend.incarnations if group.is_lost)
        found += violations(histories, references) + check_faults(planned, observed)
        await backend.close()
    return found


@pytest.mark.parametrize("seed", rest_by_night(range(50), by_day=range(5)))
async def test_no_token_is_lost_or_repeated(serve: Serve, seed: int) -> None:
    assert await _run(serve, seed, NUM_ROUNDS) == []


Rest = Callable[[Resumption, EngineRequest, float | None], EngineRequest]
Take = Callable[[Resumption, EngineOutput], EngineOutput]
rest_of: Rest = Resumption._rest_of
take: Take = Resumption.take


def _changed(**change: Callable[[EngineRequest], Any]) -> Rest:
    """Continuation with a change of the request."""

    def changed_rest(self: Resumption, request: EngineRequest, deadline_s: float | None) -> EngineRequest:
        rest = rest_of(self, request, deadline_s)
        if self.num_offers == 1:
            return rest
        return msgspec.structs.replace(rest, **{name: value(rest) for name, value in change.items()})

    return changed_rest


def _forgets_the_last_token() -> Rest:
    return _changed(output_token_ids=lambda rest: rest.output_token_ids[:-1])


def _counts_a_token_twice() -> Rest:
    return _changed(output_token_ids=lambda rest: (*rest.output_token_ids, *rest.output_token_ids[-1:]))


def _starts_from_the_beginning() -> Rest:
    return _changed(output_token_ids=lambda rest: ())


def _draws_with_another_seed() -> Rest:
    return _changed(sampling=lambda rest: msgspec.structs.replace(rest.sampling, seed=rest.sampling.seed + 1))


def _gives_the_whole_budget_again() -> Rest:
    return _changed(
        prompt_token_ids=lambda rest: rest.prompt_token_ids + rest.output_token_ids, output_token_ids=lambda rest: ()
    )


def _forgets_a_choice() -> Rest:
    return _changed(choice=lambda rest: 0)


def _ends_at_the_loss(self: Resumption, output: EngineOutput) -> EngineOutput:
    if output.error_kind == "unavailable":
        output = msgspec.structs.replace(output, finish_reason=FinishReason.LENGTH, error_kind="")
    return take(self, output)


def _tells_another_reason(self: Resumption, output: EngineOutput) -> EngineOutput:
    taken = take(self, output)
    if taken.finish_reason is FinishReason.LENGTH and self.num_losses:
        return msgspec.structs.replace(taken, finish_reason=FinishReason.STOP)
    return taken


def _drops_the_first_output(self: Resumption, output: EngineOutput) -> EngineOutput:
    taken = take(self, output)
    if self.num_losses and not getattr(self, "has_dropped", False):
        self.has_dropped = True  # type: ignore[attr-defined]
        return msgspec.structs.replace(taken, token_ids=())
    return taken


def _delivers_an_output_twice(self: Resumption, output: EngineOutput) -> EngineOutput:
    taken = take(self, output)
    if self.num_losses and not getattr(self, "has_repeated", False):
        self.has_repeated = True  # type: ignore[attr-defined]
        return msgspec.structs.replace(taken, token_ids=taken.token_ids * 2)
    return taken


summary_of = Meter._summary


def _charges_a_token_more(self: Meter) -> Any:
    self.num_completion_tokens += 1
    return summary_of(self)


@pytest.mark.parametrize(
    ("owner", "name", "bug", "symptom"),
    [
        (Resumption, "_rest_of", _forgets_the_last_token(), "repeats 1 tokens"),
        (Resumption, "_rest_of", _counts_a_token_twice(), "other tokens"),
        (Resumption, "_rest_of", _starts_from_the_beginning(), "tokens instead of"),
        (Resumption, "_rest_of", _draws_with_another_seed(), "other tokens"),
        (Resumption, "_rest_of", _gives_the_whole_budget_again(), "tokens instead of"),
        (Resumption, "_rest_of", _forgets_a_choice(), "choice 1 has"),
        (Resumption, "take", _ends_at_the_loss, "tokens instead of"),
        (Resumption, "take", _tells_another_reason, "ended with"),
        (Resumption, "take", _drops_the_first_output, "lacks"),
        (Resumption, "take", _delivers_an_output_twice, "from"),
        (Meter, "_summary", _charges_a_token_more, "usage is"),
        (generation, "RECOVERY_TIMEOUT_S", 0.0, "StatusCode.UNAVAILABLE"),
        (FakeGroup, "kill", lambda self: None, "were planned and 0 happened"),
    ],
    ids=[
        "forgets-the-last-token",
        "counts-a-token-twice",
        "starts-from-the-beginning",
        "draws-with-another-seed",
        "gives-the-whole-budget-again",
        "forgets-a-choice",
        "ends-at-the-loss",
        "tells-another-reason",
        "drops-the-first-output",
        "delivers-an-output-twice",
        "charges-a-token-more",
        "gives-up-at-once",
        "kills-nothing",
    ],
)
async def test_a_bug_that_is_put_in_is_found(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, bug: Any, symptom: str
) -> None:
    monkeypatch.setattr(owner, name, bug)
    found: list[str] = []
    for seed in range(1, MAX_SEEDS + 1):  # a kill must meet a request that the bug is about
        found += await _run(serve, seed, 2)
        if any(symptom in what for what in found):
            return
    pytest.fail(f"{symptom!r} is not among {found}")
