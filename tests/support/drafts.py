"""Drafters that know the answers, and err as they are told."""

from collections.abc import Callable, Sequence

from model_parallel.engine.messages import DraftRequest
from model_parallel.engine.model_drafter import ModelDrafter, _Known
from model_parallel.engine.sequence import Sequence as Run


class ScriptedDrafter:
    """Drafts what `next_tokens(sequence, number)` foretells, wherever it may, with an error here and there."""

    def __init__(
        self,
        next_tokens: Callable[[Run, int], Sequence[int]],
        *,
        num_drafts: Callable[[Run], int] = lambda run: 4,
        errs_at: Callable[[Run, int], bool] = lambda run, position: False,
    ) -> None:
        """`errs_at(sequence, position)`: the draft of that position is another token than foretold."""
        self._next_tokens = next_tokens
        self._num_drafts = num_drafts
        self._errs_at = errs_at

    has_prospects = True
    has_model = False

    def is_worth_waiting(self, runs: Sequence[Run], max_rows: int) -> bool:
        return max_rows > len(runs)

    def draft(self, runs: Sequence[Run], most: Sequence[int], max_rows: int) -> list[tuple[int, ...]]:
        room, drafts = max_rows - len(runs), []
        for run, limit in zip(runs, most, strict=True):
            foretold = self._next_tokens(run, min(limit, room, self._num_drafts(run)))
            begin = len(run.token_ids)
            drafts.append(tuple(t + self._errs_at(run, p) for p, t in enumerate(foretold, start=begin)))
            room -= len(drafts[-1])
        return drafts

    def observe(self, run: Run) -> None: ...

    def judge(self, run: Run, num_drafts: int, num_right: int) -> None: ...

    def record_step(self, num_rows: int, step_s: float) -> None: ...

    def ask(self, runs: Sequence[Run], most: Sequence[int], max_rows: int) -> list[int]:
        return [0] * len(runs)

    def take_proposals(self, run: Run, token_ids: Sequence[int]) -> None: ...

    def record_requests(self, requests: Sequence[DraftRequest], step_s: float) -> None: ...

    def forget(self, seq_id: int) -> None: ...


class AskingDrafter(ModelDrafter):
    """Asks the draft model wherever it may, whatever it costs, and takes all that it proposes."""

    def __init__(self, num_drafts: Callable[[Run], int] = lambda run: 4) -> None:
        super().__init__(share=0.1)
        self._num_drafts = num_drafts

    def ask(self, runs: Sequence[Run], most: Sequence[int], max_rows: int) -> list[int]:
        wanted, room = [], max_rows - len(runs)
        for run, limit in zip(runs, most, strict=True):
            wanted.append(max(0, min(limit, room, self._num_drafts(run))))
            room -= wanted[-1]
            self._known.setdefault(run.seq_id, _Known(chance=1.0)).chance = 1.0
        return wanted

    def record_step(self, num_rows: int, step_s: float) -> None: ...

    def record_requests(self, requests: Sequence[DraftRequest], step_s: float) -> None: ...
