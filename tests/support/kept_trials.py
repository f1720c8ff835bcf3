"""Processes that try out grammars, kept from one gateway to the next: to start one takes longer than most trials.

A gateway that gives a trial up, or is closed during one, ends its process as ever.
"""

import math
from collections import defaultdict

import msgspec

from model_parallel.config import TokenTable
from serving.gateway.core.grammar_worker import Setup, Trial, Verdict
from serving.gateway.core.grammars import GrammarChecker, _Worker


class _KeptWorker(_Worker):
    def __init__(self, key: bytes, table: TokenTable, max_compile_s: float) -> None:
        super().__init__(table, max_compile_s)
        self._key = key
        self._is_asked = False

    def ask(self, trial: Trial) -> Verdict:
        self._is_asked = True
        verdict = super().ask(trial)
        self._is_asked = False
        return verdict

    def end(self) -> None:
        if self._is_asked:
            super().end()

    def kill(self) -> None:
        if self._is_asked:
            super().kill()
        elif self not in _idle[self._key]:
            _idle[self._key].append(self)


_idle: defaultdict[bytes, list[_KeptWorker]] = defaultdict(list)
"""By what their processes were told first."""


class KeepingChecker(GrammarChecker):
    """Takes a process that another one has left, and leaves its own."""

    def _ask(self, trial: Trial) -> Verdict:
        if self._worker is None and not self._is_closed:
            self._worker = _idle_or_new(self._table(), self._max_compile_s)
        return super()._ask(trial)


def _idle_or_new(table: TokenTable, max_compile_s: float) -> _KeptWorker:
    key = msgspec.msgpack.encode((Setup(table, math.ceil(max_compile_s)), max_compile_s))
    return _idle[key].pop() if _idle[key] else _KeptWorker(key, table, max_compile_s)


def end_kept_trials() -> None:
    """Nobody uses them any more."""
    for worker in [worker for workers in _idle.values() for worker in workers]:
        _Worker.kill(worker)
    _idle.clear()
