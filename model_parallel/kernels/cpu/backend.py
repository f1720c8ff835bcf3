"""Kernels by native calls; see operations.h for the layouts and the structures that are mirrored here.

Shape suffixes: those of kernels/interface.py
"""

import ctypes
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from model_parallel.host_memory import empty_shard
from model_parallel.kernels.cpu import low_rank
from model_parallel.kernels.cpu.low_rank import StepAdapters
from model_parallel.kernels.cpu.recording import Program, Workspace
from model_parallel.kernels.interface import (
    Adapted,
    AdaptedRun,
    AttentionPlan,
    Fp8Matrix,
    GroupMatrix,
    Heads,
    Int8Matrix,
    LayerCache,
    LowRankUpdate,
    Matrix,
)
from model_parallel.kernels.randomness import best_draws
from model_parallel.kernels.softmax import normalisers
from model_parallel.native import CPU_KERNELS, CPU_OPERATIONS, chosen_instruction_set, load_library

ARENA_BYTES = 64 << 20
TYPES = {torch.float32: 0, torch.bfloat16: 1}
_WEIGHT_TYPES = TYPES | {torch.int8: 2, torch.float16: 3}
_GROUPS = 4
PANEL = 32
"""Columns of a panel."""
_MOST_DRAWS = 7
_GROUP_KINDS = ("fixed_zero", "zeros", "minimums", "scale_codes", "minimum_codes")

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "has_isa": (ctypes.c_int, [ctypes.c_char_p]),
    "create": (_POINTER, [ctypes.c_int, _POINTER]),
    "destroy": (None, [_POINTER]),
    "num_done": (_INT64, [_POINTER]),
    "packed_bytes": (_INT64, [_POINTER]),
    "pack": (None, [_POINTER] * 5),
    "pack_groups": (None, [_POINTER] * 4),
    "embed_packed": (None, [_POINTER, _POINTER, _INT64, _POINTER, _INT64, _POINTER]),
    "embed": (None, [_POINTER, _POINTER, _INT64, _POINTER, ctypes.c_int, _INT64, _INT64, _INT64, _POINTER]),
    "product": (
        None,
        [_POINTER, _POINTER, _POINTER, ctypes.c_int, _INT64, _POINTER, ctypes.c_int, _INT64, _INT64, _POINTER, _INT64],
    ),
    "norm": (None, [_POINTER] * 4 + [ctypes.c_int, _INT64, _INT64, ctypes.c_float, _POINTER]),
    "softmax_parts": (None, [_POINTER, _POINTER, _INT64, _INT64, _POINTER]),
    "draws": (None, [_POINTER, _POINTER, _INT64]),
    "attention": (None, [_POINTER, _POINTER, _INT64, _POINTER, _INT64]),
    "begin_recording": (_POINTER, [_POINTER]),
    "end_recording": (None, [_POINTER]),
    "record_all_reduce": (None, [_POINTER] * 3 + [ctypes.c_int32] * 2 + [_INT64, _POINTER, _INT64]),
    "replay": (ctypes.c_int32, [_POINTER, _POINTER]),
    "num_calls": (_INT64, [_POINTER]),
    "forget": (None, [_POINTER]),
}


class _GroupFormat(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("bits", "kind", "scale_type", "zero")),
        *((name, _INT64) for name in ("group_size", "num_groups", "groups_per_span")),
    )


class _GroupMatrix(ctypes.Structure):
    _fields_ = tuple(
        (name, _POINTER)
        for name in ("values_OB", "scales_OS", "minimums_OS", "zeros_OS", "scale_codes_OG", "minimum_codes_OG")
    )


class _Linear(ctypes.Structure):
    _fields_ = (
        ("panels", _POINTER),
        ("num_inputs", _INT64),
        ("num_outputs", _INT64),
        ("type", ctypes.c_int32),
        ("gated", ctypes.c_int32),
        ("groups", _GroupFormat),
        ("num_before", _INT64),
        ("order", _POINTER),
    )


