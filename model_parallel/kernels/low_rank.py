"""What adapters add to products, in torch operations on any device.

Shape suffixes: T tokens of a step · P rows of one product, padded · I, O features in and out · R rank of an adapter
"""

from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from model_parallel.kernels.interface import Adapted, AdaptedRun, LowRankUpdate

ROWS = 32
"""Of every product: libraries compute in another order for another number of rows, so there is one number."""
Runs = Sequence[AdaptedRun]
"""Their adapters are updates by product."""


def add_low_rank(out_TO: Tensor, x_TI: Tensor, adapted: Adapted) -> Tensor:
    """`out_TO`, of float32, with what adapters add to its rows. Changes it in place."""
    runs: Runs = adapted.rows
    for run in runs:
        update: LowRankUpdate | None = run.adapter[adapted.product]
        if update is None:
            continue
        last_row = run.first_row + run.num_rows
        for first in range(run.first_row, last_row, ROWS):
            rows = slice(first, min(first + ROWS, last_row))
            x_PI = F.pad(x_TI[rows].float(), (0, 0, 0, first + ROWS - rows.stop))
            for part in update.parts:
                delta_PO = F.linear(F.linear(x_PI, part.down_RI.float()), part.up_OR.float())
                out_TO[rows, part.first_output : part.last_output] += delta_PO[: rows.stop - first]
    return out_TO


def on_device(updates: Sequence[LowRankUpdate | None], device: str) -> tuple[LowRankUpdate | None, ...]:
    """The same, where products are computed."""
    return tuple(None if update is None else _moved(update, device) for update in updates)


def _moved(update: LowRankUpdate, device: str) -> LowRankUpdate:
    parts = tuple(replace(p, down_RI=p.down_RI.to(device), up_OR=p.up_OR.to(device)) for p in update.parts)
    return replace(update, parts=parts)
