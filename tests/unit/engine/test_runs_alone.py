"""Sequences that run alone, because they may be what ends groups."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.engine.request import EngineRequest
from model_parallel.errors import GroupFailedError
from tests.support.engine import Harness, make_request
from tests.support.fake_executor import solo_output


def alone(request: EngineRequest) -> EngineRequest:
    return msgspec.structs.replace(request, runs_alone=True)


def check_company(harness: Harness, suspects: set[str]) -> None:
    """No step has a row of a suspect and one of anybody else."""
    num_running = 0
    running = harness.scheduler._running.values()
    num_running = len(running)
    assert num_running <= 1 or suspects.isdisjoint(sequence.request.request_id for sequence in running)


@pytest.mark.parametrize("position", [0, 2, 4])
def test_it_waits_until_nothing_runs_and_then_nothing_else_begins(position: int) -> None:
    harness = Harness()
    requests = [make_request(f"r{number}", [number, 2, 3], max_tokens=5 + number) for number in range(5)]
    requests[position] = alone(requests[position])
    for request in requests:
        harness.add(request)
    while harness.engine.has_work:
        harness.step()
        check_company(harness, {f"r{position}"})
    for request in requests:
        assert harness.tokens(request.request_id) == solo_output(request)


@given(st.data())
def test_all_end_whoever_runs_alone(data: st.DataObject) -> None:
    """Several tenants, of several weights and priorities, and few blocks, so that sequences are preempted."""
    harness = Harness(num_blocks=12, max_num_seqs=4, max_in_flight=data.draw(st.integers(1, 2)))
    requests: list[EngineRequest] = []
    for number in range(data.draw(st.integers(1, 10))):
        request = make_request(
            f"r{number}",
            [number] * data.draw(st.integers(1, 12)),
            max_tokens=data.draw(st.integers(1, 12)),
            tenant=data.draw(st.sampled_from("abc")),
            weight=data.draw(st.sampled_from([0.5, 1.0, 4.0])),
            priority=data.draw(st.integers(0, 1)),
        )
        requests.append(alone(request) if data.draw(st.booleans()) else request)
    suspects = {request.request_id for request in requests if request.runs_alone}
    waiting = list(requests)
    while waiting or harness.engine.has_work:
        if waiting and (not harness.engine.has_work or data.draw(st.booleans())):
            harness.add(waiting.pop(0))
        harness.step()
        check_company(harness, suspects)
    for request in requests:
        assert harness.tokens(request.request_id) == solo_output(request)


def test_a_lost_group_says_who_only_waited() -> None:
    harness = Harness()
    harness.add(make_request("r1", [1, 2], max_tokens=9))
    harness.step()
    harness.add(alone(make_request("r2", [1, 2], max_tokens=9)))
    harness.step()

    def die() -> None:
        raise GroupFailedError("rank 1 died")

    harness.executor.during_step = die
    harness.step()
    assert (harness.last("r1").was_waiting, harness.last("r2").was_waiting) == (False, True)
