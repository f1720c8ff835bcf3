"""Load on a mock server, in this process."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from bench.loadtest.leader import Run
from bench.loadtest.records import Record
from bench.loadtest.replies import OK, Outcome, Stages
from bench.loadtest.runner import Resolved, Runner, Share
from bench.loadtest.scenario import Scenario, parse_scenario
from bench.loadtest.sender import transport_of
from bench.loadtest.work import Entry, Facts
from bench.mock_server import Behaviour, MockServer, serve_mock

FACTS = Facts(model="mock", vocab_size=32_000, tokens_per_word=1.0)


@asynccontextmanager
async def mock(**behaviour: Any) -> AsyncIterator[MockServer]:
    """`async with mock(first_token_s=0.01) as server:` with Behaviour's fields as keywords."""
    server = await serve_mock(Behaviour(**behaviour))
    try:
        yield server
    finally:
        await server.stop()


def scenario_of(server: MockServer, *tenants: dict[str, Any], **run: Any) -> Scenario:
    """Tenants over gRPC unless they say `http: True`."""
    placed = []
    for tenant in tenants:
        is_http = tenant.get("http", False)
        target = f"http://127.0.0.1:{server.http_port}" if is_http else f"grpc://127.0.0.1:{server.grpc_port}"
        placed.append({"target": target} | {key: value for key, value in tenant.items() if key != "http"})
    return parse_scenario({"duration_s": 0.3, "drain_s": 60, **run, "tenants": placed}, origin="the test")


async def run_here(
    scenario: Scenario, *, entries: list[Entry] | None = None, count: int = 1, stop_after_s: float | None = None
) -> Run:
    """All shares of a run, at the same time."""
    run, stop = Run(), asyncio.Event()
    resolved = [Resolved(facts=FACTS, entries=entries or []) for _ in scenario.tenants]
    runners = [
        Runner(scenario, resolved, [transport_of(each, "mock", None) for each in scenario.tenants], Share(index, count))
        for index in range(count)
    ]
    try:
        for runner in runners:
            await runner.open(60)
        if stop_after_s is not None:
            asyncio.get_running_loop().call_later(stop_after_s, stop.set)
        await asyncio.gather(*(runner.run(time.monotonic(), stop) for runner in runners))
    finally:
        for runner in runners:
            await runner.close()
    for index, runner in enumerate(runners):
        run.records += runner.records
        run.healths.append(runner.health(index))
    run.records.sort(key=lambda each: (each.intended_s, each.tenant, each.session, each.turn))
    return run


def outcomes(records: list[Record], tenant: int = 0) -> Counter[str]:
    return Counter(record.outcome.value for record in records if record.tenant == tenant)


def record(**changes: Any) -> Record:
    """A finished request of ten tokens: due at 1, its first token at 1.1, one more every 0.01 s."""
    fields = {
        "tenant": 0, "session": 0, "turn": 0, "intended_s": 1.0, "sent_s": 1.0, "ended_s": 1.2, "outcome": Outcome.FINISHED,
        "code": OK, "reason": "", "attempts": 1, "first_s": 1.1, "last_s": 1.19, "prompt_tokens": 20, "output_tokens": 10,
        "asked_tokens": 10, "gaps": b"", "stages": Stages(0.0, 0.01, 0.09, 0.09, 0.2),
        "seen_tokens": 10, "seen_chunks": 10,
    } | changes  # fmt: skip
    return Record(**fields)  # type: ignore[arg-type]


def records_at(times_s: list[float], took_s: float = 0.2, **changes: Any) -> list[Record]:
    """Like `record`, one due at each time; each whole answer takes `took_s`, half of it to the first token."""
    return [
        record(
            session=index, intended_s=at_s, sent_s=at_s, first_s=at_s + took_s / 2, last_s=at_s + took_s,
            ended_s=at_s + took_s, **changes,
        )
        for index, at_s in enumerate(times_s)
    ]  # fmt: skip
