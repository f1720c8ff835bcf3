import os
import subprocess
import sys
from pathlib import Path

import pytest

from model_parallel.config import CacheConfig, SchedulerConfig
from model_parallel.engine.messages import Row, RowResult, StepPlan, StepResult
from model_parallel.engine.request import FinishReason, Timings, TokenLogprobs
from model_parallel.engine.scheduler import Scheduler
from model_parallel.errors import GroupFailedError, RequestError
from tests.support.engine import Harness, make_request
from tests.support.executors import execute
from tests.support.fake_executor import next_token, solo_output, solo_prompt_logprobs


def rows_of(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    return [(row.seq_id, row.start, row.num_tokens, row.sample) for row in plan.rows]


def last_rows(harness: Harness) -> list[tuple[int, int, int, bool]]:
    return rows_of(harness.executor.plans[-1])


def test_decodes_come_first_and_prefill_fills_the_step() -> None:
    harness = Harness(max_num_batched_tokens=10, max_num_seqs=4)
    harness.add(make_request("r1", [1] * 3))
    harness.step()
    assert last_rows(harness) == [(1, 0, 3, True)]
    harness.add(make_request("r2", [2] * 12))
    harness.add(make_request("r3", [3] * 8))
    harness.step()
    assert last_rows(harness) == [(1, 3, 1, True), (2, 0, 9, False)]
    harness.step()
    assert last_rows(harness) == [(1, 4, 1, True), (2, 9, 3, True), (3, 0, 6, False)]
    harness.step()
    assert last_rows(harness) == [(1, 5, 1, True), (2, 12, 1, True), (3, 6, 2, True)]


def test_a_prefill_chunk_is_bounded_and_leaves_room_for_the_next_in_line() -> None:
    harness = Harness(max_prefill_chunk=4)
    harness.add(make_request("r1", [1] * 9))
    harness.add(make_request("r2", [2] * 5))
    starts = []
    for _ in range(3):
        harness.step()
        starts.append(last_rows(harness))
    assert starts == [
        [(1, 0, 4, False), (2, 0, 4, False)],
        [(2, 4, 1, True), (1, 4, 4, False)],
        [(1, 8, 1, True), (2, 5, 1, True)],
    ]


def test_a_plan_tells_a_sequence_once_and_then_only_new_blocks() -> None:
    harness = Harness(block_size=4)
    request = make_request("r1", [1, 2, 3], output=[7], max_tokens=4)
    harness.add(request)
    harness.run()
    first, second, third, forget = harness.executor.plans
    new = first.new_sequences[0]
    assert (new.seq_id, new.token_ids, new.num_prompt_tokens) == (1, (1, 2, 3, 7), 3)
    assert (new.choice, new.sampling) == (request.choice, request.sampling)
    assert [plan.new_sequences for plan in (second, third, forget)] == [(), (), ()]
    assert [len(plan.rows[0].new_block_ids) for plan in (first, second, third)] == [1, 1, 0]
    assert [plan.step_id for plan in harness.executor.plans] == [1, 2, 3, 4]
    assert (forget.finished, forget.rows) == ((1,), ())


def test_the_number_of_running_sequences_is_bounded_and_order_is_arrival() -> None:
    harness = Harness(max_num_seqs=2)
    for number in (1, 2, 3, 4):
        harness.add(make_request(f"r{number}", [number], max_tokens=2))
    harness.step()
    assert [row[0] for row in last_rows(harness)] == [1, 2]
    harness.step()
    harness.step()
    assert [row[0] for row in last_rows(harness)] == [3, 4]


@pytest.mark.parametrize(
    ("stops", "eos", "ignore_eos", "reason"),
    [
        ((), (), False, FinishReason.LENGTH),
        ((), "second", False, FinishReason.STOP),
        ((), "second", True, FinishReason.LENGTH),
        ("second", (), False, FinishReason.STOP),
        ("second", "second", True, FinishReason.STOP),
    ],
)
def test_what_ends_an_answer(stops: object, eos: object, ignore_eos: bool, reason: FinishReason) -> None:
    tokens = solo_output(make_request("r1", [5, 6], max_tokens=3))
    assert tokens[1] not in (tokens[0], tokens[2])
    harness = Harness()
    harness.add(
        make_request(
            "r1",
            [5, 6],
            max_tokens=3,
            stops=[tokens[1]] if stops else [],
            eos=[tokens[1]] if eos else [],
            ignore_eos=ignore_eos,
        )
    )
    harness.run()
    assert harness.finish_reason("r1") is reason
    expected = tokens[:2] if reason is FinishReason.STOP else tokens
    assert harness.tokens("r1") == expected
    assert harness.last("r1").stop_token_id == (tokens[1] if reason is FinishReason.STOP else None)


def test_an_answer_resumed_from_another_group_goes_on_where_it_stopped() -> None:
    whole = solo_output(make_request("r1", [5, 6], max_tokens=6))
    harness = Harness()
    harness.add(make_request("r1", [5, 6], output=whole[:4], max_tokens=6))
    harness.add(make_request("r2", [5, 6], output=whole, max_tokens=6))
    harness.run()
    assert harness.tokens("r1") == whole[4:]
    assert harness.tokens("r2") == []
    assert harness.finish_reason("r2") is FinishReason.LENGTH


def test_max_tokens_0_only_scores_the_prompt() -> None:
    harness = Harness(max_prefill_chunk=3)
    request = make_request("r1", list(range(8)), max_tokens=0, prompt_logprobs=0)
    harness.add(request)
    harness.run()
    assert not any(row.sample for plan in harness.executor.plans for row in plan.rows)
    assert [len(output.prompt_logprobs) for output in harness.outputs["r1"]] == [3, 3, 1]
    assert harness.prompt_logprobs("r1") == solo_prompt_logprobs(request)
    assert (harness.tokens("r1"), harness.finish_reason("r1")) == ([], FinishReason.LENGTH)


def test_log_probabilities_are_delivered_with_their_tokens() -> None:
    harness = Harness()
    harness.add(make_request("r1", [1, 2], logprobs=0, max_tokens=3))
    harness.run()
    assert [o.logprobs[0].token_id for o in harness.outputs["r1"]] == harness.tokens("r1")


def test_a_wholly_cached_prompt_still_computes_its_last_token() -> None:
    harness = Harness(block_size=4)
    harness.add(make_request("r1", list(range(8)), max_tokens=1))
    harness.run()
    harness.add(make_request("r2", list(range(8)), max_tokens=1))
    harness.step()
    assert last_rows(harness) == [(2, 4, 4, True)]
    assert harness.last("r2").num_cached_tokens == 4
    assert (harness.engine.stats.num_prefix_query_tokens, harness.engine.stats.num_prefix_hit_tokens) == (16, 4)


@pytest.mark.parametrize(("start", "num_cached"), [(0, 0), (1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8), (99, 8)])
def test_a_prefix_hit_leaves_the_logits_that_prompt_logprobs_need(start: int, num_cached: int) -> None:
    harness = Harness(block_size=4)
    harness.add(make_request("r1", list(range(12)), max_tokens=1))
    harness.run()
    request = make_request("r2", list(range(12)), max_tokens=1, prompt_logprobs=0, prompt_logprobs_start=start)
    harness.add(request)
    harness.run()
    assert harness.last("r2").num_cached_tokens == num_cached
    assert harness.prompt_logprobs("r2") == solo_prompt_logprobs(request)


def test_other_salts_find_nothing() -> None:
    harness = Harness(block_size=4)
    harness.add(make_request("r1", list(range(9)), salt=b"one", max_tokens=1))
    harness.run()
    harness.add(make_request("r2", list(range(9)), salt=b"two", max_tokens=1))
    harness.add(make_request("r3", list(range(9)), salt=b"one", max_tokens=1))
    harness.run()
    assert [harness.last(f"r{n}").num_cached_tokens for n in (1, 2, 3)] == [0, 0, 8]


def test_the_latest_arrived_is_preempted_and_starts_again_first() -> None:
    # 6 blocks of 2: each of two sequences needs 4 at its end.
    harness = Harness(num_blocks=6, block_size=2, enable_prefix_caching=False)
    requests = [make_request(f"r{n}", [n, n, n], max_tokens=6) for n in (1, 2, 3)]
    for request in requests:
        harness.add(request)
    harness.run()
    preempted = [row for plan in harness.executor.plans for row in plan.rows if row.reset_blocks]
    assert [row.seq_id for row in preempted] == [2]
    assert preempted[0].start == 0
    assert harness.engine.stats.num_preemptions == 1
    assert [harness.tokens(request.request_id) for request in requests] == [solo_output(r) for r in requests]
    ends = [r for plan in harness.executor.plans for r in plan.finished]
    assert ends == [1, 2, 3]


@pytest.mark.parametrize(
    ("tenants", "weights", "priorities", "victim"),
    [
        ("aaa", (1, 1, 1), (0, 0, 0), 3),
        ("aab", (1, 1, 1), (0, 0, 0), 2),
        ("bbaa", (1, 1, 4, 4), (0, 0, 0, 0), 2),
        ("aba", (1, 4, 1), (0, 0, 0), 3),
        ("ab", (0.1, 4), (0, 0), 2),
        ("aba", (1, 1, 1), (0, 0, 1), 3),
        ("aab", (1, 1, 1), (0, 0, 1), 3),
    ],
    ids=[
        "latest",
        "runs most",
        "runs most for its weight",
        "runs most again",
        "its first one",
        "own class",
        "lowest class",
    ],
)
def test_who_is_preempted(tenants: str, weights: tuple[float, ...], priorities: tuple[int, ...], victim: int) -> None:
    harness = Harness(num_blocks=3 * len(tenants), block_size=2, enable_prefix_caching=False, max_num_seqs=4)
    for number, (tenant, weight, priority) in enumerate(zip(tenants, weights, priorities, strict=True), start=1):
        harness.add(
            make_request(f"r{number}", [number] * 3, max_tokens=8, tenant=tenant, weight=weight, priority=priority)
        )
        harness.step()
    while not harness.engine.stats.num_preemptions:
        harness.step()
    assert [sequence.seq_id for sequence in harness.scheduler._queue] == [victim]
    harness.run()
    assert all(
        harness.tokens(f"r{n}") == solo_output(make_request(f"r{n}", [n] * 3, max_tokens=8))
        for n in range(1, len(tenants) + 1)
    )


def test_a_tenant_is_charged_for_what_it_got_and_once() -> None:
    """Not for what the prefix cache gave, nor again after a preemption."""
    harness = Harness(num_blocks=6, block_size=2)
    requests = [make_request(f"r{n}", [n] * 3, max_tokens=6, tenant="a") for n in (1, 2)]
    for request in requests:
        harness.add(request)
    harness.run()
    assert harness.engine.stats.num_preemptions == 1
    assert harness.scheduler._queue.tenant_of(requests[0]).counter == 2 * (3 + 2 * 6)
    again = make_request("r3", [2] * 3, max_tokens=1, tenant="a")
    harness.add(again)
    harness.run()
    assert harness.last("r3").num_cached_tokens == 2
    assert harness.scheduler._queue.tenant_of(again).counter == 2 * (3 + 2 * 6) + (3 - 2) + 2


def test_a_light_sequence_is_computed_first_and_takes_room_from_who_runs_more() -> None:
    harness = Harness(max_num_seqs=3, max_num_batched_tokens=8, max_model_len=64)
    for number in range(1, 5):
        harness.add(make_request(f"r{number}", [number] * 6, max_tokens=40, tenant="large"))
    for _ in range(4):
        harness.step()
    assert [row[0] for row in last_rows(harness)] == [1, 2, 3]
    harness.add(make_request("r5", [5] * 12, max_tokens=2, tenant="small"))
    harness.step()
    # Sequence 3, admitted last, gives way; 6 tokens are left of the step.
    assert last_rows(harness) == [(1, 9, 1, True), (2, 8, 1, True), (5, 0, 6, False)]
    harness.step()
    harness.step()
    assert harness.finish_reason("r5") is FinishReason.LENGTH
    harness.step()
    assert [row[0] for row in last_rows(harness)] == [1, 2, 3]
    # Nobody gives way to a tenant that already runs as many.
    harness.add(make_request("r6", [6] * 6, max_tokens=40, tenant="small"))
    harness.step()
    harness.add(make_request("r7", [7] * 6, max_tokens=40, tenant="small"))
    harness.step()
    assert [row[0] for row in last_rows(harness)] == [1, 2, 6]


def test_a_preempted_sequence_reports_prompt_logprobs_once_and_its_first_prefix_hit() -> None:
    harness = Harness(num_blocks=9, block_size=2)
    requests = [
        make_request(f"r{n}", [n] * 6, max_tokens=8, prompt_logprobs=0, prompt_logprobs_start=3) for n in (1, 2)
    ]
    for request in requests:
        harness.add(request)
    harness.run()
    assert harness.engine.stats.num_preemptions == 1
    for request in requests:
        assert harness.prompt_logprobs(request.request_id) == solo_prompt_logprobs(request)
        assert harness.last(request.request_id).num_cached_tokens == 0


def test_a_sequence_may_use_the_whole_cache_but_not_more() -> None:
    harness = Harness(num_blocks=4, block_size=2)
    harness.add(make_request("r1", [1] * 4, max_tokens=5))
    harness.run()
    assert len(harness.tokens("r1")) == 5
    with pytest.raises(RequestError, match=r"4 tokens and max_tokens is 6; that takes 5 blocks .* which has 4"):
        harness.add(make_request("r2", [1] * 4, max_tokens=6))


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "output", "message"),
    [
        ([], 1, [], "the prompt is empty"),
        ([1] * 100, 29, [], "100 tokens and max_tokens is 29; together at most 128"),
        ([1], 1, [2, 3], "max_tokens is 1 and 2 were delivered"),
    ],
)
def test_what_can_never_run_is_refused(prompt: list[int], max_tokens: int, output: list[int], message: str) -> None:
    harness = Harness()
    with pytest.raises(RequestError, match=message) as caught:
        harness.add(make_request("r1", prompt, max_tokens=max_tokens, output=output))
    assert caught.value.kind == "invalid"
    assert not harness.engine.has_work


