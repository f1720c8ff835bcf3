"""What a GPU's bandwidth and arithmetic make of a model: the roofline, times coefficients that were fitted to measured steps.

One rank of a group reads its weights once a step, or multiplies all tokens by them, whichever takes longer; reads the cache of
what it decodes; and meets the others twice a layer. So, with seconds that the device's peak figures give,

    step = step_s + layer_s · layers + max(weights_c · bytes / bandwidth, products_c · operations / rate)
         + (row_weights_c · tokens up to 64, above that convert_c) · bytes / bandwidth        of int8 weights
         + cache_c · cache bytes / bandwidth + attention_c · operations of attention / rate + row_s · decodes
         + 2 · layers · (meeting_s + token bytes · 2 (N − 1) / N / link bandwidth)        of N ranks

The terms are those of BLIS' roofline. Ranks hold unequal parts where a size does not divide; the fullest one decides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bench.simulation.cost import StepCost, knots_from
from cluster.policy.least_squares import nonnegative_least_squares
from model_parallel.config import DTYPE_BYTES, ModelConfig
from model_parallel.errors import ConfigError
from model_parallel.memory import Device, Workload, plan_group
from model_parallel.model.partition import partition_heads

KNOT_TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
COEFFICIENTS = (
    "step_s",
    "layer_s",
    "weights_c",
    "products_c",
    "cache_c",
    "attention_c",
    "row_s",
    "row_weights_c",
    "convert_c",
)
MAX_TILED_TOKENS = 64
"""Up to so many tokens a product turns int8 weights into 16 bits tile by tile, again for other rows; beyond, all at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Coefficients:
    """Of one dtype or quantisation. The names are those of the formula."""

    step_s: float
    layer_s: float
    weights_c: float
    products_c: float
    cache_c: float
    attention_c: float
    row_s: float
    row_weights_c: float = 0.0
    convert_c: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """A GPU, or several in one host."""

    device: Device
    rate: float
    """Operations a second of its matrix units in 16 bits, as its maker says, dense."""
    meeting_s: float
    """Of an all-reduce that moves nothing to speak of."""
    link_bytes_per_s: float
    """Between two GPUs of a host, each way."""
    coefficients: Mapping[str, Coefficients]
    """By dtype, or by quantisation where there is one."""
    idle_w: float
    """Of one GPU that waits."""
    busy_w: float
    """Of one GPU that computes."""
    start_s: float
    """From an order to a group that serves, where the machine is there."""

    def coefficients_of(self, dtype: str, quantization: str) -> Coefficients:
        """Raises ConfigError when they are not known."""
        kind = quantization or dtype
        known = self.coefficients.get(kind)
        if known is None:
            raise ConfigError(
                f"nothing is known of {kind} on {self.device.name}; known: {', '.join(sorted(self.coefficients))}"
            )
        return known


class Share(NamedTuple):
    """What the fullest rank of a group has of a model."""

    num_layers: int
    weight_bytes: int
    weights: float
    """Numbers in its matrices, each of which takes part in one multiply-add a token."""
    cache_bytes_per_token: int
    attention_width: int
    """Query heads times their size."""
    hidden_bytes: int
    """Of one token's activations, as they travel between ranks."""


def share_of(model: ModelConfig, tp_size: int, *, dtype: str, quantization: str) -> Share:
    """Of the fullest rank. Raises ConfigError when a rank would have no head."""
    nowhere = Device(name="", memory_bytes=0, bandwidth_bytes_per_s=1.0)
    workload = Workload(max_model_len=1)
    group = plan_group(model, tp_size, dtype=dtype, quantization=quantization, device=nowhere, workload=workload)
    fullest = max(group.ranks, key=lambda rank: rank.decode_bytes)
    heads = partition_heads(model.num_query_heads, model.num_kv_heads, tp_size, fullest.rank)
    # Embedding and LM head may have more bits than the layers.
    unquantised = plan_group(model, tp_size, dtype=dtype, device=nowhere, workload=workload).ranks[fullest.rank]
    return Share(
        num_layers=model.num_layers,
        weight_bytes=fullest.decode_bytes,
        weights=unquantised.decode_bytes / DTYPE_BYTES[dtype],
        cache_bytes_per_token=fullest.kv_bytes_per_token,
        attention_width=len(heads.query_heads) * model.head_dim,
        hidden_bytes=model.hidden_size * 4,  # the residual's addends are float32
    )


