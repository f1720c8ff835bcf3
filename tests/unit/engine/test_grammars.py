"""Sequences with grammars in the scheduler: they wait until the ranks have theirs, and end where nothing can follow."""

import contextlib
import random

import pytest

from model_parallel.config import SchedulerConfig
from model_parallel.engine.grammars import GrammarTable, GroupGrammar
from model_parallel.engine.request import FinishReason
from model_parallel.errors import RequestError
from tests.support.effort import by_day
from tests.support.engine import Harness, make_request
from tests.support.fake_executor import solo_output

PROMPT = range(10)


def test_a_sequence_waits_for_its_grammar_and_others_do_not_wait_for_it() -> None:
    harness = Harness()
    harness.executor.steps_to_compile = 5
    harness.add(make_request("a1", PROMPT, grammar="3", max_tokens=9))
    harness.add(make_request("b2", PROMPT, max_tokens=3))
    for _ in range(4):
        harness.step()
    assert harness.last("b2").finish_reason is FinishReason.LENGTH
    assert harness.tokens("a1") == []
    harness.run()
    assert harness.tokens("a1") == solo_output(make_request("a1", PROMPT, max_tokens=9))[:3]
    last = harness.last("a1")
    assert last.finish_reason is FinishReason.STOP and last.stop_token_id is None


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_grammar_that_is_there_makes_nobody_wait(max_in_flight: int) -> None:
    harness = Harness(max_in_flight=max_in_flight)
    harness.add(make_request("a1", PROMPT, grammar="2"))
    harness.run()
    before = len(harness.executor.plans)
    harness.add(make_request("b2", PROMPT, grammar="2"))
    harness.step()
    assert harness.executor.plans[before].rows and not harness.executor.plans[before].new_grammars
    harness.run()
    assert len(harness.tokens("b2")) == 2
    assert harness.engine.stats.num_compiled_grammars == 1


def test_a_complete_grammar_comes_before_the_length() -> None:
    harness = Harness()
    harness.add(make_request("a1", PROMPT, grammar="3", max_tokens=3))
    harness.run()
    assert harness.finish_reason("a1") is FinishReason.STOP


def test_a_stop_token_is_told_and_a_complete_grammar_is_not() -> None:
    first = solo_output(make_request("a1", PROMPT))[0]
    harness = Harness()
    harness.add(make_request("a1", PROMPT, grammar="1", stops=[first]))
    harness.run()
    assert harness.last("a1").stop_token_id == first


def test_a_continued_sequence_counts_what_was_delivered() -> None:
    whole = solo_output(make_request("a1", PROMPT, max_tokens=9))
    harness = Harness()
    harness.add(make_request("a1", PROMPT, grammar="5", max_tokens=9, output=whole[:3]))
    harness.run()
    assert harness.tokens("a1") == whole[3:5]


def test_a_grammar_that_the_ranks_cannot_have_ends_its_sequences() -> None:
    harness = Harness()
    harness.add(make_request("a1", PROMPT, grammar="wrong"))
    harness.add(make_request("b2", PROMPT, grammar="wrong"))
    harness.add(make_request("c3", PROMPT))
    harness.engine.pause("b2")
    harness.run()
    harness.engine.resume("b2")
    harness.run()
    for name in ("a1", "b2"):
        assert harness.last(name).error_kind == "constraint_error" and "wrong" in harness.last(name).error
    assert harness.finish_reason("c3") is FinishReason.LENGTH
    harness.add(make_request("d4", PROMPT, grammar="wrong"))
    harness.run()
    assert harness.last("d4").error_kind == "constraint_error"


@pytest.mark.parametrize("when", ["before", "while", "after"])
def test_a_sequence_without_its_grammar_can_be_paused_and_cancelled(when: str) -> None:
    harness = Harness()
    harness.executor.steps_to_compile = 3
    harness.add(make_request("a1", PROMPT, grammar="2"))
    harness.add(make_request("b2", PROMPT, grammar="2"))
    for _ in range({"before": 0, "while": 2, "after": 4}[when]):
        harness.step()
    harness.engine.pause("a1")
    harness.engine.abort("b2")
    harness.run()
    assert harness.finish_reason("b2") is FinishReason.CANCELLED
    harness.engine.resume("a1")
    harness.run()
    assert harness.finish_reason("a1") is FinishReason.STOP