def test_the_waiting_queue_is_bounded_in_requests() -> None:
    harness = Harness(max_waiting_requests=2)
    harness.add(make_request("r1", [1]))
    harness.add(make_request("r2", [1]))
    with pytest.raises(RequestError, match="2 requests are waiting") as caught:
        harness.add(make_request("r3", [1]))
    assert caught.value.kind == "overloaded"
    harness.step()
    harness.add(make_request("r3", [1]))


def test_the_waiting_queue_is_bounded_in_tokens() -> None:
    harness = Harness(max_waiting_tokens=10)
    harness.add(make_request("r1", [1] * 6))
    with pytest.raises(RequestError, match="6 prompt tokens are waiting and this prompt has 5; at most 10") as caught:
        harness.add(make_request("r2", [1] * 5))
    assert caught.value.kind == "overloaded"
    harness.add(make_request("r2", [1] * 4))


def test_a_request_id_is_taken_until_its_last_output_is_out() -> None:
    harness = Harness()
    harness.add(make_request("r1", [1], max_tokens=2))
    with pytest.raises(RequestError, match="'r1' is in use") as caught:
        harness.add(make_request("r1", [2]))
    assert caught.value.kind == "duplicate"
    harness.engine.abort("r1", FinishReason.CANCELLED)
    with pytest.raises(RequestError, match="'r1' is in use"):
        harness.add(make_request("r1", [2]))
    harness.step()
    harness.add(make_request("r1", [2]))


