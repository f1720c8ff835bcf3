"""Adapters as the native kernels read them: half panels of 16 columns, all of an adapter in one piece of memory.

Shape suffixes: R rank of an adapter, over all parts of a product · I, O features in and out · H half panels · C their 16 columns
· S steps of the product, of P inputs each
"""

import ctypes
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from model_parallel.host_memory import mapped
from model_parallel.kernels.interface import AdaptedRun, LowRankUpdate

COLUMNS = 16
_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
_ALIGNMENT = 64


class _LowRank(ctypes.Structure):
    _fields_ = (
        ("down", _POINTER),
        ("up", _POINTER),
        ("up_halves", _POINTER),
        ("num_inputs", _INT64),
        ("num_halves", _INT64),
        ("type", ctypes.c_int32),
    )


class _Run(ctypes.Structure):
    _fields_ = (("first_row", _INT64), ("num_rows", _INT64), ("products", _POINTER))


class _Step(ctypes.Structure):
    _fields_ = (("runs", _POINTER), ("num_runs", _INT64))


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter in the memory that native code reads."""

    memory: Tensor
    products: "ctypes.Array[_LowRank]"

    @property
    def num_bytes(self) -> int:
        return self.memory.nbytes


class StepAdapters:
    """Which rows of a step adapters change, at a fixed place, so that a recorded step finds the rows of each time it is run."""

    def __init__(self, max_runs: int) -> None:
        self._runs = (_Run * max_runs)()
        self._step = _Step(runs=ctypes.addressof(self._runs), num_runs=0)
        self._adapters: list[PackedAdapter] = []
        self.address = ctypes.addressof(self._step)

    def load(self, runs: Sequence[AdaptedRun]) -> None:
        """Fill in a step of at most `max_runs`."""
        self._adapters = [run.adapter for run in runs]  # they must outlive the step
        for place, run in zip(self._runs, runs, strict=False):
            place.first_row, place.num_rows = run.first_row, run.num_rows
            place.products = ctypes.addressof(run.adapter.products)
        self._step.num_runs = len(runs)


def pack(
    updates: Sequence[LowRankUpdate | None], *, gated: Collection[int], types: dict[torch.dtype, int]
) -> PackedAdapter:
    """See Kernels.pack_adapter. `types` are the native names of dtypes."""
    pieces: list[Tensor] = []
    num_bytes = 0

    def place(piece: Tensor) -> int:
        nonlocal num_bytes
        at = num_bytes
        pieces.append(piece.flatten().view(torch.uint8))
        num_bytes += -(-piece.nbytes // _ALIGNMENT) * _ALIGNMENT
        return at

    products = (_LowRank * len(updates))()
    for number, update in enumerate(updates):
        if update is None:
            continue
        down_RI, ranges = _stacked(update)
        up, halves = _up_panels(update, ranges, down_RI.dtype, is_gated=number in gated)
        products[number] = _LowRank(
            down=place(_half_panels(down_RI)),
            up=place(up),
            up_halves=place(halves),
            num_inputs=down_RI.shape[1],
            num_halves=down_RI.shape[0] // COLUMNS,
            type=types[down_RI.dtype],
        )
    memory = mapped(num_bytes + _ALIGNMENT)  # a step reads all of it, as it does all weights
    base = -memory.data_ptr() % _ALIGNMENT
    at = base
    for piece in pieces:
        memory[at : at + len(piece)] = piece
        at += -(-len(piece) // _ALIGNMENT) * _ALIGNMENT
    start = memory.data_ptr() + base
    for number, update in enumerate(updates):
        if update is not None:  # places become addresses; a place can be 0, which ctypes shows as None
            product = products[number]
            for name in ("down", "up", "up_halves"):
                setattr(product, name, start + (getattr(product, name) or 0))
    return PackedAdapter(memory, products)


def _stacked(update: LowRankUpdate) -> tuple[Tensor, list[range]]:
    """`down` of all parts one below the other, each from an even row on, zero up to a multiple of 16; and the rows of each."""
    ranges, downs, first = [], [], 0
    for part in update.parts:
        rank = part.down_RI.shape[0]
        ranges.append(range(first, first + rank + rank % 2))
        downs.append(F.pad(part.down_RI, (0, 0, 0, rank % 2)))
        first = ranges[-1].stop
    downs.append(update.parts[0].down_RI.new_zeros(-first % COLUMNS, update.parts[0].down_RI.shape[1]))
    return torch.cat(downs), ranges


def _half_panels(weight_OI: Tensor) -> Tensor:
    """[H, S, C, P], of a matrix whose rows are a multiple of 16."""
    pair = 4 // weight_OI.element_size()
    weight_OI = F.pad(weight_OI, (0, -weight_OI.shape[1] % pair))
    return weight_OI.view(-1, COLUMNS, weight_OI.shape[1] // pair, pair).permute(0, 2, 1, 3).contiguous()


def _up_panels(
    update: LowRankUpdate, ranges: Sequence[range], dtype: torch.dtype, *, is_gated: bool
) -> tuple[Tensor, Tensor]:
    """Half panels of `up`, each with the inputs alone that it needs; and of each place, first input and number of inputs.

    They lie in the order of the product's own panels: of a gated one 16 columns of the gate, then the same of up.
    """
    pieces: list[Tensor] = []
    table: list[tuple[int, int, int]] = []
    num_bytes = 0
    num_columns = update.num_outputs // 2 if is_gated else update.num_outputs
    for first_column in (0, num_columns) if is_gated else (0,):
        num_halves = -(-num_columns // COLUMNS)
        needed = [
            _inputs_of(update, ranges, first_column + h * COLUMNS, first_column + num_columns)
            for h in range(num_halves)
        ]
        first_half = 0
        for inputs, same in groupby(needed):
            count = len(list(same))
            first_half += count
            if not inputs:
                table += [(0, 0, 0)] * count
                continue
            first = first_column + (first_half - count) * COLUMNS
            outputs = range(first, first + count * COLUMNS)
            piece = _half_panels(_block(update, ranges, outputs, inputs, first_column + num_columns, dtype))
            stride = piece.nbytes // count
            table += [(num_bytes + i * stride, inputs.start, len(inputs)) for i in range(count)]
            pieces.append(piece.flatten())
            num_bytes += piece.nbytes
    if is_gated:
        gate, up = table[: len(table) // 2], table[len(table) // 2 :]
        table = [half for pair in zip(gate, up, strict=True) for half in pair]
    elif len(table) % 2:
        table.append((0, 0, 0))
    return torch.cat(pieces), torch.tensor(table, dtype=torch.int64)


def _inputs_of(update: LowRankUpdate, ranges: Sequence[range], first_output: int, stop: int) -> range:
    """Inputs that 16 outputs need; those of all parts that they touch."""
    last = min(first_output + COLUMNS, stop)
    touched = list(_touched(update, ranges, first_output, last))
    return range(min(r.start for r in touched), max(r.stop for r in touched)) if touched else range(0)


def _touched(update: LowRankUpdate, ranges: Sequence[range], first: int, last: int) -> Iterator[range]:
    for part, inputs in zip(update.parts, ranges, strict=True):
        if part.first_output < last and first < part.last_output:
            yield inputs


def _block(
    update: LowRankUpdate, ranges: Sequence[range], outputs: range, inputs: range, stop: int, dtype: torch.dtype
) -> Tensor:
    """Rows `outputs` and columns `inputs` of the matrix that takes all of h to all outputs; zero from `stop` on."""
    block_OR = torch.zeros((len(outputs), len(inputs)), dtype=dtype)
    for part, of_part in zip(update.parts, ranges, strict=True):
        first, last = max(part.first_output, outputs.start), min(part.last_output, outputs.stop, stop)
        if first < last and of_part.start >= inputs.start and of_part.stop <= inputs.stop:
            rows = part.up_OR[first - part.first_output : last - part.first_output]
            at = of_part.start - inputs.start
            block_OR[first - outputs.start : last - outputs.start, at : at + rows.shape[1]] = rows
    return block_OR
