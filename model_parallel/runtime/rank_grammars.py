"""The compiled grammars of one rank. They are compiled in a thread of their own, beside the steps that the rank runs."""

from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from model_parallel.collectives.interface import Collectives
from model_parallel.config import TokenTable
from model_parallel.engine.matching import Grammar, GrammarCompiler, GrammarError, Matcher
from model_parallel.engine.messages import CompiledGrammar, NewSequence, StepPlan
from model_parallel.errors import EngineError

IDLE_WAIT_S = 0.005
"""How long a step without rows waits for a grammar, so that a group with nothing else to do is not kept busy with asking."""


class RankGrammars:
    """All ranks are told of the same grammars in the same steps, before all else. So they wait for the same ones, in one order,
    and agree on which all of them have by one exchange at the end of each step in which some are not there yet: of how many."""

    def __init__(
        self, table: TokenTable | None, collectives: Collectives, device: torch.device, num_threads: int
    ) -> None:
        """`table` is None for a group without constrained output. num_threads: that the rank computes with."""
        self._compiler = None if table is None else GrammarCompiler(table, num_threads=num_threads)
        self._collectives = collectives
        self._device = device
        self._grammars: dict[int, Grammar] = {}
        self._compiling: dict[int, Future[Grammar]] = {}
        """In the order in which they came."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="packtrain-grammars")

    @property
    def is_renewing(self) -> bool:
        """A grammar is compiled in the middle of a step, which can take long; may be read by any thread."""
        return self._compiler is not None and self._compiler.is_renewing

    def take_in(self, plan: StepPlan) -> None:
        """Begin to compile what is new, and forget what is dropped. Raises EngineError where there is no constrained output."""
        for new in plan.new_grammars:
            if self._compiler is None:
                raise EngineError("a grammar came to a group without constrained output")
            self._compiling[new.grammar_id] = self._thread.submit(self._compiler.compile, new.text)
        for grammar_id in plan.dropped_grammars:
            if (future := self._compiling.pop(grammar_id, None)) is not None:
                future.cancel()  # what is being compiled goes on, and nobody takes what comes of it
            self._grammars.pop(grammar_id, None)

    def matcher_for(self, new: NewSequence) -> Matcher | None:
        """For a sequence that begins; None for one without a grammar."""
        if not new.grammar_id:
            return None
        return Matcher(self._grammars[new.grammar_id], spares_end=new.sampling.ignore_eos)

    def take_compiled(self, *, is_idle: bool) -> tuple[CompiledGrammar, ...]:
        """Those that every rank has by now, the first ones first. With `is_idle` some time is given to them."""
        if not self._compiling:
            return ()
        first = next(iter(self._compiling.values()))
        if is_idle:
            wait([first], IDLE_WAIT_S)
        num_done = 0
        for future in self._compiling.values():
            if not future.done():
                break
            num_done += 1
        mine_1 = torch.tensor([num_done], dtype=torch.float64, device=self._device)
        num_common = int(self._collectives.all_gather(mine_1).min())
        return tuple([self._take(grammar_id) for grammar_id in list(self._compiling)[:num_common]])

    def close(self) -> None:
        """Begin nothing more. What is being compiled is waited for."""
        self._thread.shutdown(cancel_futures=True)

    def _take(self, grammar_id: int) -> CompiledGrammar:
        try:
            self._grammars[grammar_id] = self._compiling.pop(grammar_id).result()
        except GrammarError as error:
            return CompiledGrammar(grammar_id, str(error))
        return CompiledGrammar(grammar_id)
