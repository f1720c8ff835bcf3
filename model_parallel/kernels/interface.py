"""The operations that the model is written in. A backend implements all of them; the model code never asks which.

Shape suffixes: T tokens of a step · I, O features in and out · E hidden · F local feed-forward columns · H local query heads
· K local key/value heads · D head dim · S runs · R rows that logits are wanted for · V local vocabulary rows
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from model_parallel.weight_format import GroupFormat

Weight = Any
"""A weight in the form that a backend packed it into, at load; only that backend looks inside."""


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """A matrix in eight bits a weight: about scales_O[o] · values_OI[o] in row o."""

    values_OI: Tensor
    """int8."""
    scales_O: Tensor
    """float32."""


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """A matrix in eight bits a weight: about scales_O[o] · values_OI[o] in row o."""

    values_OI: Tensor
    """float8_e4m3fn."""
    scales_O: Tensor
    """float32."""

    @property
    def num_outputs(self) -> int:
        return self.values_OI.shape[0]

    def to(self, device: torch.device) -> "Fp8Matrix":
        return Fp8Matrix(self.values_OI.to(device), self.scales_O.to(device))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[O, I]: the matrix that it stands for, computed in float64 and then rounded once."""
        return (self.values_OI.double() * self.scales_O.double().unsqueeze(1)).to(dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupMatrix:
    """A matrix in 4 or 8 bits a weight, with scales of groups of neighbouring inputs. See GroupFormat for the arithmetic.

    Shape suffixes: O outputs · P inputs of all groups · S spans · G groups
    """

    format: GroupFormat
    num_inputs: int
    """Of x. They may be fewer than P: a rank's cut need not fall on spans."""
    num_before: int = 0
    """Inputs of the first span that x does not have."""
    order_P: Tensor | None = None
    """int32: where in x each input is, −1: nowhere. None: one after another, from num_before on."""
    values_OB: Tensor
    """uint8 [O, P / 2], two numbers a byte, the first in the lower bits; or int8 [O, P]."""
    scales_OS: Tensor
    """Of format.scale_type."""
    minimums_OS: Tensor | None = None
    """For the kinds "minimums" and "minimum_codes", of the same type."""
    zeros_OS: Tensor | None = None
    """uint8, for the kind "zeros"."""
    scale_codes_OG: Tensor | None = None
    """int8 for the kind "scale_codes", uint8 for "minimum_codes"."""
    minimum_codes_OG: Tensor | None = None
    """uint8, for "minimum_codes"."""

    def __post_init__(self) -> None:
        assert self.num_before == 0 or self.order_P is None
        assert self.num_before + self.num_inputs <= self.num_stored_inputs or self.order_P is not None

    @property
    def num_outputs(self) -> int:
        return self.values_OB.shape[0]

    @property
    def num_groups(self) -> int:
        return self.scales_OS.shape[1] * self.format.groups_per_span

    @property
    def num_stored_inputs(self) -> int:
        """P."""
        return self.num_groups * self.format.group_size

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors that have a row for each output, by their names."""
        names = ("values_OB", "scales_OS", "minimums_OS", "zeros_OS", "scale_codes_OG", "minimum_codes_OG")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def matches(self, other: "GroupMatrix") -> bool:
        """Whether the two can be one matrix, output after output."""
        same_inputs = (self.num_inputs, self.num_before) == (other.num_inputs, other.num_before)
        orders = (self.order_P, other.order_P)
        same_order = all(o is None for o in orders) or (all(o is not None for o in orders) and torch.equal(*orders))  # type: ignore[arg-type]
        return self.format == other.format and same_inputs and same_order

    def to(self, device: torch.device) -> "GroupMatrix":
        order_P = None if self.order_P is None else self.order_P.to(device)
        return replace(self, order_P=order_P, **_parts({name: part.to(device) for name, part in self.parts.items()}))

    def rows(self, index: Tensor | slice) -> "GroupMatrix":
        """The matrix of some of the outputs."""
        return replace(self, **_parts({name: part[index] for name, part in self.parts.items()}))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[O, num_inputs]: the matrix that it stands for, computed in float64 and then rounded once."""
        form = self.format
        values_OP = self.values_OB
        if form.bits == 4:
            values_OP = torch.stack((self.values_OB & 15, self.values_OB >> 4), dim=2).flatten(1)
        values_OGN = values_OP.unflatten(1, (self.num_groups, form.group_size)).double()
        scales_OG = self.scales_OS.double().repeat_interleave(form.groups_per_span, dim=1)
        minimums_OG: Tensor | float
        if form.kind in ("scale_codes", "minimum_codes"):
            assert self.scale_codes_OG is not None
            scales_OG = scales_OG * self.scale_codes_OG
        match form.kind:
            case "minimums" | "minimum_codes":
                assert self.minimums_OS is not None
                minimums_OG = self.minimums_OS.double().repeat_interleave(form.groups_per_span, dim=1)
                if self.minimum_codes_OG is not None:
                    minimums_OG = minimums_OG * self.minimum_codes_OG
            case "zeros":
                assert self.zeros_OS is not None
                minimums_OG = scales_OG * (self.zeros_OS.double() + form.zero)
            case _:
                minimums_OG = scales_OG * form.zero
        weight_OP: Tensor = (values_OGN * scales_OG.unsqueeze(2) - minimums_OG.unsqueeze(2)).flatten(1)
        if self.order_P is None:
            return weight_OP[:, self.num_before : self.num_before + self.num_inputs].to(dtype)
        there_P = self.order_P >= 0
        weight_OI = weight_OP.new_zeros(self.num_outputs, self.num_inputs)
        weight_OI[:, self.order_P[there_P].long()] = weight_OP[:, there_P]
        return weight_OI.to(dtype)


Matrix = Tensor | Int8Matrix | Fp8Matrix | GroupMatrix
"""A weight as it is loaded, for a backend to pack."""


def joined(matrices: Sequence[GroupMatrix]) -> GroupMatrix:
    """Outputs of all of them, one after another; each must match the first."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    return replace(first, **_parts({name: torch.cat([m.parts[name] for m in matrices]) for name in first.parts}))


def _parts(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """For `replace`."""
    return dict(tensors)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's paged KV cache on one rank, laid out as the backend likes.

    The last block is scratch: padding tokens are written there, nobody reads it.
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """The attention heads of one rank."""

    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    kv_of_query_H: Tensor
    """int64: the local key/value head that each local query head reads; any map."""
    queries_of_kv_KG: Tensor = field(init=False)
    """int64, the same map from the other end: the query heads that read each key/value head, and −1 in places that are left.

    G is a power of two.
    """

    def __post_init__(self) -> None:
        readers = [(self.kv_of_query_H == kv).nonzero().flatten() for kv in range(self.num_kv_heads)]
        longest = max(len(queries) for queries in readers)
        table_KG = self.kv_of_query_H.new_full((self.num_kv_heads, 1 << (longest - 1).bit_length()), -1)
        for row_G, queries in zip(table_KG, readers, strict=True):
            row_G[: len(queries)] = queries
        object.__setattr__(self, "queries_of_kv_KG", table_KG)


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRun:
    """A run of one sequence's tokens in a step."""

    first_row: int
    """Its first row among the step's tokens."""
    num_tokens: int
    start: int
    """Position of its first token. Token i attends to positions 0 … start + i."""
    block_table: Tensor
    """int64, block ids in sequence order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """How a step's rows lie in the cache. Rows past the last run are padding."""

    slots_T: Tensor
    """int64, block id × block size + offset: where each token's key and value go."""
    cos_TD: Tensor
    """float32, cosine of the rotary angles at each token's position; the two halves of D are equal."""
    sin_TD: Tensor
    runs: tuple[SequenceRun, ...]
    runs_S4: Tensor
    """int64, the same runs as numbers: first row, number of tokens, start, index in `blocks` of the block table."""
    blocks: Tensor
    """int64, the block tables of all runs one after another."""


@dataclass(frozen=True, slots=True)
class LowRankPart:
    """One module's part of what an adapter adds to a product: x · downᵀ · upᵀ, to the outputs from `first_output` on.

    R is the rank of the adapter.
    """

    first_output: int
    down_RI: Tensor
    up_OR: Tensor
    """With the adapter's scale in it."""

    @property
    def last_output(self) -> int:
        """The first one that is no output of it any more."""
        return self.first_output + self.up_OR.shape[0]


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """What an adapter adds to one product on this rank."""

    num_outputs: int
    """Rows of the matrix; of a gated one 2F: gate rows, then up rows."""
    parts: tuple[LowRankPart, ...]
    """In the order of their outputs, which do not overlap."""


PackedAdapter = Any
"""All updates of an adapter in the form that a backend packed them into; only that backend looks inside."""


@dataclass(frozen=True, slots=True)
class AdaptedRun:
    """Rows of a step one after another that one adapter changes."""

    first_row: int
    num_rows: int
    adapter: PackedAdapter


@dataclass(frozen=True, slots=True)
class Adapted:
    """One product of a step whose rows adapters change."""

    rows: Any
    """Which rows; what `Kernels.adapted_rows` made."""
    product: int
    """Which product of the model it is: the place of its update in what `pack_adapter` was given."""


class Kernels(Protocol):
    """A backend. Rows are independent: what a row holds never depends on the other rows, if `batch_invariant`."""

    name: str
    batch_invariant: bool
    """Whether a row's bits are the same whatever else is in the step, once rows are padded to `row_multiple`."""
    row_multiple: int
    """Steps are padded to a multiple of this many rows."""
    adapted_multiple: int
    """Where adapters change a product of several matrices, each of them must begin at a multiple of so many outputs."""
    has_threads: bool
    """Whether it computes on threads of its own, so that torch's should rest."""
    only_enqueue: bool
    """Whether calls only enqueue work on a GPU and read a plan's runs from its tensors, so that a CUDA graph can hold them.

    The `runs` of such a plan then say no more than whether there are runs of one token, how long the longest is, and how long
    their block tables may be.
    """

    @property
    def num_done(self) -> int:
        """Grows all the while a long operation is computed, where the backend can tell; may be read by any thread."""
        ...

    @property
    def is_compiling(self) -> bool:
        """A kernel is being compiled, which takes far longer than any operation; may be read by any thread."""
        ...

    # Adapters. What one adds to a row depends on the row and the adapter alone, and is added before the result is rounded. A row
    # that none changes has the bits that it has without any.

    def pack_adapter(self, updates: Sequence[LowRankUpdate | None], *, gated: Collection[int]) -> PackedAdapter:
        """All that an adapter adds on this rank, by product; None where it adds nothing. `gated` are those of `gated_linear`.

        May be called by any thread while others compute.
        """
        ...

    def adapted_rows(self, runs: Sequence[AdaptedRun]) -> Any:
        """For the products of one step."""
        ...

    # An Int8Matrix or a GroupMatrix is multiplied as the matrix that it stands for: activations are not quantised. With an
    # Fp8Matrix, each row of x is rounded to e4m3 first, as kernels/fp8.py says, and products are added in float32.

    def pack_linear(self, weight_OI: Matrix | tuple[Matrix, ...]) -> Weight:
        """For `linear` and `partial_sum`. Several matrices: the outputs of all of them, one after another."""
        ...

    def pack_gated(self, gate_up_F2I: Matrix) -> Weight:
        """For `gated_linear`, of [2F, I]: gate rows, then up rows."""
        ...

    def pack_head(self, weight_VE: Matrix) -> Weight:
        """For `logits`; and for `embed`, of a GroupMatrix."""
        ...

    def allocate_cache(
        self, *, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> LayerCache:
        """A layer's empty cache of num_blocks blocks and the scratch block. `dtype`: that of what is attended to, or e4m3."""
        ...

    def embed(self, token_ids_T: Tensor, weight: Tensor | Weight, first_id: int) -> Tensor:
        """float32 [T, E]: rows of the embedding, of which this rank holds those from token `first_id` on; zero for others.

        `weight`: a tensor [V, E], or a GroupMatrix that pack_head has packed.
        """
        ...

    def linear(self, x_TI: Tensor, weight: Weight, adapted: Adapted | None = None) -> Tensor:
        """[T, O] of x's dtype: x · weightᵀ."""
        ...

    def partial_sum(self, x_TI: Tensor, weight: Weight, adapted: Adapted | None = None) -> Tensor:
        """float32 [T, O]: x · weightᵀ as this rank's part of a sum over ranks."""
        ...

    def gated_linear(self, x_TI: Tensor, weight: Weight, adapted: Adapted | None = None) -> Tensor:
        """[T, F] of x's dtype: silu(x · gateᵀ) · (x · upᵀ) (SwiGLU, Shazeer 2020)."""
        ...

    def logits(self, x_RE: Tensor, head: Weight) -> Tensor:
        """float32 [R, V] of float32 x; never rounded to the weights' dtype, in which close logits would become equal."""
        ...

    def softmax_parts(self, logits_RV: Tensor) -> Tensor:
        """float64 [R, 3]: each row's maximum, the sum of exp(logit − maximum), and the first index of the maximum.

        A NaN in the row, or an infinite maximum, makes one of the first two not finite.
        """
        ...

    def normalisers(self, values_RV: Tensor) -> Tensor:
        """float64 [R, 2]: each row's maximum and the sum of exp(value − maximum), which is 0 of a row of −∞ alone.

        values_RV: float32 or float64. Of a row that is not finite, one of the two is not.
        """
        ...

    def best_draws(
        self,
        values_RV: Tensor,
        rows: Sequence[int],
        temperatures: Sequence[float],
        keys: Sequence[int],
        first_id: int,
        forbidden: Sequence[Tensor | None],
    ) -> Tensor:
        """int64, one for each of `rows`: the place where value / temperature + noise is highest, in float64. The noise is that of
        kernels/randomness.py, under the row's key, of the token ids from `first_id` on.

        values_RV: float32 or float64. forbidden: bool [V] on the host, true for places that a row must not take. Of a row that is
        not finite, or allows none, any place.
        """
        ...

    def rms_norm(self, x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) · weight in float32 (Zhang & Sennrich 2019), then rounded to the weight's dtype."""
        ...

    def add_rms_norm(self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual); x and residual are float32, and so is their sum.

        May use the residual's memory for the sum.
        """
        ...

    def attention(self, qkv_TX: Tensor, plan: AttentionPlan, cache: LayerCache, heads: Heads) -> Tensor:
        """[T, H · D]: causal softmax(q · kᵀ / sqrt(D)) · v over each run's own cached positions.

        qkv: [T, (H + 2K) · D], query, key and value heads one after another. q and k are rotated by their positions first
        (Su et al. 2021, half-split layout), and k and v written to their slots. Padding rows are undefined.
        """
        ...
