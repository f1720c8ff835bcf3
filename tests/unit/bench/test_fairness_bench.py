"""The arithmetic of `bench.fairness`."""

import statistics

from bench.clients import Ended
from bench.fairness import MAX_PROMPT_TOKENS, MEDIAN_PROMPT_TOKENS, compare, prompt_lengths, summarise


def requests(ttfts_s: list[float], code: str = "OK") -> list[Ended]:
    return [Ended(1.0, 9.0, code, first_s=1.0 + ttft_s) for ttft_s in ttfts_s]


def test_lengths_are_log_normal_and_bounded() -> None:
    lengths = prompt_lengths()
    assert abs(statistics.median(lengths) - MEDIAN_PROMPT_TOKENS) <= 1
    assert 1 <= min(lengths) < max(lengths) <= MAX_PROMPT_TOKENS


def test_the_tails_are_compared() -> None:
    alone = summarise(requests([0.1] * 90 + [1.0] * 10))
    beside = summarise(requests([0.3] * 90 + [1.2] * 10))
    found = compare(alone, beside)
    assert {percent: round(ratio, 3) for percent, ratio in found["ratios"].items()} == {"50": 3.0, "90": 3.0, "99": 1.2}
    assert found["holds"]
    assert not compare(beside, summarise(requests([2.0] * 100)))["holds"]


def test_a_refusal_is_not_overlooked() -> None:
    """A request that was refused has no first token, so it would not count."""
    alone = summarise(requests([0.1] * 10))
    beside = summarise([*requests([0.1] * 10), Ended(1.0, 1.1, "RESOURCE_EXHAUSTED")])
    assert not compare(alone, beside)["holds"]