def test_abort_while_waiting_never_reaches_the_ranks() -> None:
    harness = Harness()
    harness.add(make_request("r1", [1]))
    assert harness.engine.abort("r1", FinishReason.CANCELLED)
    assert not harness.engine.abort("r1", FinishReason.CANCELLED)
    harness.run()
    assert harness.finish_reason("r1") is FinishReason.CANCELLED
    assert all(not plan.new_sequences and not plan.finished for plan in harness.executor.plans)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_abort_frees_the_blocks_at_once(num_steps: int) -> None:
    """While its prompt is prefilled, after its first token, and while it decodes."""
    harness = Harness(max_prefill_chunk=4)
    harness.add(make_request("r1", [1] * 8, max_tokens=9))
    for _ in range(num_steps):
        harness.step()
    assert harness.engine.stats.kv_usage > 0
    assert harness.engine.abort("r1", FinishReason.STOP)
    assert harness.engine.stats.kv_usage == 0
    harness.run()
    assert harness.finish_reason("r1") is FinishReason.STOP
    assert harness.executor.plans[-1].finished == (1,)


def test_abort_of_a_preempted_sequence() -> None:
    harness = Harness(num_blocks=6, block_size=2, enable_prefix_caching=False)
    for number in (1, 2):
        harness.add(make_request(f"r{number}", [number] * 3, max_tokens=6))
    while not harness.engine.stats.num_preemptions:
        harness.step()
    assert harness.engine.abort("r2", FinishReason.CANCELLED)
    harness.run()
    assert harness.finish_reason("r2") is FinishReason.CANCELLED
    assert harness.finish_reason("r1") is FinishReason.LENGTH
    assert harness.executor.sequences == {}


