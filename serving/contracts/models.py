"""What is known of a served model without asking its groups."""

import msgspec


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
