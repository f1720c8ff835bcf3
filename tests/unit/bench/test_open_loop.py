"""What `packtrain bench load` sends and how it sums up."""

import math
import statistics
from itertools import pairwise

import pytest

from bench.open_loop import Answer, LoadPlan, summarise
from model_parallel.errors import ConfigError
from serving.cli.bench import parse_goodput


def plan(**changes: float) -> LoadPlan:
    fields = {
        "num_prompts": 2000, "input_len": 3, "output_len": 5, "request_rate": 4.0, "burstiness": 1.0, "seed": 1, "timeout_s": 1.0,
        "max_concurrency": None,
    } | changes  # fmt: skip
    return LoadPlan(model="m", vocab_size=100, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_between_requests_have_the_mean_and_spread_asked_for(burstiness: float) -> None:
    arrivals = list(plan(burstiness=burstiness).arrivals_s())
    gaps = [after - before for before, after in pairwise(arrivals)]
    # The gamma distribution's mean and coefficient of variation; 2,000 draws are within a few per cent.
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.15)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(burstiness**-0.5, rel=0.15)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert set(plan(request_rate=math.inf).arrivals_s()) == {0.0}


def test_requests_have_the_lengths_asked_for() -> None:
    requests = list(plan(num_prompts=2).requests())
    assert [len(request.prompt.token_ids.ids) for request in requests] == [3, 3]
    assert all(request.sampling.max_tokens == 5 and request.sampling.ignore_eos for request in requests)


def test_summary_has_the_names_and_values_of_vllm_bench_serve() -> None:
    answers = [
        Answer(num_input_tokens=10, arrivals=((0.1, 1), (0.2, 1), (0.4, 2)), ended_s=0.4),
        Answer(num_input_tokens=10, arrivals=((0.3, 1),), ended_s=0.3),
        Answer(num_input_tokens=10, status="RESOURCE_EXHAUSTED"),
    ]
    result = summarise(answers, 2.0, {"ttft": 200.0})
    expected = {
        "completed": 2, "failed": 1, "total_input_tokens": 20, "total_output_tokens": 5,
        "request_throughput": 1.0, "request_goodput": 0.5, "output_throughput": 2.5, "total_token_throughput": 12.5,
        "mean_ttft_ms": 200.0, "median_ttft_ms": 200.0, "mean_tpot_ms": 100.0, "mean_itl_ms": 150.0, "mean_e2el_ms": 350.0,
    }  # fmt: skip
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    assert result["rejects"] == {"RESOURCE_EXHAUSTED": 1}


def test_goodput_is_none_without_bounds_and_nothing_completed_gives_zeros() -> None:
    result = summarise([Answer(num_input_tokens=1, status="UNAVAILABLE")], 1.0, {})
    assert result["request_goodput"] is None
    assert result["p99_ttft_ms"] == result["output_throughput"] == 0.0


def test_goodput_bounds_are_read_or_refused() -> None:
    assert parse_goodput(["ttft:500", "tpot:50"]) == {"ttft": 500.0, "tpot": 50.0}
    for wrong in ("ttft", "ttft:soon", "speed:5"):
        with pytest.raises(ConfigError, match=wrong):
            parse_goodput([wrong])