def test_abort_during_a_step_discards_what_it_brings() -> None:
    harness = Harness()
    for number in (1, 2):
        harness.add(make_request(f"r{number}", [number] * 5, max_tokens=2))
    plan = harness.scheduler.schedule()
    result = execute(harness.executor, plan)
    harness.scheduler.abort("r1", FinishReason.CANCELLED)
    outputs = harness.scheduler.update(plan, result)
    assert [(o.request_id, o.token_ids, o.finish_reason) for o in outputs] == [
        ("r1", (), FinishReason.CANCELLED),
        ("r2", (next_token([2] * 5, 2),), None),
    ]
    assert harness.scheduler.schedule().finished == (1,)


def test_an_expired_request_is_never_prefilled() -> None:
    harness = Harness()
    harness.add(make_request("r1", [1], deadline_s=5.0))
    harness.clock.now_s += 5.0
    harness.run()
    assert harness.finish_reason("r1") is FinishReason.DEADLINE
    assert harness.last("r1").timings == Timings(queue_s=5.0)
    assert harness.executor.plans == []


def test_a_deadline_ends_a_running_request() -> None:
    harness = Harness()
    harness.add(make_request("r1", [1], deadline_s=5.0, max_tokens=20))
    for _ in range(3):
        harness.step()
        harness.clock.now_s += 2.0
    harness.run()
    assert harness.finish_reason("r1") is FinishReason.DEADLINE
    assert len(harness.tokens("r1")) == 3


