"""The feed-forward layer."""

from dataclasses import dataclass

from torch import Tensor

from model_parallel.kernels.interface import Kernels, Weight


@dataclass(frozen=True, slots=True)
class FeedForward:
    """SwiGLU over this rank's columns. Shape suffixes: T tokens · E hidden

    The result is this rank's partial_sum: the sum over ranks is the layer's output.
    """

    gate_up_weight: Weight
    down_weight: Weight
    kernels: Kernels

    def __call__(self, x_TE: Tensor) -> Tensor:
        """float32 [T, E]."""
        return self.kernels.partial_sum(self.kernels.gated_linear(x_TE, self.gate_up_weight), self.down_weight)