def step_cost(hardware: Hardware, share: Share, tp_size: int, *, dtype: str, quantization: str) -> StepCost:
    """The formula, for one shape."""
    c, bandwidth = hardware.coefficients_of(dtype, quantization), hardware.device.bandwidth_bytes_per_s
    weights_s = c.weights_c * share.weight_bytes / bandwidth
    product_s = c.products_c * 2 * share.weights / hardware.rate
    fixed_s = c.step_s + c.layer_s * share.num_layers
    meeting_s = token_s = 0.0
    if tp_size > 1:
        meeting_s = 2 * share.num_layers * hardware.meeting_s
        token_s = 2 * share.num_layers * share.hidden_bytes * 2 * (tp_size - 1) / tp_size / hardware.link_bytes_per_s

    def seconds(num_tokens: float) -> float:
        convert_c = c.row_weights_c * num_tokens if num_tokens <= MAX_TILED_TOKENS else c.convert_c
        convert_s = convert_c * share.weight_bytes / bandwidth
        return fixed_s + meeting_s + max(weights_s, product_s * num_tokens) + convert_s + token_s * num_tokens

    # Where arithmetic begins to take longer than reading is a corner of the line.
    corner = weights_s / product_s if product_s else math.inf
    tokens: set[float] = {*KNOT_TOKENS} | ({corner} if corner < KNOT_TOKENS[-1] else set())
    attention_s = c.attention_c * 4 * share.attention_width * share.num_layers / hardware.rate
    return StepCost(
        knots=knots_from([(num_tokens, seconds(num_tokens)) for num_tokens in tokens]),
        row_s=c.row_s,
        context_s=c.cache_c * share.cache_bytes_per_token / bandwidth,
        pair_s=attention_s,
        empty_s=c.step_s,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredStep:
    """A step that was timed on one GPU."""

    share: Share
    num_sequences: int
    num_tokens: int
    """Context of each sequence in decode, or length of the one prompt in prefill."""
    is_prefill: bool
    seconds: float


def fit_coefficients(
    steps: Sequence[MeasuredStep],
    *,
    bandwidth: float,
    rate: float,
    converts: bool = False,
    known: Mapping[str, float] | None = None,
) -> tuple[Coefficients, list[float]]:
    """Least squares of relative errors. Returns the coefficients, and predicted / measured for every step.

    `converts` says that weights have to be turned into 16 bits. Coefficients in `known` are not fitted, because the steps do
    not tell them. Decode counts as bound by the weights' bytes and prefill by arithmetic, as such steps are.
    """
    rows = []
    for step in steps:
        share, n = step.share, step.num_tokens
        features = dict.fromkeys(COEFFICIENTS, 0.0) | {"step_s": 1.0, "layer_s": float(share.num_layers)}
        if step.is_prefill:
            features["convert_c"] = share.weight_bytes / bandwidth if converts else 0.0
            features["products_c"] = 2 * share.weights * n / rate
            features["attention_c"] = 4 * share.attention_width * share.num_layers * n * (n + 1) / 2 / rate
        else:
            features["weights_c"] = share.weight_bytes / bandwidth
            features["cache_c"] = step.num_sequences * n * share.cache_bytes_per_token / bandwidth
            features["row_s"] = float(step.num_sequences)
            features["row_weights_c"] = step.num_sequences * features["weights_c"] if converts else 0.0
        rows.append([features[name] / step.seconds for name in COEFFICIENTS])
    matrix, known = np.array(rows), known or {}
    free = [index for index, name in enumerate(COEFFICIENTS) if name not in known]
    found = np.array([known.get(name, 0.0) for name in COEFFICIENTS])
    found[free] = nonnegative_least_squares(matrix[:, free], 1.0 - matrix @ found)
    ratios = [float(value) for value in matrix @ found]
    return Coefficients(**{name: float(value) for name, value in zip(COEFFICIENTS, found, strict=True)}), ratios