class _Draw(ctypes.Structure):
    _fields_ = (
        ("values", _POINTER),
        ("forbidden", _POINTER),
        ("is_double", ctypes.c_bool),
        ("temperature", ctypes.c_double),
        ("key", _INT64),
        ("num_values", _INT64),
        ("first_id", _INT64),
        ("found", _POINTER),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        *(
            (name, _POINTER)
            for name in ("qkv", "out", "keys", "values", "cos", "sin", "slots", "blocks", "kv_of_query")
        ),
        ("type", ctypes.c_int32),
        *((name, _INT64) for name in ("num_query_heads", "num_kv_heads", "head_dim", "block_size")),
    )


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """Panels of a weight, and how the native side knows them."""

    panels: Tensor
    linear: _Linear
    address: int
    """Of `linear`."""
    order_P: Tensor | None = None
    """What `linear` refers to."""


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Several weights for the same inputs: outputs of all of them, one after another."""

    weights: tuple[PackedWeight, ...]
    num_outputs: int


def _rows(weights: tuple[PackedWeight, ...]) -> PackedRows:
    return PackedRows(weights, sum(weight.linear.num_outputs for weight in weights))


def load_native() -> ctypes.CDLL:
    """The library with its signatures declared. Raises NativeBuildError."""
    library = load_library(CPU_KERNELS)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, f"packtrain_{name}")
        function.restype, function.argtypes = result, arguments
    return library


class Arena:
    """Memory for what decode reads: packed weights, one after another in the order in which they are read, and the cache.

    It lies on huge pages where they can be had, so that its addresses are translated quickly.
    """

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        padded = -(-num_bytes // 64) * 64
        if padded > len(self._rest):
            self._rest = empty_shard((max(padded, ARENA_BYTES),), torch.uint8, torch.device("cpu"))
        panels, self._rest = self._rest[:num_bytes], self._rest[padded:]
        return panels


class CpuKernels:
    """See kernels/interface.py. For one caller at a time, and for float32 and bfloat16."""

    batch_invariant = True
    row_multiple = 1
    adapted_multiple = PANEL
    has_threads = True
    only_enqueue = False
    is_compiling = False

    def __init__(self, *, num_threads: int, isa: str = "") -> None:
        """isa: of native.INSTRUCTION_SETS; unless given that of PACKTRAIN_CPU_ISA, or else the best that the machine has.
        Machines that are to agree to the last bit need the same.

        Raises NativeBuildError, and EngineError when the machine lacks the instruction set.
        """
        self._library = load_native()
        isa = chosen_instruction_set(self._library, isa)
        operations = load_library(CPU_OPERATIONS[isa]).packtrain_operations
        operations.restype = _POINTER
        self._handle = ctypes.c_void_p(self._library.packtrain_create(num_threads, operations()))
        weakref.finalize(self, self._library.packtrain_destroy, self._handle)
        self.name = f"cpu-{isa}"
        self._arena = Arena()
        self._workspace: Workspace | None = None
        self._plan: AttentionPlan | None = None
        self._attention = _Attention()

    @property
    def num_done(self) -> int:
        return int(self._library.packtrain_num_done(self._handle))

    def pack_linear(self, weight_OI: Matrix | tuple[Matrix, ...]) -> PackedRows:
        parts = weight_OI if isinstance(weight_OI, tuple) else (weight_OI,)
        return _rows(tuple(self._pack(part, gated=False) for part in parts))

    def pack_gated(self, gate_up_F2I: Matrix) -> PackedRows:
        return _rows((self._pack(gate_up_F2I, gated=True),))

    def pack_head(self, weight_VE: Matrix) -> PackedRows:
        return _rows((self._pack(weight_VE, gated=False),))

    def _pack(self, weight_OI: Matrix, *, gated: bool) -> PackedWeight:
        if isinstance(weight_OI, GroupMatrix):
            return self._pack_groups(weight_OI, gated=gated)
        assert not isinstance(weight_OI, Fp8Matrix), "ranks on CPUs refuse fp8"
        if isinstance(weight_OI, Int8Matrix):
            values_OI, scales_O = weight_OI.values_OI.contiguous(), weight_OI.scales_O.contiguous()
        else:
            values_OI, scales_O = weight_OI.contiguous(), None
        num_rows, num_inputs = values_OI.shape
        num_outputs = num_rows // 2 if gated else num_rows
        linear = _Linear(
            num_inputs=num_inputs, num_outputs=num_outputs, type=_WEIGHT_TYPES[values_OI.dtype], gated=gated
        )
        panels, address = self._panels(linear)
        scales = None if scales_O is None else scales_O.data_ptr()
        self._library.packtrain_pack(self._handle, values_OI.data_ptr(), scales, address, panels.data_ptr())
        return PackedWeight(panels, linear, address)

    def _pack_groups(self, matrix: GroupMatrix, *, gated: bool) -> PackedWeight:
        form = matrix.format
        groups = _GroupFormat(
            bits=form.bits,
            kind=_GROUP_KINDS.index(form.kind),
            scale_type=_WEIGHT_TYPES[matrix.scales_OS.dtype],
            zero=form.zero,
            group_size=form.group_size,
            num_groups=matrix.num_groups,
            groups_per_span=form.groups_per_span,
        )
        order_P = None if matrix.order_P is None else matrix.order_P.to(torch.int32).contiguous()
        linear = _Linear(
            num_inputs=matrix.num_inputs,
            num_outputs=matrix.num_outputs // 2 if gated else matrix.num_outputs,
            type=_GROUPS,
            gated=gated,
            groups=groups,
            num_before=matrix.num_before,
            order=None if order_P is None else order_P.data_ptr(),
        )
        panels, address = self._panels(linear)
        parts = {name: part.contiguous() for name, part in matrix.parts.items()}
        source = _GroupMatrix(**{name: part.data_ptr() for name, part in parts.items()})
        self._library.packtrain_pack_groups(self._handle, ctypes.addressof(source), address, panels.data_ptr())
        return PackedWeight(panels, linear, address, order_P)

    def _panels(self, linear: _Linear) -> tuple[Tensor, int]:
        """Memory for a weight, which `linear` then refers to; and the address of `linear`."""
        address = ctypes.addressof(linear)
        panels = self._arena.take(self._library.packtrain_packed_bytes(address))
        linear.panels = panels.data_ptr()
        return panels, address

    def allocate_cache(
        self, *, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> LayerCache:
        part = block_size * head_dim
        num_elements = (num_blocks + 1) * num_kv_heads * 2 * part
        cache = self._arena.take(num_elements * dtype.itemsize).zero_().view(dtype)
        keys, values = cache.view(num_blocks + 1, num_kv_heads, 2, part).unbind(2)
        pair = 4 // dtype.itemsize
        return LayerCache(
            keys.unflatten(2, (head_dim // pair, block_size, pair)), values.unflatten(2, (block_size, head_dim))
        )

    @contextmanager
    def recording(self, workspace: Workspace) -> Iterator[Program]:
        """Operations inside are carried out and become part of the program, with their results in `workspace`.

        Nothing else may be computed in between from those results: a program repeats native calls alone.
        """
        program = Program(self._library, self._library.packtrain_begin_recording(self._handle), workspace)
        self._workspace = workspace
        try:
            yield program
        finally:
            self._workspace = None
            self._library.packtrain_end_recording(self._handle)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype) if self._workspace is None else self._workspace.empty(shape, dtype)

    def embed(self, token_ids_T: Tensor, weight: Tensor | PackedRows, first_id: int) -> Tensor:
        num_rows = len(token_ids_T)
        if isinstance(weight, PackedRows):
            (packed,) = weight.weights
            out_TE = self._empty((num_rows, packed.linear.num_inputs), torch.float32)
            self._library.packtrain_embed_packed(
                self._handle, token_ids_T.data_ptr(), num_rows, packed.address, first_id, out_TE.data_ptr()
            )
            return out_TE
        num_held, num_columns = weight.shape
        out_TE = self._empty((num_rows, num_columns), torch.float32)
        self._library.packtrain_embed(
            self._handle,
            token_ids_T.data_ptr(),
            num_rows,
            weight.data_ptr(),
            TYPES[weight.dtype],
            first_id,
            num_held,
            num_columns,
            out_TE.data_ptr(),
        )
        return out_TE

    def pack_adapter(
        self, updates: Sequence[LowRankUpdate | None], *, gated: Collection[int]
    ) -> low_rank.PackedAdapter:
        return low_rank.pack(updates, gated=gated, types=TYPES)

    def adapted_rows(self, runs: Sequence[AdaptedRun]) -> StepAdapters:
        rows = StepAdapters(len(runs))
        rows.load(runs)
        return rows

    def linear(self, x_TI: Tensor, weight: PackedRows, adapted: Adapted | None = None) -> Tensor:
        return self._product(x_TI, weight, x_TI.dtype, adapted)

    def partial_sum(self, x_TI: Tensor, weight: PackedRows, adapted: Adapted | None = None) -> Tensor:
        return self._product(x_TI, weight, torch.float32, adapted)

    def gated_linear(self, x_TI: Tensor, weight: PackedRows, adapted: Adapted | None = None) -> Tensor:
        return self._product(x_TI, weight, x_TI.dtype, adapted)

    def logits(self, x_RE: Tensor, head: PackedRows) -> Tensor:
        return self._product(x_RE, head, torch.float32)

    def _product(self, x_TI: Tensor, rows: PackedRows, dtype: torch.dtype, adapted: Adapted | None = None) -> Tensor:
        x_TI = x_TI.contiguous()
        num_rows = x_TI.shape[0]
        out_TO = self._empty((num_rows, rows.num_outputs), dtype)
        first_output = 0
        for weight in rows.weights:
            self._library.packtrain_product(
                self._handle,
                weight.address,
                x_TI.data_ptr(),
                TYPES[x_TI.dtype],
                num_rows,
                out_TO.data_ptr() + first_output * dtype.itemsize,
                TYPES[dtype],
                rows.num_outputs,
                first_output,
                None if adapted is None else adapted.rows.address,
                0 if adapted is None else adapted.product,
            )
            first_output += weight.linear.num_outputs
        return out_TO

    def softmax_parts(self, logits_RV: Tensor) -> Tensor:
        logits_RV = logits_RV.contiguous()
        num_rows, num_columns = logits_RV.shape
        parts_R3 = self._empty((num_rows, 3), torch.float64)
        self._library.packtrain_softmax_parts(
            self._handle, logits_RV.data_ptr(), num_rows, num_columns, parts_R3.data_ptr()
        )
        return parts_R3

    normalisers = staticmethod(normalisers)

    def best_draws(
        self,
        values_RV: Tensor,
        rows: Sequence[int],
        temperatures: Sequence[float],
        keys: Sequence[int],
        first_id: int,
        forbidden: Sequence[Tensor | None],
    ) -> Tensor:
        if not values_RV.shape[1]:
            raise ValueError("no token can be drawn of none")  # the library would read beyond the row
        values_RV = values_RV.contiguous()
        found_RX = torch.empty((len(rows), 1 + _MOST_DRAWS), dtype=torch.int64)
        row_bytes = values_RV.shape[1] * values_RV.element_size()
        draws = (_Draw * len(rows))(
            *(
                _Draw(
                    values=values_RV.data_ptr() + row * row_bytes,
                    forbidden=None if mask is None else mask.data_ptr(),
                    is_double=values_RV.dtype == torch.float64,
                    temperature=temperature,
                    key=key,
                    num_values=values_RV.shape[1],
                    first_id=first_id,
                    found=found_X.data_ptr(),
                )
                for row, temperature, key, mask, found_X in zip(
                    rows, temperatures, keys, forbidden, found_RX, strict=True
                )
            )
        )
        self._library.packtrain_draws(self._handle, ctypes.addressof(draws), len(rows))
        place_R = found_RX[:, 1].clone()
        # Several within rounding, or a row that is not finite.
        for i in (found_RX[:, 0] != 1).nonzero().flatten().tolist():
            one = slice(i, i + 1)
            alone_R = best_draws(values_RV, rows[one], temperatures[one], keys[one], first_id, forbidden[one])
            place_R[i] = alone_R[0]
        return place_R

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        return self._norm(x_TE, None, weight_E, eps)

    def add_rms_norm(self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual_TE = residual_TE.contiguous()
        return self._norm(x_TE, residual_TE, weight_E, eps), residual_TE

    def _norm(self, x_TE: Tensor, residual_TE: Tensor | None, weight_E: Tensor, eps: float) -> Tensor:
        x_TE = x_TE.contiguous()
        num_rows, num_columns = x_TE.shape
        out_TE = self._empty((num_rows, num_columns), weight_E.dtype)
        self._library.packtrain_norm(
            self._handle,
            x_TE.data_ptr(),
            None if residual_TE is None else residual_TE.data_ptr(),
            weight_E.data_ptr(),
            TYPES[weight_E.dtype],
            num_rows,
            num_columns,
            eps,
            out_TE.data_ptr(),
        )
        return out_TE

    def attention(self, qkv_TX: Tensor, plan: AttentionPlan, cache: LayerCache, heads: Heads) -> Tensor:
        job = self._attention
        if plan is not self._plan:  # what is the same for all layers of a step
            self._plan = plan
            job.cos, job.sin = plan.cos_TD.data_ptr(), plan.sin_TD.data_ptr()
            job.slots, job.blocks = plan.slots_T.data_ptr(), plan.blocks.data_ptr()
            job.kv_of_query = heads.kv_of_query_H.data_ptr()
            job.num_query_heads, job.num_kv_heads = heads.num_query_heads, heads.num_kv_heads
            job.head_dim, job.block_size = heads.head_dim, cache.values.shape[2]
            job.type = TYPES[qkv_TX.dtype]
        out_TX = self._empty((qkv_TX.shape[0], heads.num_query_heads * heads.head_dim), qkv_TX.dtype)
        qkv_TX = qkv_TX.contiguous()
        job.qkv, job.out = qkv_TX.data_ptr(), out_TX.data_ptr()
        job.keys, job.values = cache.keys.data_ptr(), cache.values.data_ptr()
        self._library.packtrain_attention(
            self._handle, ctypes.addressof(job), qkv_TX.shape[0], plan.runs_S4.data_ptr(), plan.runs_S4.shape[0]
        )
        return out_TX
