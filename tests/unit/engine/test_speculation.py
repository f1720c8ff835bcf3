"""Drafts: where they come from, when they are made, and what becomes of their rows and blocks on fake ranks."""

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from model_parallel.config import DraftConfig, SchedulerConfig
from model_parallel.engine.messages import StepPlan
from model_parallel.engine.request import FinishReason
from model_parallel.engine.sequence import Sequence as Run
from model_parallel.engine.speculation import (
    LONGEST_MATCH,
    MAX_DRAFTS,
    MAX_INDEXED_TOKENS,
    MAX_TOKENS_AT_A_TIME,
    SEQUENCES_PER_LOOK,
    SHORTEST_MATCH,
    PromptLookup,
    PromptLookupDrafter,
    RowCosts,
    settle_speculation,
)
from model_parallel.errors import ConfigError, GroupFailedError
from tests.support.drafts import ScriptedDrafter
from tests.support.engine import Harness, make_request
from tests.support.fake_executor import REPETITIVE, SOMETIMES, foretell, solo_output


def looked_up(token_ids: Sequence[int], num_drafts: int) -> tuple[int, ...]:
    """By comparing the end with every earlier place."""
    for length in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
        for end in range(len(token_ids) - 1, length - 1, -1):
            if tuple(token_ids[end - length : end]) == tuple(token_ids[-length:]):
                period = len(token_ids) - end
                return tuple(token_ids[end + i % period] for i in range(num_drafts))
    return ()


def test_lookup_finds_the_longest_match_and_of_equal_ones_the_latest() -> None:
    draw = random.Random(3)
    num_found = 0
    for _ in range(300):
        token_ids = [draw.randrange(6) for _ in range(draw.randint(1, 60))]
        lookup = PromptLookup()
        lookup.take(token_ids, len(token_ids))
        drafts = lookup.draft(token_ids, 6)
        if (
            lookup._matched <= LONGEST_MATCH
        ):  # a longer match goes on where it is, though a later place may match as well
            assert drafts == looked_up(token_ids, 6)
        assert bool(drafts) == bool(looked_up(token_ids, 6))
        num_found += bool(drafts)
    assert 100 < num_found < 290


@pytest.mark.parametrize("num_different", [3, 12, 40, 400])
def test_lookup_gives_the_same_however_tokens_come_to_it(num_different: int) -> None:
    """Tokens that end no match are taken in together, and most do where there are many different ones."""
    draw = random.Random(4)
    for _ in range(50):
        token_ids = [draw.randrange(num_different) for _ in range(60)]
        token_ids[50:56] = token_ids[30:36]
        whole, piecewise = PromptLookup(), PromptLookup()
        for end in range(1, 61):
            whole.take(token_ids[:end], 20)
        for end in [*sorted(draw.sample(range(1, 60), 9)), 60]:
            piecewise.take(token_ids[:end], 20)
        piecewise._index_longer(token_ids)
        assert whole._last_of == piecewise._last_of
        assert whole.draft(token_ids, 9) == piecewise.draft(token_ids, 9)
        assert (whole.heat, whole.chances(9)) == (pytest.approx(piecewise.heat), piecewise.chances(9))


