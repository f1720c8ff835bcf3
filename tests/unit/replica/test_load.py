"""What a leader tells the autoscaler: of now, of its last steps, and of its last answers."""

from dataclasses import replace

import pytest

from model_parallel.config import CacheConfig, SchedulerConfig
from model_parallel.engine.answer_lengths import ENOUGH_ENDED, AnswerLengths
from model_parallel.engine.stats import SchedulerStats
from model_parallel.engine.step_times import StepSample, StepWork
from serving.replica.load import MAX_STEPS, LoadMeter

IDLE = SchedulerStats(
    num_running=0,
    num_waiting=0,
    num_waiting_tokens=0,
    num_paused=0,
    num_grammars=0,
    num_compiled_grammars=0,
    kv_usage=0.0,
    estimated_wait_s=0.0,
)


def meter() -> LoadMeter:
    return LoadMeter(SchedulerConfig(max_num_seqs=8), CacheConfig(num_blocks=100, block_size=16), clock=lambda: 7.0)


def sample(num_decodes: int, num_prompt: int, seconds: float) -> StepSample:
    return StepSample(StepWork(num_decodes + num_prompt, num_decodes, 0, 0.0), seconds)


def test_a_group_that_has_done_nothing_tells_no_more_than_that() -> None:
    load = meter().load(IDLE, AnswerLengths(), [])
    assert (load.line, load.mean_output_tokens, load.cached_share) == (None, None, 0.0)
    assert (load.measured_s, load.max_num_seqs, load.kv_cache_tokens) == (7.0, 8, 1600)


def test_the_last_steps_make_the_line() -> None:
    old = [sample(1, 0, 5.0)] * MAX_STEPS
    new = [sample(n % 8 + 1, n % 3 * 64, 0.01 + 0.001 * (n % 8 + 1) + 0.0002 * (n % 3 * 64)) for n in range(MAX_STEPS)]
    line = meter().load(IDLE, AnswerLengths(), old + new).line
    assert line is not None
    assert (line.base_s, line.sequence_s, line.prompt_token_s) == pytest.approx((0.01, 0.001, 0.0002), rel=1e-6)


def test_the_mean_length_is_that_of_the_engine() -> None:
    lengths = AnswerLengths()
    lengths.begin(1, lambda: 0)
    lengths.end(1, 90, is_whole=True)
    load = meter().load(IDLE, lengths, [])
    assert (load.mean_output_tokens, load.num_ended_answers) == (90, 1)


def test_the_cached_share_is_of_the_prompts_of_the_last_answers() -> None:
    one, stats = meter(), IDLE
    for found in (0, 40):  # of 100 tokens that each prompt has
        for _ in range(5):
            stats = replace(
                stats,
                num_finished_stop=stats.num_finished_stop + ENOUGH_ENDED // 2,
                num_prefix_query_tokens=stats.num_prefix_query_tokens + 100 * ENOUGH_ENDED // 2,
                num_prefix_hit_tokens=stats.num_prefix_hit_tokens + found * ENOUGH_ENDED // 2,
            )
            share = one.load(stats, AnswerLengths(), []).cached_share
    assert share == 0.4
    assert one.load(stats, AnswerLengths(), []).cached_share == 0.4, "also when none has ended since"


def test_the_cached_share_is_of_the_prompts_that_were_looked_up() -> None:
    stats = replace(IDLE, num_prefix_query_tokens=400, num_prefix_hit_tokens=100)
    assert meter().load(stats, AnswerLengths(), []).cached_share == 0.25
