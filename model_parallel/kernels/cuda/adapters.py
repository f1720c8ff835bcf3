"""Adapters on a GPU: their weights, and the tables by which low_rank.py's kernels find them.

Shape suffixes: T tokens of a step · I, O features in and out · P products of the model · N numbers of an entry · A runs of rows
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from model_parallel.kernels.cuda.low_rank import ENTRY_SIZE, PART_SIZE, expand_kernel, shrink_kernel
from model_parallel.kernels.interface import Adapted, AdaptedRun, LowRankUpdate

MAX_PARTS = 3
"""Of a product: query, key and value."""
NUM_ROWS = 16
"""Of a tile, and of every dot."""


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter on the GPU."""

    weights: tuple[Tensor, ...]
    """What the table's addresses are of."""
    table_PN: Tensor
    """int64; see low_rank.ENTRY_SIZE."""
    num_ranks: tuple[int, ...]
    """Of each product, all parts together; 0 where the adapter adds nothing."""
    num_outputs: tuple[int, ...]
    """Of the largest part of each product."""


@dataclass(frozen=True, slots=True)
class AdaptedRows:
    """Rows of a step that adapters change."""

    tiles: Tensor
    """int64 [tiles, 3]: first row, rows, run."""
    tables_PAN: Tensor
    num_ranks: tuple[int, ...]
    """The most of any adapter, by product."""
    num_outputs: tuple[int, ...]
    adapters: tuple[PackedAdapter, ...]


def pack(updates: Sequence[LowRankUpdate | None], device: str) -> PackedAdapter:
    """See Kernels.pack_adapter."""
    weights: list[Tensor] = []
    rows: list[list[int]] = []
    num_ranks, num_outputs = [], []
    for update in updates:
        parts = () if update is None else update.parts
        ranks = [part.down_RI.shape[0] for part in parts]
        row = [0, 0]
        if parts:
            weights.append(torch.cat([part.down_RI for part in parts]).contiguous().to(device))
            row = [weights[-1].data_ptr(), sum(ranks)]
        for index, part in enumerate(parts):
            weights.append(part.up_OR.contiguous().to(device))
            row += [weights[-1].data_ptr(), sum(ranks[:index]), ranks[index], part.first_output, part.up_OR.shape[0]]
        rows.append(row + [0] * (ENTRY_SIZE - len(row)))
        num_ranks.append(sum(ranks))
        num_outputs.append(max((part.up_OR.shape[0] for part in parts), default=0))
    table_PN = torch.tensor(rows, dtype=torch.int64, device=device)
    return PackedAdapter(tuple(weights), table_PN, tuple(num_ranks), tuple(num_outputs))


def rows_of(runs: Sequence[AdaptedRun], device: str) -> AdaptedRows:
    """See Kernels.adapted_rows."""
    tiles = [
        (first, min(NUM_ROWS, run.first_row + run.num_rows - first), index)
        for index, run in enumerate(runs)
        for first in range(run.first_row, run.first_row + run.num_rows, NUM_ROWS)
    ]
    adapters: tuple[PackedAdapter, ...] = tuple(run.adapter for run in runs)
    return AdaptedRows(
        tiles=torch.tensor(tiles, dtype=torch.int64, device=device),
        tables_PAN=torch.stack([adapter.table_PN for adapter in adapters], dim=1),
        num_ranks=tuple(map(max, zip(*(adapter.num_ranks for adapter in adapters), strict=True))),
        num_outputs=tuple(map(max, zip(*(adapter.num_outputs for adapter in adapters), strict=True))),
        adapters=adapters,
    )


def add_low_rank(out_TO: Tensor, x_TI: Tensor, adapted: Adapted) -> Tensor:
    """`out_TO`, contiguous and of float32, with what adapters add to its rows. Changes it in place."""
    rows: AdaptedRows = adapted.rows
    num_ranks, num_outputs = rows.num_ranks[adapted.product], rows.num_outputs[adapted.product]
    if not num_ranks:
        return out_TO
    x_TI, table, num_tiles = x_TI.contiguous(), rows.tables_PAN[adapted.product], len(rows.tiles)
    h = torch.empty((x_TI.shape[0], num_ranks), dtype=torch.float32, device=x_TI.device)
    shrink_kernel[(num_tiles, triton.cdiv(num_ranks, 16))](
        x_TI,
        rows.tiles,
        table,
        h,
        x_TI.shape[1],
        num_ranks,
        ENTRY_SIZE=ENTRY_SIZE,
        NUM_ROWS=NUM_ROWS,
        NUM_RANKS=16,
        NUM_INPUTS=64 if x_TI.dtype == torch.float32 else 128,
    )
    expand_kernel[(num_tiles, MAX_PARTS, triton.cdiv(num_outputs, 64))](
        h,
        rows.tiles,
        table,
        out_TO,
        x_TI,
        num_ranks,
        out_TO.shape[1],
        ENTRY_SIZE=ENTRY_SIZE,
        PART_SIZE=PART_SIZE,
        NUM_ROWS=NUM_ROWS,
        NUM_RANKS=16,
        NUM_OUTPUTS=64,
    )
    return out_TO
