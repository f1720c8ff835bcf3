"""Steps planned and sent before the results of earlier ones are in."""

from model_parallel.config import CacheConfig, SchedulerConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.messages import RowResult, StepPlan, StepResult
from model_parallel.engine.request import FinishReason
from model_parallel.engine.scheduler import Scheduler
from tests.support.engine import Harness, make_request
from tests.support.fake_executor import FakeExecutor, solo_output


class RecordingExecutor(FakeExecutor):
    """Notes the order of calls."""

    def __init__(self) -> None:
        super().__init__(num_blocks=64, block_size=4)
        self.calls: list[str] = []

    def submit(self, plan: StepPlan) -> None:
        self.calls.append(f"submit {plan.step_id}")
        super().submit(plan)

    def collect(self) -> StepResult:
        result = super().collect()
        self.calls.append(f"collect {result.step_id}")
        return result


def test_ranks_have_the_next_step_before_the_results_of_the_last_are_taken_in() -> None:
    executor = RecordingExecutor()
    scheduler = Scheduler(SchedulerConfig(), CacheConfig(num_blocks=64, block_size=4), epoch=1)
    engine = Engine(executor, scheduler)
    engine.add(make_request("r1", [1, 2], max_tokens=3))
    tokens = []
    while engine.has_work:
        tokens.append([token for output in engine.step() for token in output.token_ids])
    assert tokens == [[token] for token in solo_output(make_request("r1", [1, 2], max_tokens=3))] + [[]]
    # The fourth only tells the ranks to forget the sequence.
    assert executor.calls == [
        *("submit 1", "submit 2", "collect 1"),
        *("submit 3", "collect 2"),
        "collect 3",
        *("submit 4", "collect 4"),
    ]


def test_a_full_output_costs_no_row_too_many() -> None:
    harness = Harness(max_in_flight=2)
    for number, max_tokens in enumerate([1, 2, 7, 0]):
        harness.add(make_request(f"r{number}", [number] * 5, max_tokens=max_tokens))
    harness.run()
    rows = [row for plan in harness.executor.plans for row in plan.rows]
    assert sum(row.sample for row in rows) == 1 + 2 + 7
    assert sum(row.num_tokens for row in rows) == 4 * 5 + 0 + 1 + 6


def test_a_stop_token_discards_the_row_that_is_in_flight() -> None:
    solo = solo_output(make_request("r1", [1, 2], max_tokens=8))
    request = make_request("r1", [1, 2], max_tokens=8, stops=(solo[2],))
    harness = Harness(max_in_flight=2)
    harness.add(request)
    harness.run()
    assert harness.tokens("r1") == solo_output(request)
    assert harness.finish_reason("r1") is FinishReason.STOP
    *_, before, last = harness.executor.plans
    assert [row.seq_id for row in before.rows] == [1]
    assert (last.finished, last.rows) == ((1,), ())
    assert harness.executor.sequences == {}


def test_a_request_that_comes_meanwhile_gets_the_blocks_of_one_that_has_stopped() -> None:
    """The stopped sequence's row is run before the new one's, in blocks that both name."""
    solo = solo_output(make_request("r1", [1] * 6, max_tokens=8))
    harness = Harness(num_blocks=2, max_in_flight=2, enable_prefix_caching=False)
    first = make_request("r1", [1] * 6, max_tokens=3, stops=(solo[0],))
    second = make_request("r2", [2] * 6, max_tokens=3)
    harness.add(first)
    harness.add(second)
    harness.run()
    assert harness.tokens("r1") == solo_output(first)
    assert harness.tokens("r2") == solo_output(second)
    assert [row.seq_id for plan in harness.executor.plans for row in plan.rows][:3] == [1, 1, 2]


def test_losing_the_group_with_two_steps_in_flight() -> None:
    harness = Harness(max_in_flight=2)
    for number in range(3):
        harness.add(make_request(f"r{number}", [number]))
    harness.executor.fails_at_step = 3
    harness.run()
    for number in range(3):
        assert harness.last(f"r{number}").error_kind == "unavailable"
        assert len(harness.tokens(f"r{number}")) == 2
    assert not harness.engine.has_work


def test_a_lost_group_has_no_work_although_steps_were_in_flight() -> None:
    harness = Harness(max_in_flight=2)
    harness.add(make_request("r1", [1]))
    harness.step()
    harness.engine.fail("rank 0 closed its connection")
    assert [output.error_kind for output in harness.step()] == ["unavailable"]
    assert not harness.engine.has_work


def answer(plan: StepPlan, *, bad: int = 0) -> StepResult:
    """Token 3 for whoever samples; sequence `bad` is not finite."""
    rows = (
        RowResult(row.seq_id, error_kind="numerical_error")
        if row.seq_id == bad
        else RowResult(row.seq_id, 3 if row.sample else None)
        for row in plan.rows
    )
    return StepResult(plan.epoch, plan.step_id, tuple(rows))


def starts(plan: StepPlan | None) -> dict[int, int]:
    return {row.seq_id: row.start for row in plan.rows} if plan else {}


def preempted_in_flight() -> tuple[Scheduler, StepPlan]:
    """Sequence 2 prefills a block a step. Its fifth is in flight, the other four are published, and it is preempted."""
    config = SchedulerConfig(max_prefill_chunk=4, max_model_len=64)
    scheduler = Scheduler(config, CacheConfig(num_blocks=9, block_size=4), epoch=1)
    scheduler.add(make_request("r1", [1] * 4, max_tokens=20))
    scheduler.add(make_request("r2", list(range(2, 30)), max_tokens=4))
    for _ in range(4):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.update(plan, answer(plan))
    fifth = scheduler.schedule()
    assert fifth is not None
    assert starts(fifth) == {1: 7, 2: 16}
    assert starts(scheduler.schedule()) == {1: 8}
    assert scheduler.stats.num_preemptions == 1
    return scheduler, fifth


def test_a_result_from_before_a_preemption_publishes_nothing_of_the_new_blocks() -> None:
    scheduler, fifth = preempted_in_flight()
    scheduler.abort("r1", FinishReason.CANCELLED)
    assert starts(scheduler.schedule()) == {2: 16}  # again, in other blocks
    scheduler.update(fifth, answer(fifth))
    scheduler.abort("r2", FinishReason.CANCELLED)
    scheduler.add(make_request("r3", list(range(2, 30))))
    assert starts(scheduler.schedule()) == {3: 16}
    scheduler.check_integrity()


def test_an_error_from_before_a_preemption_distrusts_the_blocks_that_were_published() -> None:
    scheduler, fifth = preempted_in_flight()
    outputs = scheduler.update(fifth, answer(fifth, bad=2))
    assert [o.error_kind for o in outputs if o.finish_reason] == ["numerical_error"]
    scheduler.abort("r1", FinishReason.CANCELLED)
    scheduler.add(make_request("r3", list(range(2, 30))))
    assert starts(scheduler.schedule()) == {3: 0}
    scheduler.check_integrity()
