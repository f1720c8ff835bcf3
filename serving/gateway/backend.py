"""What a gateway needs from whatever runs the models. Ray Serve implements it in serving/deployment.py."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from model_parallel.engine.request import EngineOutput, EngineRequest


class Licence(msgspec.Struct, frozen=True, kw_only=True):
    """The licence that a model is served under."""

    name: str
    notice: str = ""
    """A sentence that the licence asks to be passed on."""
    use_policy_url: str = ""


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a served model without asking its groups."""

    name: str
    source: str
    """Where its weights and tokenizer lie: a directory or a GGUF file."""
    architecture: str
    num_parameters: int
    vocab_size: int
    """Width of the logits: every token id is below it."""
    max_model_len: int
    """Longest prompt plus answer, in tokens."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    chat_format: str
    """"llama-2", "chatml", or "" for a model without chat."""
    chat_default_system: str = ""
    """System message used when a conversation brings none."""
    dtype: str
    device: str
    tensor_parallel_size: int
    num_groups: int
    deterministic: bool
    """The same request gives the same tokens in any batch (batch-invariant kernels, rank-ordered reductions)."""
    kernels: str
    """Kernel backend that computes it: "reference", or "cpu-" and the instruction set; "" until a group has told."""
    licence: Licence
    allow_parse_special: bool = False
    """Callers may have control tokens read in the text of a prompt."""


@dataclass(slots=True)
class Passage:
    """What goes with a request to its group besides the request, and what comes to be known on the way."""

    trace_context: dict[str, str] = field(default_factory=dict)
    """Headers that make the group's span a child of the gateway's; empty when nothing is traced."""
    engine: str = ""
    """Id of the group that took the request; the Backend sets it before it yields or raises."""


class Backend(Protocol):
    """Runs requests on replica groups."""

    @property
    def models(self) -> Mapping[str, ModelCard]:
        """Served models by name."""
        ...

    def generate(
        self, model: str, requests: Sequence[EngineRequest], passage: Passage
    ) -> AsyncGenerator[tuple[EngineOutput, ...], None]:
        """Run the choices of one client request on one group; outputs that are ready together come together.

        Ends after every choice had its finish_reason. Closing the iterator (`aclose`), or cancelling the task that waits on it,
        aborts what still runs; while it is left alone, little more is computed. Raises RequestError (kind "overloaded" or
        "draining") when the group refuses the request, and GroupUnavailableError when no group can take it or the group is lost.
        After a refusal the next call goes to another group, if there is one.
        """
        ...

    async def can_serve(self, model: str) -> bool:
        """Whether some group of `model` can take a request now; bounded wait, never raises."""
        ...


class GroupUnavailableError(Exception):
    """No live replica group, or the one that ran the request is lost. The message is fit for a client to read."""

    def __init__(self, message: str, *, may_have_run: bool = True) -> None:
        """Without `may_have_run`, the group has said that it has not begun; another one may."""
        super().__init__(message)
        self.may_have_run = may_have_run
