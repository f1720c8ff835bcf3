"""The arithmetic of `bench.overload` and its clients. What they measure is measured by hand and nightly."""

import math
import random

import pytest

from bench.clients import Ended, Shape, percentile, poisson_arrivals
from bench.overload import decisions, finished_rate, judge_memory, judge_refusals, recovery
from protos import inference_pb2 as pb

MB = 1_000_000


def ended(sent_s: float, took_s: float, code: str = "OK", retry_after_s: float | None = None) -> Ended:
    reason = "OVERLOADED" if retry_after_s is not None else ""
    return Ended(sent_s, sent_s + took_s, code, reason=reason, retry_after_s=retry_after_s, num_tokens=10)


def test_only_what_came_in_time_counts() -> None:
    requests = [ended(0, 1), ended(0, 3), ended(0, 5), ended(0, 3, "DEADLINE_EXCEEDED"), ended(0, 9.9)]
    assert finished_rate(requests, from_s=2, until_s=6) == (2 / 4, 20 / 4)


def test_recovery_is_when_the_first_normal_request_was_sent() -> None:
    probes = [ended(10.0, 0.1, "RESOURCE_EXHAUSTED", 1.0), ended(11.0, 2.0), ended(13.0, 0.4), ended(13.5, 0.4)]
    assert recovery(probes, stopped_s=10.0, normal_s=0.5) == 3.0
    assert recovery(probes, stopped_s=10.0, normal_s=0.3) == math.inf


def test_refusals_are_judged_by_themselves() -> None:
    requests = [ended(0, 3.0), *(ended(0, 0.001 * n, "RESOURCE_EXHAUSTED", 2.0) for n in range(1, 101))]
    found = judge_refusals(requests)
    assert (found["num_refused"], found["num_with_retry_info"], found["reasons"]) == (100, 100, {"OVERLOADED": 100})
    assert found["median_s"] == pytest.approx(0.050)
    assert found["p99_s"] == pytest.approx(0.099)


def test_memory_is_bounded_when_it_ceases_to_grow() -> None:
    def samples(grow: float) -> list[tuple[float, dict[str, int]]]:
        """Before from 0 to 10 s, overload from 10 to 40 s."""
        return [
            (
                at_s + 0.5,
                {"gateway": 100 * MB + (50 * MB + int(grow * at_s * MB) if at_s >= 10 else 0), "leader": 200 * MB},
            )
            for at_s in range(45)
        ]

    steady, growing = judge_memory(samples(0), 10, 40), judge_memory(samples(2), 10, 40)
    assert steady["held_bytes"] == 50 * MB
    assert steady["growth_bytes"] == 0
    assert steady["processes"]["gateway"] == {"before": 100 * MB, "peak": 150 * MB, "after": 150 * MB}
    assert growing["growth_bytes"] == 20 * MB


def test_a_run_without_a_refusal_was_no_overload() -> None:
    result = {
        "goodput": 0.95,
        "recovery_s": 1.0,
        "refusals": judge_refusals([ended(0, 1)]),
        "memory": {"held_bytes": 0, "growth_bytes": 0},
    }
    assert decisions(result) == {"goodput": True, "rejects": False, "reasons": True, "memory": True, "recovery": True}


def test_arrivals_come_at_the_rate() -> None:
    times = poisson_arrivals(50.0, 100.0, random.Random(1))
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 100
    # The number is Poisson: 5000, give or take 5 standard deviations.
    assert abs(len(times) - 5000) < 5 * 71


def test_requests_are_what_the_shape_says() -> None:
    body, num_tokens = Shape(prompt_tokens=(7,), new_tokens=(9,)).request(random.Random(1))
    request = pb.GenerateRequest.FromString(body)
    assert num_tokens == 9
    assert (len(request.prompt.token_ids.ids), request.sampling.max_tokens, request.sampling.ignore_eos) == (7, 9, True)


@pytest.mark.parametrize(("percent", "expected"), [(0, 1.0), (50, 2.0), (51, 3.0), (99, 4.0), (100, 4.0)])
def test_percentile_is_one_of_the_values(percent: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == expected
