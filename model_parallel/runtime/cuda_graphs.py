"""Decode steps as CUDA graphs: one launch a step, instead of hundreds that take longer than the GPU needs for their work.

A graph repeats the same kernels on the same memory. So inputs have fixed places, which a step fills in one copy, and steps are
padded to one of a few numbers of rows; a padding row is a run of no tokens, and writes to the scratch block.

Shape suffixes: T tokens, of a decode step one a sequence · E hidden · D head dim
"""

import logging
import time
from array import array
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from model_parallel.kernels.interface import AttentionPlan, LayerCache, SequenceRun
from model_parallel.model.batch import Layout, rotary_angles
from model_parallel.model.llama import Llama

logger = logging.getLogger(__name__)


class DecodeInputs:
    """Fixed memory for the inputs of a decode step of up to `num_rows` sequences, with up to `max_blocks` blocks together."""

    def __init__(self, num_rows: int, max_blocks: int, *, scratch_slot: int, frequencies: Tensor) -> None:
        device = frequencies.device
        self._num_rows = num_rows
        self._scratch_slot = scratch_slot
        self._frequencies = frequencies
        # One buffer, so that one copy fills it: token ids, positions, slots, runs, and as many blocks as a step has.
        self._numbers = torch.zeros(7 * num_rows + max_blocks, dtype=torch.int64, device=device)
        self.token_ids_T, self._positions_T, self._slots_T, runs, self._blocks = self._numbers.split(
            [num_rows, num_rows, num_rows, 4 * num_rows, max_blocks]
        )
        self._runs_T4 = runs.view(num_rows, 4)
        self.load(Layout())

    def load(self, layout: Layout) -> None:
        """Fill in a step with at most `num_rows` runs, each of one token. Pads it; `layout` must not be used afterwards."""
        padding = [(row, 0, 0, 0) for row in range(len(layout.runs), self._num_rows)]
        layout.pad_to(self._num_rows, scratch_slot=self._scratch_slot)
        runs = chain.from_iterable((*layout.runs, *padding))
        numbers = array("q", [*layout.token_ids, *layout.positions, *layout.slots, *runs, *layout.blocks])
        source = torch.frombuffer(numbers, dtype=torch.int64)
        if self._numbers.is_cuda:
            source = source.pin_memory()  # so that the copy waits its turn on the GPU, and nobody for it
        self._numbers[: len(numbers)].copy_(source, non_blocking=True)

    def plan(self) -> AttentionPlan:
        """The step as kernels want it. Computes angles from positions, so that a graph must hold this call."""
        angles_TD = rotary_angles(self._positions_T, self._frequencies)
        longest_table = self._blocks[: len(self._blocks) // self._num_rows]
        return AttentionPlan(
            slots_T=self._slots_T,
            cos_TD=angles_TD.cos(),
            sin_TD=angles_TD.sin(),
            runs=tuple(
                SequenceRun(first_row=row, num_tokens=1, start=0, block_table=longest_table)
                for row in range(self._num_rows)
            ),
            runs_S4=self._runs_T4,
            blocks=self._blocks,
        )


class DecodeGraphs:
    """The forward pass of decode steps, captured for 1, 2, 4, 8, … and max_num_seqs sequences. Ranks must make it together."""

    def __init__(
        self,
        model: Llama,
        caches: Sequence[LayerCache],
        frequencies: Tensor,
        *,
        max_num_seqs: int,
        max_model_len: int,
        num_blocks: int,
        block_size: int,
    ) -> None:
        """Compiles and captures: some seconds."""
        began_s = time.perf_counter()
        blocks_a_sequence = -(-max_model_len // block_size)
        scratch_slot = num_blocks * block_size
        _compile_prefill(model, caches, frequencies, scratch_slot=scratch_slot, scratch_block=num_blocks)
        self._pool = torch.cuda.graph_pool_handle()
        self._steps: dict[int, tuple[torch.cuda.CUDAGraph, DecodeInputs, Tensor]] = {}
        # The largest first: the others find room in its memory.
        for num_rows in reversed(padded_sizes(max_num_seqs)):
            inputs = DecodeInputs(
                num_rows, num_rows * blocks_a_sequence, scratch_slot=scratch_slot, frequencies=frequencies
            )
            self._steps[num_rows] = self._capture(model, caches, inputs)
        torch.cuda.synchronize()
        logger.info("captured decode steps of %s rows in %.1f s", sorted(self._steps), time.perf_counter() - began_s)

    def _capture(
        self, model: Llama, caches: Sequence[LayerCache], inputs: DecodeInputs
    ) -> tuple[torch.cuda.CUDAGraph, DecodeInputs, Tensor]:
        # What is compiled, loaded or allocated on first use must not be so during the capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model.forward(inputs.token_ids_T, inputs.plan(), caches)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks the device in a thread of its own, which would break off a capture of the whole process.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden_TE = model.forward(inputs.token_ids_T, inputs.plan(), caches)
        return graph, inputs, hidden_TE

    def forward(self, layout: Layout) -> Tensor:
        """As Llama.forward, for runs of one token each; the result is good until the next call."""
        assert len(layout.runs) <= max(self._steps), "the scheduler makes larger steps than the ranks were told of"
        num_rows = min(size for size in self._steps if size >= len(layout.runs))
        graph, inputs, hidden_TE = self._steps[num_rows]
        inputs.load(layout)
        graph.replay()
        return hidden_TE


def padded_sizes(max_num_seqs: int) -> list[int]:
    """Powers of two, and max_num_seqs."""
    return [*(1 << i for i in range((max_num_seqs - 1).bit_length())), max_num_seqs]


def _compile_prefill(
    model: Llama, caches: Sequence[LayerCache], frequencies: Tensor, *, scratch_slot: int, scratch_block: int
) -> None:
    """Run two tokens of a prompt into the scratch block: otherwise the first request would wait for the compiler."""
    device = frequencies.device
    angles_TD = rotary_angles(torch.zeros(2, device=device), frequencies)
    blocks = torch.tensor([scratch_block], device=device)
    plan = AttentionPlan(
        slots_T=torch.full((2,), scratch_slot, device=device),
        cos_TD=angles_TD.cos(),
        sin_TD=angles_TD.sin(),
        runs=(SequenceRun(first_row=0, num_tokens=2, start=0, block_table=blocks),),
        runs_S4=torch.tensor([[0, 2, 0, 0]], device=device),
        blocks=blocks,
    )
    model.forward(torch.zeros(2, dtype=torch.int64, device=device), plan, caches)