def test_timings_split_by_stage() -> None:
    harness = Harness(max_num_seqs=1)
    harness.add(make_request("r1", [1], max_tokens=1))
    harness.add(make_request("r2", [1] * 3, max_tokens=3))
    harness.step()
    harness.clock.now_s += 7.0
    plan = harness.scheduler.schedule()
    harness.clock.now_s += 2.0
    harness.scheduler.update(plan, execute(harness.executor, plan))
    harness.clock.now_s += 0.25
    harness.step()
    harness.clock.now_s += 0.25
    harness.step()
    assert harness.last("r2").timings == Timings(queue_s=7.0, prefill_s=2.0, decode_s=0.5)
    # A front end that finds a stop string waits for no other output.
    assert harness.outputs["r2"][0].timings == Timings(queue_s=7.0, prefill_s=2.0, decode_s=0.25)


def test_a_numerical_error_ends_one_request_and_its_blocks_are_not_shared() -> None:
    harness = Harness(block_size=4)
    harness.executor.poisoned_seeds.add(1)
    harness.add(make_request("r1", list(range(12))))
    harness.add(make_request("r2", [7] * 4))
    harness.run()
    last = harness.last("r1")
    assert (last.finish_reason, last.error_kind) == (FinishReason.ERROR, "numerical_error")
    assert last.error == "the logits after token 12 are not finite"
    assert harness.tokens("r2") == solo_output(make_request("r2", [7] * 4))
    harness.add(make_request("r3", list(range(12))))
    harness.run()
    assert harness.last("r3").num_cached_tokens == 0


