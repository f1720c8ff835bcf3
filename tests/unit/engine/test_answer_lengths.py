"""How long answers are: an estimate that is right from a group's first minute on, whatever has ended by then."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.engine import answer_lengths
from model_parallel.engine.answer_lengths import ENOUGH_ENDED, AnswerLengths, mean_length
from model_parallel.engine.request import FinishReason
from tests.support.engine import Harness, make_request

LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=60)


@given(LENGTHS)
def test_the_mean_is_the_area_below_the_share_that_scipy_estimates(lengths: list[tuple[int, bool]]) -> None:
    whole = [length for length, is_whole in lengths if is_whole]
    cut = [length for length, is_whole in lengths if not is_whole]
    share = scipy.stats.ecdf(scipy.stats.CensoredData(uncensored=whole, right=cut)).sf
    longest = max(length for length, _ in lengths)
    edges = [0, *sorted({int(q) for q in share.quantiles if q < longest}), longest]
    area = math.fsum((right - left) * share.evaluate(left) for left, right in pairwise(edges))
    assert mean_length(lengths) == pytest.approx(area)


@given(st.lists(st.integers(1, 1000), min_size=1))
def test_of_whole_answers_it_is_the_mean(lengths: list[int]) -> None:
    assert mean_length([(length, True) for length in lengths]) == pytest.approx(np.mean(lengths))


def test_a_new_group_neither_takes_the_short_answers_for_all_nor_the_running_ones_for_ended() -> None:
    """Answers of 595 tokens on average, one token in 60 ms, 1.5 answers a second, seen after a minute: those that have ended have
    390, and all tokens by the number of ended answers are 800."""
    rng = np.random.default_rng(0)
    estimates, of_ended, by_ended = [], [], []
    for _ in range(200):
        begun_s = np.cumsum(rng.exponential(1 / 1.5, 200))
        begun_s = begun_s[begun_s < 60]
        whole = np.clip(rng.lognormal(math.log(500), 0.6, len(begun_s)), 8, 2500)
        tokens = np.minimum(whole, (60 - begun_s) / 0.06)
        has_ended = tokens >= whole
        estimates.append(mean_length(zip(tokens.tolist(), has_ended.tolist(), strict=True)))
        of_ended.append(whole[has_ended].mean())
        by_ended.append(tokens.sum() / has_ended.sum())
    assert np.mean(of_ended) < 0.7 * 595 and np.mean(by_ended) > 1.3 * 595
    assert np.mean(estimates) == pytest.approx(595, rel=0.12)


def test_nothing_is_known_before_an_answer_has_ended() -> None:
    lengths = AnswerLengths()
    assert lengths.mean() is None
    lengths.begin(1, lambda: 7)
    assert lengths.mean() is None
    lengths.begin(2, lambda: 9)
    lengths.end(2, 9, is_whole=False)
    assert (lengths.mean(), lengths.num_ended) == (None, 0)
    lengths.end(1, 8, is_whole=True)
    assert (lengths.mean(), lengths.num_ended) == (8.5, 1)


def test_the_last_answers_count_and_long_ones_among_them() -> None:
    lengths = AnswerLengths()
    for seq_id in range(300):
        lengths.begin(seq_id, lambda: 5)
        lengths.end(seq_id, 10, is_whole=True)
    for seq_id in range(300, 300 + ENOUGH_ENDED):
        lengths.begin(seq_id, lambda: 5)
    for seq_id in range(300, 300 + ENOUGH_ENDED):
        lengths.end(seq_id, 90, is_whole=True)
    assert (lengths.mean(), lengths.num_ended) == (90, ENOUGH_ENDED)


@given(st.lists(st.tuples(st.sampled_from(["begin", "whole", "cut"]), st.integers(0, 1 << 30)), max_size=400))
def test_what_is_kept_is_bounded_and_counted(events: list[tuple[str, int]]) -> None:
    lengths, going_on, next_id = AnswerLengths(), list[int](), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer_lengths, "ENOUGH_ENDED", 5)
        patch.setattr(answer_lengths, "MAX_ANSWERS", 20)
        for kind, number in events:
            if kind == "begin":
                next_id += 1
                going_on.append(next_id)
                lengths.begin(next_id, lambda: 3)
            elif going_on:
                lengths.end(going_on.pop(number % len(going_on)), 4, is_whole=kind == "whole")
            kept = lengths._answers
            assert lengths.num_ended == sum(answer.is_whole for answer in kept) <= 5
            assert len(kept) <= 20
            assert set(lengths._going_on) <= set(going_on) & {answer.seq_id for answer in kept}


def test_an_engine_measures_the_answers_that_began_in_it() -> None:
    harness = Harness()
    lengths = harness.engine.answer_lengths
    for number, max_tokens in enumerate((4, 8, 100)):
        harness.add(make_request(f"r{number}", [number], max_tokens=max_tokens))
    harness.add(make_request("r3", [3], max_tokens=100, output=[7] * 90))
    for _ in range(30):
        harness.step()
    assert (lengths.num_ended, harness.finish_reason("r3")) == (2, FinishReason.LENGTH)
    assert lengths.mean() == pytest.approx((4 + 8 + len(harness.tokens("r2"))) / 3)
    harness.engine.abort("r2")
    harness.step()
    assert lengths.num_ended == 3, "who cancels has what he wanted"
    assert not lengths._going_on


def test_an_answer_that_its_deadline_cut_is_longer() -> None:
    harness = Harness()
    harness.add(make_request("r0", [0], max_tokens=100, deadline_s=10.0))
    harness.add(make_request("r1", [1], max_tokens=4))
    for _ in range(10):
        harness.step()
    harness.clock.now_s += 11
    harness.run()
    assert harness.finish_reason("r0") is FinishReason.DEADLINE
    assert harness.engine.answer_lengths.num_ended == 1


def test_a_preempted_sequence_has_one_answer() -> None:
    harness = Harness(num_blocks=20)
    for number in range(8):
        harness.add(make_request(f"r{number}", [number] * 8, max_tokens=20))
    harness.run()
    assert harness.engine.stats.num_preemptions > 0
    assert (harness.engine.answer_lengths.num_ended, harness.engine.answer_lengths.mean()) == (8, 20)
