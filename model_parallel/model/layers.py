"""The feed-forward layer."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from model_parallel.kernels.interface import Adapted, Kernels, Weight


def adapted(rows: Any, product: int) -> Adapted | None:
    """`rows` of Kernels.adapted_rows, at one product of the model; None for None."""
    return None if rows is None else Adapted(rows, product)


@dataclass(frozen=True, slots=True)
class FeedForward:
    """SwiGLU over this rank's columns. Shape suffixes: T tokens · E hidden · F local columns

    The result is this rank's partial_sum: the sum over ranks is the layer's output.
    """

    gate_up_weight: Weight
    down_weight: Weight
    kernels: Kernels

    gate_up_product: int
    """Which product of the model it is, to adapters; as is `down_product`."""
    down_product: int

    def __call__(self, x_TE: Tensor, adapted_rows: Any = None) -> Tensor:
        """float32 [T, E]. `adapted_rows`: of Kernels.adapted_rows, or None."""
        x_TF = self.kernels.gated_linear(x_TE, self.gate_up_weight, adapted(adapted_rows, self.gate_up_product))
        return self.kernels.partial_sum(x_TF, self.down_weight, adapted(adapted_rows, self.down_product))
