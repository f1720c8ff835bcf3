"""What is known of a served model without asking its groups."""

import msgspec

from model_parallel.engine.request import AdapterRef
from serving.contracts.chat import ChatFormat


class Licence(msgspec.Struct, frozen=True, kw_only=True):
    """The licence that a model is served under."""

    name: str
    notice: str = ""
    """A sentence that the licence asks to be passed on."""
    use_policy_url: str = ""


class AdapterCard(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter, which is a model of its own name to whoever may see it."""

    name: str
    parent: str
    """Name of the model that it changes."""
    ref: AdapterRef
    num_bytes: int
    """On the fullest rank of a group."""
    rank: int
    tenants: tuple[str, ...] | None = None
    """Ids of the tenants that see it; None for all."""
    is_configured: bool = False
    """The configuration names it; others were added while the server ran."""


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a served model without asking its groups."""

    name: str
    source: str
    """Where its weights and tokenizer lie: a directory or a GGUF file."""
    checkpoint: str = ""
    """Fingerprint of those files: another one when the weights are others."""
    weights: str = ""
    """The same of what its ranks load alone, which is the same for as long as the model is served."""
    architecture: str
    num_parameters: int
    vocab_size: int
    """Width of the logits: every token id is below it."""
    max_model_len: int
    """Longest prompt plus answer, in tokens."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    chat_format: str
    """Name of `chat`: "llama-2", "chatml", …; "" for a model without chat."""
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
    structured_output: bool = True
    """Callers may say what form an answer must have."""
    chat: ChatFormat | None = None
    """How conversations become prompts; None is the known format that chat_format names."""
    generation_config: str = "none"
    """The rule by which `default_sampling` was made."""
    default_sampling: dict[str, float] = {}
    """Sampling fields of requests that leave them unset, by name; what is not in it is neutral."""
    parent: str = ""
    """Of an adapter: the model that it changes."""
    adapter: AdapterRef | None = None
    tenants: tuple[str, ...] | None = None
    """Ids of the tenants to whom it exists; None for all."""

    @property
    def base(self) -> str:
        """Name of the model whose groups and tokenizer it is served with: its own, or its parent's."""
        return self.parent or self.name

    def with_adapter(self, adapter: AdapterCard) -> "ModelCard":
        """The card of an adapter of this model."""
        return msgspec.structs.replace(
            self, name=adapter.name, parent=self.name, adapter=adapter.ref, tenants=adapter.tenants
        )

    def is_visible_to(self, tenant_id: str) -> bool:
        """Whether the model exists to a tenant, who may still lack the right to use it."""
        return self.tenants is None or tenant_id in self.tenants
