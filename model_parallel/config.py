"""What a replica group is made of. Frozen and validated; dtypes and devices are strings, so that no torch is needed here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from model_parallel.errors import ConfigError
from model_parallel.weight_format import GroupFormat

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DEVICES = ("cpu", "cuda")
MOST_TOKENS, MOST_HEAD_DIM = 1 << 21, 1 << 14
"""Larger numbers are mistakes of a file, and would take the memory of a machine before a weight is looked for."""
_LARGEST_MODEL = {
    "vocab_size": MOST_TOKENS, "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_layers": 1 << 12,
    "num_query_heads": 1 << 14, "num_kv_heads": 1 << 14, "head_dim": MOST_HEAD_DIM,
}  # fmt: skip
CPU_QUANTIZATIONS = ("", "int8", "packed")
QUANTIZATIONS = (*CPU_QUANTIZATIONS, "fp8")
SPECULATIONS = ("auto", "off", "prompt_lookup")


def _positive(owner: str, **fields: int | float) -> None:
    for name, value in fields.items():
        if not value > 0:
            raise ConfigError(f"{owner}.{name} is {value}; it must be greater than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The hyper-parameters of a Llama-architecture model, under one set of names for every checkpoint format."""

    vocab_size: int
    """Rows of the embedding and the LM head: the width of the logits."""
    hidden_size: int
    intermediate_size: int
    """Width of the SwiGLU feed-forward layer."""
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_divisors: tuple[float, ...] = ()
    """What the rotary frequencies are divided by, one a pair of a head's rows; () when they are not scaled."""
    max_position: int
    """Longest sequence, in tokens, that the model was made for."""
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    weight_formats: Mapping[str, GroupFormat] = field(default_factory=dict, compare=False, repr=False)
    """Matrices that the checkpoint stores quantised in groups, by parameter name. Nothing of the model itself."""
    fp8_weights: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    """Those that it stores in e4m3 and that stay so, which only quantization: fp8 computes. A head is dequantised, and so are
    gate and up projections of which one alone is in e4m3."""

    def __post_init__(self) -> None:
        _positive(
            "model",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_query_heads=self.num_query_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rms_norm_eps=self.rms_norm_eps,
            rope_theta=self.rope_theta,
            max_position=self.max_position,
        )
        for name, most in _LARGEST_MODEL.items():
            if getattr(self, name) > most:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; the most is {most}")
        if self.num_query_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_query_heads is {self.num_query_heads} and model.num_kv_heads is {self.num_kv_heads}; "
                "each key/value head must serve the same number of query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim is {self.head_dim}; rotary embedding needs an even number")
        if self.rope_divisors and len(self.rope_divisors) != self.head_dim // 2:
            raise ConfigError(
                f"model.rope_divisors has {len(self.rope_divisors)} numbers; head_dim {self.head_dim} needs "
                f"{self.head_dim // 2}"
            )
        if not all(0 < divisor < math.inf for divisor in self.rope_divisors):
            raise ConfigError(f"model.rope_divisors has {min(self.rope_divisors)}; all must be greater than 0")

    def check_fp8(self, setting: str, quantization: str) -> None:
        """Refuse any other `quantization`, which `setting` is, for weights that are stored in e4m3. Raises ConfigError."""
        if self.fp8_weights and quantization != "fp8":
            raise ConfigError(
                f"{setting} is {quantization or 'none'}, and the checkpoint's weights are in fp8: set it to fp8, on GPUs of "
                "compute capability 8.9 or newer; elsewhere serve the model's unquantised checkpoint (int8 saves memory, too)"
            )

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model; tied embeddings are counted once."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_query_heads + 2 * self.num_kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + tables + self.hidden_size


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How one replica group is cut over ranks."""

    tp_size: int = 1
    device: str = "cpu"
    """Where the ranks compute: "cpu" or "cuda"."""
    dtype: str = "float32"
    """Weights, activations and KV cache: "float32", "bfloat16" or "float16"."""
    quantization: str = ""
    """"int8": matrices are kept in eight bits a weight; the embedding, norms, activations and KV cache stay as `dtype` says.
    "fp8": so are the layers', as e4m3 numbers, and products round activations to e4m3, too; on GPUs that multiply such numbers.
    "packed": what the checkpoint has quantised in groups stays so, the embedding too. "": all weights are of `dtype`."""
    deterministic: bool = False
    """An answer must have the same bits whatever else is in a step. False: it may, where that costs nothing."""
    kv_cache_dtype: str = ""
    """"fp8": keys and values are cached as e4m3 numbers, of keys after rotation, on GPUs that convert them. "": as `dtype`."""
    num_threads: int = 1
    """Threads that one CPU rank may use inside an operation."""
    start_timeout_s: float = 300.0
    """Bound on loading and connecting all ranks."""
    step_timeout_s: float = 60.0
    """Bound on one step, and on each collective inside it."""

    def __post_init__(self) -> None:
        _positive(
            "parallel",
            tp_size=self.tp_size,
            num_threads=self.num_threads,
            start_timeout_s=self.start_timeout_s,
            step_timeout_s=self.step_timeout_s,
        )
        if self.device not in DEVICES:
            raise ConfigError(f"parallel.device is {self.device!r}; allowed: {', '.join(DEVICES)}")
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"parallel.dtype is {self.dtype!r}; allowed: {', '.join(DTYPE_BYTES)}")
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError(
                f'parallel.quantization is {self.quantization!r}; allowed: "int8", "packed", "fp8", or "" for none'
            )
        if self.kv_cache_dtype not in ("", "fp8"):
            raise ConfigError(f'parallel.kv_cache_dtype is {self.kv_cache_dtype!r}; allowed: "fp8", or "" for dtype')
        if self.deterministic and self.quantization == "fp8":
            raise ConfigError("parallel.deterministic is true, and fp8 products depend on what else is in a step")

    def check_fits(self, model: ModelConfig) -> None:
        """A rank without a query head would have nothing to do, and one without a token would have none to offer."""
        if self.tp_size > model.num_query_heads:
            raise ConfigError(
                f"tensor_parallel_size is {self.tp_size} and the model has {model.num_query_heads} query heads; "
                f"each rank must hold at least one, so the most is {model.num_query_heads}"
            )
        if self.tp_size > model.vocab_size:
            raise ConfigError(
                f"tensor_parallel_size is {self.tp_size} and the model's vocabulary has {model.vocab_size} tokens; "
                f"each rank must hold at least one, so the most is {model.vocab_size}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """The paged KV cache of a group. Every rank has the same number of blocks, for its own key/value heads."""

    num_blocks: int
    block_size: int = 16
    """Tokens a block."""
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        _positive("cache", num_blocks=self.num_blocks, block_size=self.block_size)

    @property
    def num_tokens(self) -> int:
        """Tokens that the whole cache can hold."""
        return self.num_blocks * self.block_size


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Bounds on what one step and one group take on."""

    max_num_seqs: int = 64
    """Sequences that run at the same time."""
    max_num_batched_tokens: int = 512
    """Tokens computed in one step, decode and prefill together; a longer prompt is prefilled in chunks."""
    max_prefill_tokens: int | None = None
    """Prompt tokens of one step, without those of sequences below their fair share (engine/fair_queue.py); as many as fit when
    None. A small number keeps steps short, so that a new request waits less."""
    max_model_len: int = 4096
    """Longest sequence, prompt and answer together."""
    max_waiting_requests: int = 256
    """Requests that may wait, one tenant's alone up to 4/5 of them; one more is refused as overloaded."""
    max_waiting_tokens: int = 1 << 20
    """Prompt tokens that may wait, shared in the same way; a request that would exceed them is refused as overloaded."""
    max_prefill_chunk: int = field(default=1 << 30)
    """Most prompt tokens of one sequence in one step. Lower it only to test chunked prefill."""
    max_grammars: int = 64
    """Compiled grammars that the ranks keep; those in use are never dropped, and one more is then refused as overloaded."""
    max_grammar_bytes: int = 4 << 20
    """Their texts together."""
    speculation: str = "off"
    """Where drafts of the next tokens come from: "prompt_lookup" (engine/speculation.py), or "off". "auto" is the first; whoever
    knows that the ranks' bits depend on the number of rows says "off" instead."""

    def __post_init__(self) -> None:
        if self.speculation not in SPECULATIONS:
            raise ConfigError(f"scheduler.speculation is {self.speculation!r}; allowed: {', '.join(SPECULATIONS)}")
        _positive(
            "scheduler",
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_prefill_tokens=1 if self.max_prefill_tokens is None else self.max_prefill_tokens,
            max_model_len=self.max_model_len,
            max_waiting_requests=self.max_waiting_requests,
            max_waiting_tokens=self.max_waiting_tokens,
            max_prefill_chunk=self.max_prefill_chunk,
            max_grammars=self.max_grammars,
            max_grammar_bytes=self.max_grammar_bytes,
        )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"scheduler.max_num_batched_tokens is {self.max_num_batched_tokens} and scheduler.max_num_seqs is "
                f"{self.max_num_seqs}; a step must have room for one token of every running sequence"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTable:
    """What each token of a model stands for: all that constrained output needs of a tokenizer."""

    lengths: tuple[int, ...]
    """Bytes of each token, by its id; 0 for control tokens, and for ids that the logits alone have."""
    text: bytes
    """The bytes of all tokens, one after another."""
    eos_token_ids: tuple[int, ...]
    """What ends an answer."""

    @classmethod
    def of(cls, tokens: Sequence[bytes], eos_token_ids: tuple[int, ...]) -> "TokenTable":
        """`tokens` by id, as many as the logits are wide."""
        return cls(lengths=tuple(map(len, tokens)), text=b"".join(tokens), eos_token_ids=eos_token_ids)

    def tokens(self) -> list[bytes]:
        """By id."""
        ends = list(accumulate(self.lengths, initial=0))
        return [self.text[begin:end] for begin, end in pairwise(ends)]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """What the ranks of a group hold of LoRA adapters, which come and go while the group runs."""

    max_loaded: int = 16
    """Adapters that are loaded at the same time."""
    max_bytes: int = 512 << 20
    """Bytes of those on one rank."""
    host_cache_bytes: int = 0
    """On each rank's host, for adapters that were loaded lately: they are cut already when they come back."""

    def __post_init__(self) -> None:
        _positive("adapters", max_loaded=self.max_loaded, max_bytes=self.max_bytes)
        if self.host_cache_bytes < 0:
            raise ConfigError(f"adapters.host_cache_bytes is {self.host_cache_bytes}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftConfig:
    """The draft model of a group. Rank 0 holds all of it beside its shard, in the group's dtype."""

    checkpoint_path: str
    """Readable on the node that hosts rank 0."""
    quantization: str = ""
    """As ParallelConfig.quantization; not "int8" or "fp8"."""
    share: float = 0.25
    """How long a pass of it takes beside a step of the group with as many rows: about, before it has been measured."""

    def __post_init__(self) -> None:
        _positive("draft", share=self.share)
        if self.quantization not in ("", "packed"):
            raise ConfigError(f'draft.quantization is {self.quantization!r}; allowed: "packed", or "" for none')


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupConfig:
    """Everything that a rank needs to load its shard and serve steps. The same for all ranks of a group."""

    checkpoint_path: str
    """A directory of Hugging Face format, or a GGUF file; readable on every node that hosts a rank."""
    parallel: ParallelConfig
    cache: CacheConfig
    weights: str = ""
    """`weights_fingerprint` of what must lie at checkpoint_path; "" for whatever does."""
    epoch: int
    """Incarnation of the group; on every message, and anything from another epoch is dropped."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """What a step may hold, which a GPU rank prepares for when it starts."""
    tokens: TokenTable | None = None
    """None for a group without constrained output."""
    adapters: AdapterConfig | None = None
    """None: the group takes no adapters."""
    draft: DraftConfig | None = None
    """None: the group has no draft model."""