def test_sequences_that_repeat_nothing_are_looked_up_some_tokens_at_a_time() -> None:
    drafter = PromptLookupDrafter()
    runs = [cast("Run", SimpleNamespace(seq_id=i, num_prompt_tokens=2, token_ids=[1, i])) for i in range(32)]
    for run in runs:
        drafter.observe(run)
    for new in range(100, 108):
        for run in runs:
            run.token_ids.append(new * 1000 + run.seq_id)
            drafter.observe(run)
    numbers = [drafter._lookups[run.seq_id].num_indexed for run in runs]
    assert numbers == [2 + 32 // SEQUENCES_PER_LOOK] * 32
    first = runs[0]
    for new in [*first.token_ids[:9] * 4]:  # begins to repeat itself
        first.token_ids.append(new)
        drafter.observe(first)
    assert drafter.has_prospects
    assert drafter.chances_of(first, 3) and drafter._lookups[0].num_indexed == len(first.token_ids)
    runs[1].token_ids.append(5)
    drafter.observe(runs[1])
    assert drafter.chances_of(runs[1], 3) == [], "not all of it is looked up"


def test_a_long_prompt_is_indexed_bit_by_bit_and_what_lies_far_back_is_forgotten() -> None:
    lookup, token_ids = PromptLookup(), list(range(MAX_INDEXED_TOKENS + 100))
    lookup.take(token_ids, len(token_ids))
    assert len(lookup._last_of) <= 3 * MAX_TOKENS_AT_A_TIME
    assert lookup.draft(token_ids, 4) == (), "not before all of it is known"
    for _ in range(MAX_INDEXED_TOKENS // MAX_TOKENS_AT_A_TIME + 1):
        lookup.take(token_ids, len(token_ids))
    assert len(lookup._last_of) <= (LONGEST_MATCH - SHORTEST_MATCH + 1) * MAX_INDEXED_TOKENS
    forgotten, known = [*token_ids, 7, 8, 9, 10], [*token_ids, 207, 208, 209, 210]
    lookup.take(known, len(token_ids))
    assert lookup.draft(known, 3) == (211, 212, 213)
    lookup.take(known + forgotten[-4:], len(token_ids))
    assert lookup.draft(known + forgotten[-4:], 3) == ()


def test_heat_and_chances_follow_what_was_foretold() -> None:
    lookup, token_ids = PromptLookup(), [*range(30), *range(6)]
    lookup.take(token_ids, 36)
    assert lookup.heat == 0, "a prompt that repeats itself says nothing about the answer"
    first = lookup.chances(3)
    for token_id in range(6, 26):
        token_ids.append(token_id)
        lookup.take(token_ids, 36)
    assert lookup.heat > 0.9
    assert first[0] > first[1] > first[2] and all(new > old for new, old in zip(lookup.chances(3), first, strict=True))
    for token_id in range(100, 130):
        token_ids.append(token_id)
        lookup.take(token_ids, 36)
    assert lookup.heat < 0.05 and lookup.chances(3) == []


def test_costs_of_rows_are_learned_from_times() -> None:
    costs = RowCosts()
    assert costs.step_s(8) == pytest.approx(24 * costs.row_s)
    draw = random.Random(5)
    for _ in range(300):
        num_rows = draw.randint(1, 20)
        costs.record(num_rows, (0.010 + 0.002 * num_rows) * draw.uniform(0.9, 1.1))
    assert costs.row_s == pytest.approx(0.002, rel=0.1)
    assert costs.step_s(10) == pytest.approx(0.030, rel=0.1)
    alike = RowCosts()
    for _ in range(300):
        alike.record(1, 0.01)
    assert 0 < alike.row_s < 0.001, "where all steps had the same rows, what was assumed counts"
    alike.record(1, 3600.0)
    assert alike.step_s(1) < 0.02, "a step that waited for something else says little"


class Watched:
    """A harness with lookup, and how many drafts each of its steps had."""

    def __init__(
        self,
        row_s: float,
        *,
        max_num_seqs: int = 16,
        max_in_flight: int = 2,
        speculation: str = "prompt_lookup",
        share: float = 0.0,
    ) -> None:
        """A step takes 16 ms and `row_s` for each row, a pass of the draft model, if there is one, `share` of that."""
        self.harness = Harness(
            num_blocks=512,
            max_model_len=512,
            speculation=speculation,
            max_num_seqs=max_num_seqs,
            max_in_flight=max_in_flight,
            draft=DraftConfig(checkpoint_path="", share=2 * share) if share else None,  # its sizes tell only about
        )
        self.num_requests = 0
        self.num_drafts: list[int] = []
        self.overlapped: list[bool] = []
        executor = self.harness.executor

        def during_step() -> None:
            rows = executor.plans[-1].rows
            self.num_drafts.append(sum(len(row.draft_token_ids) for row in rows))
            self.overlapped.append(bool(executor._submitted))
            requests = executor.plans[-1].draft_requests
            if rows:
                self.harness.clock.now_s += 0.016 + row_s * sum(row.num_tokens for row in rows)
            for draft in range(max((request.num_tokens for request in requests), default=0)):
                num_rows = sum(request.num_tokens > draft for request in requests)
                self.harness.clock.now_s += share * (0.016 + row_s * num_rows)
            self.num_requests += len(requests)

        executor.during_step = during_step


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_an_answer_that_repeats_itself_takes_fewer_steps(max_in_flight: int) -> None:
    watched = Watched(0.0005, max_in_flight=max_in_flight)
    request = make_request("r1", [3, 4, 5], max_tokens=100, seed=REPETITIVE + 1, logprobs=0)
    watched.harness.add(request)
    watched.harness.run()
    harness, stats = watched.harness, watched.harness.engine.stats
    assert harness.tokens("r1") == solo_output(request)
    assert [entry.token_id for output in harness.outputs["r1"] for entry in output.logprobs] == solo_output(request)
    assert len(watched.num_drafts) < 60
    assert max(watched.num_drafts) <= MAX_DRAFTS
    last = harness.last("r1")
    assert (last.num_accepted_tokens, last.num_rejected_tokens) == (
        stats.num_accepted_tokens,
        stats.num_draft_tokens - stats.num_accepted_tokens,
    )
    assert stats.num_generation_tokens == 100
    drafted = [number > 0 for number in watched.num_drafts]
    assert not any(a and b for a, b in zip(drafted, watched.overlapped, strict=True)), "no plan beside drafts"


def test_an_answer_that_does_not_repeat_itself_is_left_alone() -> None:
    watched = Watched(0.0005)
    request = make_request("r1", [3, 4, 5], max_tokens=100)
    watched.harness.add(request)
    watched.harness.run()
    assert watched.harness.tokens("r1") == solo_output(request)
    assert watched.harness.engine.stats.num_draft_tokens <= 3
    assert watched.overlapped[:-1].count(False) <= 2, "steps overlap as without speculation"


@pytest.mark.parametrize(
    ("row_s", "chance", "most"),
    [(0.0005, 1.0, 0.5), (0.0005, 0.97, 0.9), (1.0, 0.97, 1.05), (1.0, 0.5, 1.02)],
)
def test_drafts_take_no_more_time_than_they_bring(row_s: float, chance: float, most: float) -> None:
    seconds = {}
    for speculation in ("off", "prompt_lookup"):
        watched = Watched(row_s, speculation=speculation)
        for name in ("r1", "r2", "r3"):
            watched.harness.add(
                make_request(name, [3, 4, 5], max_tokens=300, seed=SOMETIMES * int(100 * chance) + int(name[1:]))
            )
        began_s = watched.harness.clock.now_s
        watched.harness.run()
        seconds[speculation] = watched.harness.clock.now_s - began_s
    assert seconds["prompt_lookup"] / seconds["off"] < most


@pytest.mark.parametrize(
    ("num_requests", "row_s", "share", "chance", "most"),
    [
        (1, 0.0005, 0.1, 1.0, 0.35),
        (4, 0.0005, 0.1, 0.8, 0.7),
        (1, 0.0005, 0.5, 0.5, 1.05),
        (1, 0.0005, 0.1, 0.0, 1.05),
        (4, 0.0005, 0.1, 0.0, 1.05),
        (4, 0.05, 0.3, 0.9, 1.05),
    ],
)
def test_a_draft_model_takes_no_more_time_than_it_brings(
    num_requests: int, row_s: float, share: float, chance: float, most: float
) -> None:
    seconds = {}
    for used in (0.0, share):
        watched = Watched(row_s, speculation="auto" if used else "off", share=used, max_num_seqs=64)
        draw = random.Random(3)
        errs = [draw.random() >= chance for _ in range(512)]
        watched.harness.executor.proposal_errs = errs.__getitem__
        watched.harness.executor.has_no_proposal = lambda num_known: False
        requests = [make_request(f"r{number}", [3, 4, 5], max_tokens=150) for number in range(num_requests)]
        for request in requests:
            watched.harness.add(request)
        began_s = watched.harness.clock.now_s
        watched.harness.run()
        seconds[used] = watched.harness.clock.now_s - began_s
        assert all(watched.harness.tokens(request.request_id) == solo_output(request) for request in requests)
    assert seconds[share] / seconds[0.0] < most


def test_a_full_batch_has_no_drafts_and_others_no_more_rows_than_sequences_may_run() -> None:
    watched = Watched(0.0001, max_num_seqs=3)
    for name in ("r1", "r2", "r3"):
        watched.harness.add(make_request(name, [3, 4, 5], max_tokens=40, seed=REPETITIVE + int(name[1:])))
    watched.harness.run()
    assert sum(watched.num_drafts) == 0
    watched.harness.add(make_request("r4", [3, 4, 5], max_tokens=60, seed=REPETITIVE + 1))
    watched.harness.run()
    assert max(watched.num_drafts) == 2


def knowing_drafter(num_drafts: int = 4, wrong_every: int = 1 << 30) -> ScriptedDrafter:
    return ScriptedDrafter(
        lambda run, number: foretell(run.token_ids, run.request.sampling.seed, number),
        num_drafts=lambda run: num_drafts,
        errs_at=lambda run, position: position % wrong_every == 0,
    )


def test_blocks_of_rejected_drafts_are_given_back_and_never_published() -> None:
    harness = Harness(num_blocks=32, drafter=knowing_drafter(num_drafts=9, wrong_every=3))
    request = make_request("r1", [1, 2, 3, 4, 5], max_tokens=30)
    harness.add(request)
    while harness.engine.has_work:
        harness.step()
        for run in harness.scheduler._running.values():
            if not run.num_pending:
                assert len(run.table.block_ids) * 4 - 4 < run.num_computed <= len(run.table.block_ids) * 4
                assert run.table.num_published == run.num_computed // 4
                assert run.num_told_blocks == len(run.table.block_ids)
    assert harness.tokens("r1") == solo_output(request)
    assert harness.engine.stats.num_accepted_tokens > 0
    assert len(harness.scheduler._kv._pool._block_of) == (5 + 30 - 1) // 4


def test_nobody_is_preempted_for_drafts() -> None:
    harness = Harness(num_blocks=9, enable_prefix_caching=False, drafter=knowing_drafter(num_drafts=20))
    requests = [make_request(name, [1, 2, 3], max_tokens=14) for name in ("r1", "r2")]
    for request in requests:
        harness.add(request)
    harness.run()
    assert harness.engine.stats.num_preemptions == 0
    assert [harness.tokens(r.request_id) for r in requests] == [solo_output(r) for r in requests]
    assert harness.engine.stats.num_accepted_tokens > 0


def test_a_stop_token_in_the_middle_of_accepted_drafts_is_the_last_token() -> None:
    free = solo_output(make_request("r1", [1, 2, 3], max_tokens=20))
    for stop in dict.fromkeys(free):
        request = make_request("r1", [1, 2, 3], max_tokens=20, stops=[stop], logprobs=0)
        harness = Harness(drafter=knowing_drafter(num_drafts=7))
        harness.add(request)
        harness.run()
        assert harness.tokens("r1") == solo_output(request)
        assert harness.last("r1").finish_reason is FinishReason.STOP
        assert harness.last("r1").stop_token_id == stop
        assert len([entry for output in harness.outputs["r1"] for entry in output.logprobs]) == len(
            solo_output(request)
        )


def test_new_requests_come_before_drafts() -> None:
    harness = Harness(drafter=knowing_drafter(), max_in_flight=2)
    harness.add(make_request("r1", [1, 2, 3], max_tokens=60))
    for _ in range(4):
        harness.step()
    assert harness.executor.plans[-1].rows[0].draft_token_ids
    num_steps = len(harness.executor.plans)
    harness.add(make_request("r2", [4, 5, 6], max_tokens=5))
    harness.run()
    first = next(plan for plan in harness.executor.plans if any(new.seq_id == 2 for new in plan.new_sequences))
    assert first.step_id <= num_steps + 2
    assert not any(row.draft_token_ids for row in first.rows)


def test_results_that_accept_other_drafts_end_the_group() -> None:
    harness = Harness(drafter=knowing_drafter())
    harness.add(make_request("r1", [1, 2, 3], max_tokens=60))
    harness.step()
    plan = harness.scheduler.schedule()
    assert isinstance(plan, StepPlan) and plan.rows[0].draft_token_ids
    harness.executor.submit(plan)
    result = harness.executor.collect()
    wrong = msgspec.structs.replace(result.rows[0], token_id=plan.rows[0].draft_token_ids[0] + 1)
    with pytest.raises(GroupFailedError, match="accepts other drafts"):
        harness.scheduler.update(plan, msgspec.structs.replace(result, rows=(wrong,)))


def test_auto_is_off_where_bits_depend_on_the_number_of_rows() -> None:
    config = SchedulerConfig(speculation="auto")
    assert settle_speculation(config, is_deterministic=True).speculation == "prompt_lookup"
    assert settle_speculation(config, is_deterministic=False).speculation == "off"
    forced = SchedulerConfig(speculation="prompt_lookup")
    assert settle_speculation(forced, is_deterministic=False) == forced
    with pytest.raises(ConfigError, match=r"speculation is 'eagle'; allowed: auto, off, prompt_lookup"):
        SchedulerConfig(speculation="eagle")


def test_what_ended_is_forgotten() -> None:
    watched = Watched(0.0005)
    for name in ("r1", "r2"):
        watched.harness.add(make_request(name, [3, 4, 5], max_tokens=9))
    watched.harness.run()
    drafter = watched.harness.scheduler._drafting._drafter
    assert isinstance(drafter, PromptLookupDrafter) and not drafter._lookups
