"""Grammars of several ranks, each of which compiles at its own pace: all take the same ones, and keep what the leader keeps."""

from collections.abc import Callable
from concurrent.futures import Future

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.collectives.interface import Collectives
from model_parallel.config import TokenTable
from model_parallel.engine.matching import Grammar, GrammarCompiler, GrammarError
from model_parallel.engine.messages import CompiledGrammar, NewGrammar, StepPlan
from model_parallel.runtime.rank_grammars import RankGrammars
from tests.support.ranks import on_threads

TABLE = TokenTable.of([b"", b"a", b"b"], (0,))
NUM_RANKS = 3


class Line:
    """A thread pool that does its next job when it is told to."""

    def __init__(self) -> None:
        self._jobs: list[tuple[Future[Grammar], Callable[[str], Grammar], str]] = []

    def submit(self, call: Callable[[str], Grammar], text: str) -> Future[Grammar]:
        future: Future[Grammar] = Future()
        self._jobs.append((future, call, text))
        return future

    def begin(self) -> Callable[[], None]:
        """The next job that nobody has cancelled begins; what is returned ends it."""
        while self._jobs:
            future, call, text = self._jobs.pop(0)
            if future.set_running_or_notify_cancel():
                return lambda: self._end(future, call, text)
        return lambda: None

    def _end(self, future: Future[Grammar], call: Callable[[str], Grammar], text: str) -> None:
        try:
            future.set_result(call(text))
        except GrammarError as error:
            future.set_exception(error)


def plan(step_id: int, new: tuple[NewGrammar, ...], dropped: tuple[int, ...]) -> StepPlan:
    return StepPlan(epoch=1, step_id=step_id, new_grammars=new, dropped_grammars=dropped)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TABLE)


@given(data=st.data())
def test_ranks_keep_what_the_leader_keeps(compiler: GrammarCompiler, data: st.DataObject) -> None:
    """Whatever is dropped: what has not begun to be compiled, what is being compiled on some ranks, what all have."""
    steps: list[tuple[StepPlan, list[int], set[int]]] = []
    """Each with the jobs that every rank begins and ends in it, and what the leader keeps then."""
    kept: dict[int, bool] = {}
    last_id = 0
    for step_id in range(1, data.draw(st.integers(1, 12)) + 1):
        new = []
        for text in data.draw(
            st.lists(st.sampled_from(['start: "a"', 'start: "b"', "start: /c/", "wrong"]), max_size=3)
        ):
            last_id += 1
            new.append(NewGrammar(last_id, text))
        dropped = tuple(data.draw(st.lists(st.sampled_from(sorted(kept)), unique=True)) if kept else ())
        kept = {grammar_id: True for grammar_id in kept if grammar_id not in dropped} | {
            n.grammar_id: True for n in new
        }
        num_done = data.draw(st.lists(st.integers(0, 3), min_size=NUM_RANKS, max_size=NUM_RANKS))
        steps.append((plan(step_id, tuple(new), dropped), num_done, set(kept)))
    steps.append((plan(len(steps) + 1, (), ()), [99] * NUM_RANKS, set(kept)))

    def run(collectives: Collectives) -> list[tuple[CompiledGrammar, ...]]:
        grammars = RankGrammars(None, collectives, torch.device("cpu"), 1)
        grammars.close()
        grammars._compiler = compiler
        line = Line()
        grammars._thread = line  # type: ignore[assignment]
        taken = []
        failed: set[int] = set()
        end: Callable[[], None] = line.begin()
        for step, num_done, kept_then in steps:
            grammars.take_in(step)
            for _ in range(num_done[collectives.rank]):
                end()
                end = line.begin()
            taken.append(grammars.take_compiled(is_idle=False))
            failed |= {each.grammar_id for each in taken[-1] if each.error}
            assert grammars._grammars.keys().isdisjoint(grammars._compiling)
            assert grammars._grammars.keys() | grammars._compiling.keys() == kept_then - failed
        assert not grammars._compiling
        return taken

    by_rank = on_threads(NUM_RANKS, run)
    assert by_rank[1:] == by_rank[:1] * (NUM_RANKS - 1)
    told = [each.grammar_id for taken in by_rank[0] for each in taken]
    assert len(told) == len(set(told))
