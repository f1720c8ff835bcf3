"""A sequence whose reader does not keep up: it holds nothing, others go on, and in the end its tokens are the same."""

from model_parallel.engine.request import FinishReason
from tests.support.engine import Harness, make_request
from tests.support.fake_executor import solo_output


def rows_of_last_step(harness: Harness) -> set[int]:
    return {row.seq_id for row in harness.executor.plans[-1].rows}


def test_a_paused_sequence_holds_nothing_and_goes_on_where_it_was() -> None:
    harness = Harness(max_num_seqs=1)
    slow, other = make_request("r1", [1] * 6, max_tokens=20), make_request("r2", [2] * 6, max_tokens=5)
    harness.add(slow)
    harness.step()
    harness.add(other)
    harness.engine.pause("r1")
    assert harness.engine.stats.kv_usage == 0
    harness.run()
    assert harness.tokens("r2") == solo_output(other), "the only place was the paused one's"
    stats = harness.engine.stats
    assert (stats.num_running, stats.num_waiting, stats.num_paused, stats.num_pauses) == (0, 0, 1, 1)
    assert not harness.engine.has_work, "or the engine's thread would spin"
    harness.engine.resume("r1")
    harness.run()
    assert harness.tokens("r1") == solo_output(slow)
    assert harness.engine.stats.num_prompt_tokens == 12, "it is not charged twice"


def test_tokens_that_are_in_flight_still_come() -> None:
    harness = Harness(max_in_flight=3)
    request = make_request("r1", [1] * 6, max_tokens=20)
    harness.add(request)
    harness.step()
    num_tokens = len(harness.tokens("r1"))
    harness.engine.pause("r1")
    harness.run()
    assert len(harness.tokens("r1")) == num_tokens + 2
    harness.engine.resume("r1")
    harness.run()
    assert harness.tokens("r1") == solo_output(request)


def test_a_resumed_sequence_is_its_tenants_next_one() -> None:
    harness = Harness(max_num_seqs=1)
    for name in ("r1", "r2", "r3"):
        harness.add(make_request(name, [1] * 3, max_tokens=3))
    harness.step()
    harness.engine.pause("r1")
    harness.step()
    assert rows_of_last_step(harness) == {2}
    harness.engine.resume("r1")
    while harness.outputs["r2"][-1].finish_reason is None:
        harness.step()
    harness.step()
    assert rows_of_last_step(harness) == {1}
    harness.run()


def test_one_that_waits_can_pause_too() -> None:
    harness = Harness(max_num_seqs=1)
    harness.add(make_request("r1", [1] * 3, max_tokens=3))
    harness.step()
    request = make_request("r2", [2] * 3)
    harness.add(request)
    harness.engine.pause("r2")
    harness.run()
    assert harness.outputs["r2"] == []
    harness.engine.resume("r2")
    harness.run()
    assert harness.tokens("r2") == solo_output(request)


def test_what_is_paused_expires_and_can_be_aborted_and_lost() -> None:
    harness = Harness()
    harness.add(make_request("r1", [1], max_tokens=50, deadline_s=3.0))
    harness.add(make_request("r2", [2], max_tokens=50))
    harness.add(make_request("r3", [3], max_tokens=50))
    harness.step()
    harness.engine.pause("r1", "r2", "r3")
    harness.run()
    harness.clock.now_s += 4
    harness.run()
    assert harness.finish_reason("r1") is FinishReason.DEADLINE
    assert harness.engine.abort("r2")
    harness.run()
    assert harness.finish_reason("r2") is FinishReason.CANCELLED
    harness.engine.fail("rank 1 is gone")
    harness.run()
    assert harness.last("r3").error_kind == "unavailable"
    assert harness.engine.num_paused == 0


def test_pauses_of_requests_that_have_ended_or_are_paused_do_nothing() -> None:
    harness = Harness()
    harness.add(make_request("r1", [1], max_tokens=2))
    harness.engine.pause("r1", "r1", "nobody")
    harness.engine.resume("r1", "r1", "nobody")
    assert harness.engine.stats.num_pauses == 1
    harness.run()
    harness.engine.pause("r1")
    harness.engine.resume("r1")
    assert not harness.engine.has_work
