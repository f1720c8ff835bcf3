"""Decode steps on the CPU as recorded programs: one native call a step; see kernels/cpu/recording.py.

Shape suffixes: T tokens of a decode step, one a sequence · E hidden · D head dim
"""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from model_parallel.collectives.interface import SoloCollectives
from model_parallel.collectives.shared_memory.segment import SharedMemoryCollectives
from model_parallel.kernels.cpu import CpuKernels
from model_parallel.kernels.cpu.low_rank import StepAdapters
from model_parallel.kernels.cpu.recording import Program, Workspace
from model_parallel.kernels.interface import AdaptedRun, AttentionPlan, LayerCache
from model_parallel.model.batch import Layout, rotary_angles
from model_parallel.model.llama import Llama


class _Inputs:
    """Fixed places for the inputs of a step of `num_rows` tokens, with at most `max_blocks` blocks together."""

    def __init__(self, num_rows: int, max_blocks: int, frequencies: Tensor) -> None:
        self.max_blocks = max_blocks
        self.adapters = StepAdapters(num_rows)
        self._frequencies = frequencies
        numbers = array("q", bytes(8 * (7 * num_rows + max_blocks)))
        self._memory = memoryview(numbers)
        self.token_ids_T, self._positions_T, slots_T, runs, blocks = torch.frombuffer(numbers, dtype=torch.int64).split(
            [num_rows, num_rows, num_rows, 4 * num_rows, max_blocks]
        )
        angles_TD = rotary_angles(self._positions_T, frequencies)
        self.plan = AttentionPlan(
            slots_T=slots_T,
            cos_TD=angles_TD.cos(),
            sin_TD=angles_TD.sin(),
            runs=(),  # the native kernels read them as numbers
            runs_S4=runs.view(num_rows, 4),
            blocks=blocks,
        )

    def load(self, layout: Layout, adapted: Sequence[AdaptedRun]) -> None:
        """Fill in a step."""
        self.adapters.load(adapted)
        runs = chain.from_iterable(layout.runs)
        numbers = array("q", [*layout.token_ids, *layout.positions, *layout.slots, *runs, *layout.blocks])
        self._memory[: len(numbers)] = numbers
        angles_TD = rotary_angles(self._positions_T, self._frequencies)
        torch.cos(angles_TD, out=self.plan.cos_TD)
        torch.sin(angles_TD, out=self.plan.sin_TD)


@dataclass(frozen=True, slots=True)
class _Step:
    """Decode of a fixed number of tokens."""

    inputs: _Inputs
    program: Program
    hidden_TE: Tensor
    calls: Sequence[Any]
    """Of the program, as the profile knows them, if there is one."""


class Profile(Protocol):
    """What runtime/profile.py wants to know of programs."""

    def record(self) -> list[Any]:
        """Begins to list the calls that a program is recorded of."""
        ...

    def add_program(self, calls: Sequence[Any], durations_ns: Sequence[int]) -> None: ...


class RecordedSteps:
    """The forward pass of decode steps, recorded when a number of tokens is first met. It gives the bits that calls one by one
    give."""

    def __init__(
        self,
        model: Llama,
        caches: Sequence[LayerCache],
        frequencies: Tensor,
        *,
        kernels: CpuKernels,
        collectives: SoloCollectives | SharedMemoryCollectives,
    ) -> None:
        self._model = model
        self._caches = caches
        self._frequencies = frequencies
        self._kernels = kernels
        self._collectives = collectives
        self._workspaces: dict[int, Workspace] = {}
        """By the most rows: powers of two."""
        self._steps: dict[int, _Step] = {}
        """By the number of rows."""
        self.profile: Profile | None = None

    def forward(self, layout: Layout, adapted: Sequence[AdaptedRun] = ()) -> Tensor:
        """As Llama.forward; the result is good until the next call. `layout` must not be used afterwards.

        `adapted` are the rows that adapters change. The program is the same whichever those are.
        """
        num_rows, num_blocks = len(layout.token_ids), len(layout.blocks)
        # A run of several tokens, a sequence's last one and its drafts, leaves room for as many runs of none.
        layout.runs.extend((row, 0, 0, 0) for row in range(len(layout.runs), num_rows))
        step = self._steps.get(num_rows)
        if step is None or num_blocks > step.inputs.max_blocks:
            inputs = _Inputs(num_rows, 2 * num_blocks, self._frequencies)
            inputs.load(layout, adapted)
            step = self._steps[num_rows] = self._record(num_rows, inputs)
        else:
            step.inputs.load(layout, adapted)
            self._run(step)
        return step.hidden_TE

    def _run(self, step: _Step) -> None:
        if self.profile is None:
            status = step.program.run()
        else:
            durations_ns = (ctypes.c_int64 * step.program.num_calls)()
            status = step.program.run(durations_ns)
            self.profile.add_program(step.calls, durations_ns[:])
        if isinstance(self._collectives, SharedMemoryCollectives):
            self._collectives.check(status)

    def _record(self, num_rows: int, inputs: _Inputs) -> _Step:
        max_rows = 1 << (num_rows - 1).bit_length()
        calls = self.profile.record() if self.profile is not None else ()
        workspace = self._workspaces.setdefault(max_rows, Workspace(max_rows))
        with self._kernels.recording(workspace) as program:
            hidden_TE = self._model.forward(
                inputs.token_ids_T,
                inputs.plan,
                self._caches,
                all_reduce=self._recorded_all_reduce(program),
                adapted_rows=inputs.adapters,
            )
        return _Step(inputs, program, workspace.kept(hidden_TE), list(calls))

    def _recorded_all_reduce(self, program: Program) -> Callable[[Tensor], Tensor]:
        """A sum over ranks that is recorded as well."""
        collectives = self._collectives
        if not isinstance(collectives, SharedMemoryCollectives):
            return collectives.all_reduce

        def all_reduce(x: Tensor) -> Tensor:
            x = collectives.all_reduce(x)  # leaves the sum in x's own memory
            program.add_all_reduce(collectives.native_all_reduce, x)
            return x

        return all_reduce
