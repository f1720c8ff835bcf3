import pytest

from model_parallel.engine.request import FinishReason
from model_parallel.errors import GroupFailedError
from tests.support.engine import Harness, make_request
from tests.support.executors import execute
from tests.support.fake_executor import solo_output


def test_a_request_runs_to_its_end_and_is_forgotten() -> None:
    harness = Harness()
    request = make_request("r1", [1, 2, 3])
    harness.add(request)
    assert harness.engine.has_work
    harness.run()
    assert harness.tokens("r1") == solo_output(request)
    assert not harness.engine.has_work
    assert harness.executor.sequences == {}


def test_a_busy_batch_gives_what_solo_runs_give() -> None:
    requests = [make_request(f"r{n}", [n % 4] * (3 * n + 1), max_tokens=10) for n in range(12)]
    busy = Harness(num_blocks=20, max_num_batched_tokens=16, max_prefill_chunk=7)
    for request in requests:
        busy.add(request)
    busy.run()
    assert busy.engine.stats.num_preemptions > 0
    for request in requests:
        solo = Harness()
        solo.add(request)
        solo.run()
        assert busy.tokens(request.request_id) == solo.tokens(request.request_id) == solo_output(request)


def test_losing_the_group_ends_every_request_once() -> None:
    harness = Harness(max_num_seqs=2)
    for number in range(4):
        harness.add(make_request(f"r{number}", [number]))
    harness.executor.fails_at_step = 3
    harness.run()
    for number in range(4):
        last = harness.last(f"r{number}")
        assert (last.finish_reason, last.error_kind) == (FinishReason.ERROR, "unavailable")
        assert last.error == "the replica group that served this request was lost"
    assert [len(harness.tokens(f"r{number}")) for number in range(4)] == [2, 2, 0, 0]
    assert harness.engine.failure == "rank 1 died"
    assert harness.engine.stats.kv_usage == 0
    assert harness.step() == []
    assert len(harness.executor.plans) == 2
    with pytest.raises(GroupFailedError, match="rank 1 died"):
        harness.add(make_request("r9", [1]))


def test_a_rank_lost_between_steps_ends_every_request_without_another_step() -> None:
    harness = Harness()
    harness.add(make_request("r1", [1]))
    harness.step()
    harness.engine.abort("r1")
    harness.engine.fail("rank 0 closed its connection")
    harness.engine.fail("rank 1 closed its connection")
    assert harness.engine.failure == "rank 0 closed its connection"
    harness.run()
    assert harness.finish_reason("r1") is FinishReason.CANCELLED
    assert len(harness.executor.plans) == 1


def test_an_answer_out_of_turn_loses_the_group() -> None:
    harness = Harness()
    harness.add(make_request("r1", [1]))
    stale = execute(harness.executor, harness.scheduler.schedule())
    harness.executor.collect = lambda: stale  # type: ignore[method-assign]
    harness.run()
    assert harness.last("r1").error_kind == "unavailable"
    assert harness.engine.failure == "step 2 of epoch 1 was answered with step 1 of epoch 1"
