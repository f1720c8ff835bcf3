"""Histories of gateways, groups and clients on a virtual clock: what is drawn from a seed may kill, stop and silence them at any
moment, and every client still gets what it would have got alone, once.

`python -m tests.chaos.test_histories SEED` shows one history again. With FIRST and NUMBER it times so many, in two processes.
"""

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import msgspec
import pytest

from model_parallel.engine.kv_blocks import KVBlocks
from model_parallel.engine.request import EngineOutput, EngineRequest
from serving.gateway.core import generation, resumption
from serving.gateway.core.metering import Meter
from serving.gateway.core.resume_tokens import AskedStream, ResumeTokens, Stream
from serving.gateway.core.resumption import Resumption
from serving.gateway.groups.loads import GroupLoads
from tests.support.effort import by_day
from tests.support.simulated_world import World, simulate

NUM_CHUNKS = 2
NUM_SEEDS = by_day(400, by_night=20_000)
MAX_SEEDS = 400
"""Within so many a bug that is put in is found."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("chunk", range(NUM_CHUNKS))
def test_no_history_shows_a_fault(chunk: int) -> None:
    faults, outcomes = Counter[str](), Counter[str]()
    num_seeds = NUM_SEEDS // NUM_CHUNKS
    for seed in range(chunk * num_seeds, (chunk + 1) * num_seeds):
        found, world = simulate(seed)
        assert not found, f"seed {seed}: {found}"
        faults.update(world.faults)
        outcomes.update(client.outcome for client in world.clients)
    # What never happened was not tried.
    assert all(faults[kind] > num_seeds / 40 for kind in ("ranks", "leader", "stop ranks", "stop leader", "gateway")), (
        faults
    )
    assert outcomes["ok"] > num_seeds
    assert all(outcomes[kind] for kind in ("left", "DEADLINE", "OVERLOADED", "REQUEST_POISONED")), outcomes


@pytest.mark.parametrize("seed", [104_142])
def test_a_history_that_showed_a_fault_shows_none(seed: int) -> None:
    """A resumed stream of two choices ended when one had come further and the other had not yet come as far again."""
    found, _ = simulate(seed)
    assert not found


def test_a_seed_gives_the_same_history() -> None:
    def seen(world: World) -> list[Any]:
        return [(client.tokens, client.outcome, client.ended_s, client.records) for client in world.clients]

    def without_wall_clock(records: Any) -> Any:
        return [msgspec.structs.replace(record, started_unix_s=0.0) for record in records]

    for seed in range(20):
        once, again = (seen(simulate(seed)[1]) for _ in range(2))
        for one, other in zip(once, again, strict=True):
            assert one[:3] == other[:3]
            assert without_wall_clock(one[3]) == without_wall_clock(other[3])


rest_of, take, resume, release = Resumption._rest_of, Resumption.take, ResumeTokens.resume, KVBlocks.release


def _forgets_a_token(self: Resumption, request: EngineRequest, deadline_s: float | None) -> EngineRequest:
    rest = rest_of(self, request, deadline_s)
    return msgspec.structs.replace(rest, output_token_ids=rest.output_token_ids[:-1])


def _draws_with_another_seed(self: Resumption, request: EngineRequest, deadline_s: float | None) -> EngineRequest:
    rest = rest_of(self, request, deadline_s)
    seed = rest.sampling.seed + (self.num_offers > 1)
    return msgspec.structs.replace(rest, sampling=msgspec.structs.replace(rest.sampling, seed=seed))


def _takes_tokens_twice(self: Resumption, output: EngineOutput) -> EngineOutput:
    taken = take(self, output)
    return msgspec.structs.replace(taken, token_ids=taken.token_ids * 2) if self.num_losses else taken


def _resumes_with_another_seed(
    self: ResumeTokens, token: bytes, asked: AskedStream, delivered: tuple[int, ...]
) -> Stream:
    return replace(resume(self, token, asked, delivered), seed=1 << 20)


def _leaves_out_a_token_more(self: Stream, choice: int) -> int:
    return self.delivered[choice] + 1 if choice < len(self.delivered) else 0


def _leaves_out_nothing(self: Stream, choice: int) -> int:
    return 0


def _forgets_to_release(self: KVBlocks, table: Any) -> None:
    if len(table.block_ids) % 3:
        release(self, table)


def _nothing(*_: Any) -> None:
    pass


Bug = tuple[object, str, object]


@pytest.mark.parametrize(
    "bug",
    [
        (Resumption, "_rest_of", _forgets_a_token),
        (Resumption, "_rest_of", _draws_with_another_seed),
        (Resumption, "take", _takes_tokens_twice),
        (ResumeTokens, "resume", _resumes_with_another_seed),
        (Stream, "num_delivered", _leaves_out_a_token_more),
        (Stream, "num_delivered", _leaves_out_nothing),
        (KVBlocks, "release", _forgets_to_release),
        (GroupLoads, "end", _nothing),
        (GroupLoads, "prompt_ends", _nothing),
        (Meter, "_settle", _nothing),
        (resumption, "MAX_LOSSES", 0),
        (generation, "RECOVERY_TIMEOUT_S", 0.0),
    ],
    ids=lambda bug: f"{bug[1]} {getattr(bug[2], '__name__', bug[2])}",
)
def test_a_bug_that_is_put_in_is_found(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, value = bug
    monkeypatch.setattr(owner, name, value)
    assert any(_shows_a_fault(seed) for seed in range(MAX_SEEDS))


def _shows_a_fault(seed: int) -> bool:
    try:
        return bool(simulate(seed)[0])
    except (AssertionError, RuntimeError, KeyError):  # the scheduler's own checks find it first
        return True


def _show(seed: int, write: Callable[[str], Any] = sys.stdout.write) -> None:
    found, world = simulate(seed)
    write(f"faults: {dict(world.faults)}\n")
    for client in world.clients:
        write(
            f"{client.number}: {client.plan}\n   {client.outcome} after {client.ended_s - 1000:.2f} s: {client.tokens}\n"
        )
    write(f"found: {found or 'nothing'}\n")


def _faulty(seeds: range) -> list[str]:
    logging.disable(logging.CRITICAL)
    return [f"seed {seed}: {found}" for seed in seeds if (found := simulate(seed)[0])]


def _time(first: int, number: int, write: Callable[[str], Any] = sys.stdout.write) -> None:
    began_s, half = time.perf_counter(), number // 2
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(_faulty, (range(first, first + half), range(first + half, first + number))))
    write(f"{number} histories in {time.perf_counter() - began_s:.1f} s; found: {found[0] + found[1] or 'nothing'}\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) > 2:
        _time(int(sys.argv[1]), int(sys.argv[2]))
    else:
        _show(int(sys.argv[1]))