def test_a_numerical_error_in_decode_takes_back_what_prefill_published() -> None:
    harness = Harness(block_size=4)
    harness.add(make_request("r1", list(range(12))))
    harness.step()
    harness.executor.poisoned_seeds.add(1)
    harness.run()
    assert harness.finish_reason("r1") is FinishReason.ERROR
    harness.add(make_request("r3", list(range(12))))
    harness.run()
    assert harness.last("r3").num_cached_tokens == 0


def answer(
    *, epoch: int = 1, step_id: int = 1, seq_ids: tuple[int, ...] = (1,), token_id: int | None = 3
) -> StepResult:
    return StepResult(epoch, step_id, tuple(RowResult(seq_id, token_id) for seq_id in seq_ids))


@pytest.mark.parametrize(
    "wrong",
    [answer(epoch=2), answer(step_id=2), answer(seq_ids=(2,)), answer(seq_ids=()), answer(token_id=None)],
    ids=["epoch", "step", "sequence", "missing row", "missing token"],
)
def test_an_answer_to_another_step_fails_the_group(wrong: StepResult) -> None:
    harness = Harness()
    harness.add(make_request("r1", [1]))
    plan = harness.scheduler.schedule()
    with pytest.raises(GroupFailedError):
        harness.scheduler.update(plan, wrong)
    assert len(harness.scheduler.update(plan, answer())) == 1


def test_prompt_logprobs_of_a_row_follow_the_rows_before() -> None:
    """Driven by hand: the second row repeats a position that was delivered already."""
    scheduler = Scheduler(
        SchedulerConfig(max_prefill_chunk=2, max_model_len=8), CacheConfig(num_blocks=8, block_size=2), epoch=1
    )
    scheduler.add(make_request("r1", [5, 6, 7, 8], prompt_logprobs=0, max_tokens=1))
    logprobs = {position: TokenLogprobs(position + 5, -1.0) for position in (1, 2, 3)}
    plan = scheduler.schedule()
    first = scheduler.update(plan, StepResult(1, 1, (RowResult(1, prompt_logprobs=(logprobs[1], logprobs[2])),)))
    assert first[0].prompt_logprobs == (logprobs[1], logprobs[2])
    plan = scheduler.schedule()
    assert plan.rows == (Row(seq_id=1, start=2, num_tokens=2, sample=True),)
    last = scheduler.update(plan, StepResult(1, 2, (RowResult(1, 9, None, (logprobs[3],)),)))
    assert last[0].prompt_logprobs == (logprobs[3],)


SCRIPT = """
from tests.support.engine import Harness, make_request
harness = Harness(num_blocks=12, block_size=2, max_num_seqs=5, max_prefill_chunk=3)
for n in range(12):
    harness.add(make_request(f"r{n}", [n % 3] * (n + 1), max_tokens=6, salt=b"ab"[n % 2 :]))
    if n % 4 == 3:
        harness.engine.abort(f"r{n - 1}")
    harness.step()
harness.run()
print(harness.executor.plans, harness.engine.stats)
"""


def test_plans_do_not_depend_on_the_order_of_hashes() -> None:
    def plans(hash_seed: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            cwd=Path(__file__).parents[3],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout

    first = plans("1")
    assert len(first) > 1000
    assert first == plans("2") == plans("3")