def test_an_unready_sequence_expires() -> None:
    harness = Harness()
    harness.executor.steps_to_compile = 1000
    harness.add(make_request("a1", PROMPT, grammar="2", deadline_s=5))
    harness.step()
    harness.clock.now_s += 6
    harness.step()
    assert harness.finish_reason("a1") is FinishReason.DEADLINE


def test_grammars_that_nobody_uses_make_room() -> None:
    harness = Harness(max_grammars=2)
    for number in range(1, 6):
        harness.add(make_request(f"a{number}", PROMPT, grammar=str(number), max_tokens=9))
        harness.run()
        assert len(harness.tokens(f"a{number}")) == number
    harness.add(make_request("b9", PROMPT))
    harness.run()
    assert sorted(harness.executor.grammars.values()) == ["4", "5"]
    harness.add(make_request("c1", PROMPT, grammar="4", max_tokens=9))  # is used now, so 5 goes next
    harness.run()
    harness.add(make_request("d1", PROMPT, grammar="1", max_tokens=9))
    harness.run()
    assert sorted(harness.executor.grammars.values()) == ["1", "4"]


def test_more_grammars_than_may_be_kept_are_refused() -> None:
    harness = Harness(max_grammars=2)
    harness.add(make_request("a1", PROMPT, grammar="1"))
    harness.add(make_request("a2", PROMPT, grammar="2"))
    with pytest.raises(RequestError, match="2 and") as refusal:
        harness.add(make_request("a3", PROMPT, grammar="3"))
    assert refusal.value.kind == "overloaded"
    harness.add(make_request("a4", PROMPT, grammar="2"))
    harness.run()
    harness.add(make_request("a3", PROMPT, grammar="3"))
    harness.run()


@pytest.mark.parametrize("max_in_flight", [1, 3])
def test_the_ranks_keep_what_the_leader_keeps(max_in_flight: int) -> None:
    """Whatever is dropped before it is compiled, too."""
    for seed in range(by_day(20, by_night=400)):
        rng = random.Random(seed)
        harness = Harness(max_grammars=3, max_in_flight=max_in_flight)
        for number in range(40):
            harness.executor.steps_to_compile = rng.choice([1, 2, 9])
            if rng.random() < 0.7:
                grammar = rng.choice(["1", "2", "3", "4", "5", "6", "wrong"])
                with contextlib.suppress(RequestError):
                    harness.add(make_request(f"r{number}", PROMPT, grammar=grammar, max_tokens=9))
            if rng.random() < 0.5 and harness.outputs:
                harness.engine.abort(rng.choice(list(harness.outputs)))
            if rng.random() < 0.7:
                harness.step()
        harness.run()
        assert harness.executor.kept_grammars == set(harness.scheduler._grammars._by_id), seed


def test_bytes_of_grammars_are_those_of_their_text() -> None:
    table = GrammarTable(SchedulerConfig(max_grammar_bytes=10, max_model_len=8))
    table.acquire("é🙂")  # 6 bytes
    with pytest.raises(RequestError, match="2 grammars of 11 bytes in use; it may have 64 and 10 bytes"):
        table.check_room({"abcde"})
    table.check_room({"é🙂", "abcd"})
    table.release(table.acquire("abcd"))
    table.acquire("xyzé")  # abcd has to go
    assert len(table) == 2 and table.take_news()[0][1].text == "xyzé"


@pytest.mark.parametrize("break_it", ["users", "dropped", "told", "index", "number", "bytes"])
def test_check_integrity_notices(break_it: str) -> None:
    table = GrammarTable(SchedulerConfig(max_grammars=2, max_grammar_bytes=4, max_model_len=8))
    one, two = table.acquire("1"), table.acquire("2")
    living = {one.grammar_id: 1, two.grammar_id: 1}
    table.check_integrity(living)
    match break_it:
        case "users":
            table.release(one)
        case "dropped":
            table._dropped.append(two.grammar_id)
        case "told":
            table._new.append(GroupGrammar(9, "9", 1))
        case "index":
            del table._by_id[one.grammar_id]
        case "number":
            table.config = SchedulerConfig(max_grammars=1, max_grammar_bytes=4, max_model_len=8)
        case "bytes":
            two.num_bytes = 4
    with pytest.raises(RuntimeError):
        table.check_integrity(living)


def test_a_lost_group_ends_sequences_that_wait_for_their_grammar() -> None:
    harness = Harness()
    harness.executor.fails_at_step = 2
    harness.add(make_request("a1", PROMPT, grammar="2"))
    harness.run()
    last = harness.last("a1")
    assert last.error_kind == "unavailable" and last.was_waiting
