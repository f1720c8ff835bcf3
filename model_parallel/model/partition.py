"""Who holds what: a pure table from parameter name to the slice that one rank holds.

One rule covers every tensor-parallel size from 1 to the number of query heads. Query heads are cut into contiguous runs as
even as can be; a rank holds exactly the key/value heads that its query heads read, so a key/value head may be held by
several ranks. Feed-forward columns and vocabulary rows are cut evenly and may be uneven too.

Parameter names are those of Hugging Face's Llama checkpoints; other formats are translated to them (checkpoint/names.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from model_parallel.config import ModelConfig
from model_parallel.errors import ConfigError
from model_parallel.weight_format import GroupFormat

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
GATE, UP = "mlp.gate_proj.weight", "mlp.up_proj.weight"

_FUSED = {
    "self_attn.q_proj": "self_attn.qkv_proj",
    "self_attn.k_proj": "self_attn.qkv_proj",
    "self_attn.v_proj": "self_attn.qkv_proj",
    "mlp.gate_proj": "mlp.gate_up_proj",
    "mlp.up_proj": "mlp.gate_up_proj",
}


def fused_name(name: str) -> str:
    """The tensor that a rank keeps parameter `name` in: query, key and value rows in one, gate and up rows in another.

    Parts follow one another in the order of `shard_table`.
    """
    prefix, _, part = name.removesuffix(".weight").rpartition(".")
    prefix, _, block = prefix.rpartition(".")
    fused = _FUSED.get(f"{block}.{part}")
    return f"{prefix}.{fused}.weight" if fused else name


def even_range(total: int, num_ranks: int, rank: int) -> range:
    """The `rank`-th of `num_ranks` contiguous runs of 0…total−1; sizes differ by at most one, longer runs first."""
    base, extra = divmod(total, num_ranks)
    start = rank * base + min(rank, extra)
    return range(start, start + base + (rank < extra))


@dataclass(frozen=True, slots=True)
class HeadPartition:
    """The attention heads of one rank."""

    query_heads: range
    kv_heads: range
    kv_of_query: tuple[int, ...]
    """For each local query head, the local index of the key/value head that it reads."""


def partition_heads(num_query_heads: int, num_kv_heads: int, num_ranks: int, rank: int) -> HeadPartition:
    """Heads of `rank`. Raises ConfigError when there are more ranks than query heads."""
    if num_ranks > num_query_heads:
        raise ConfigError(f"tensor_parallel_size is {num_ranks} and the model has {num_query_heads} query heads")
    group_size = num_query_heads // num_kv_heads
    query_heads = even_range(num_query_heads, num_ranks, rank)
    kv_heads = range(query_heads.start // group_size, (query_heads.stop - 1) // group_size + 1)
    return HeadPartition(query_heads, kv_heads, tuple(q // group_size - kv_heads.start for q in query_heads))


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of one parameter: rows or columns start…stop−1 of `axis`, everything along the others."""

    full_shape: tuple[int, ...]
    axis: int | None = None
    """None: the whole tensor, on every rank."""
    start: int = 0
    stop: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the rank's part."""
        if self.axis is None:
            return self.full_shape
        return tuple(self.stop - self.start if a == self.axis else n for a, n in enumerate(self.full_shape))

    @property
    def index(self) -> tuple[slice, ...]:
        """The part as an index into the whole tensor."""
        return tuple(
            slice(self.start, self.stop) if a == self.axis else slice(None) for a in range(len(self.full_shape))
        )


def shard_table(config: ModelConfig, num_ranks: int, rank: int) -> dict[str, Shard]:
    """Every parameter of the model and the part of it that `rank` holds. Weights are [out features, in features]."""
    d, hidden, ffn = config.head_dim, config.hidden_size, config.intermediate_size
    heads = partition_heads(config.num_query_heads, config.num_kv_heads, num_ranks, rank)
    ffn_range = even_range(ffn, num_ranks, rank)
    vocab_range = even_range(config.vocab_size, num_ranks, rank)

    def rows(num_rows: int, part: range, unit: int = 1) -> Shard:
        return Shard((num_rows * unit, hidden), 0, part.start * unit, part.stop * unit)

    def columns(num_columns: int, part: range, unit: int = 1) -> Shard:
        return Shard((hidden, num_columns * unit), 1, part.start * unit, part.stop * unit)

    table = {EMBEDDING: rows(config.vocab_size, vocab_range), FINAL_NORM: Shard((hidden,))}
    if not config.tie_word_embeddings:
        table[LM_HEAD] = rows(config.vocab_size, vocab_range)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        table |= {
            f"{prefix}.input_layernorm.weight": Shard((hidden,)),
            f"{prefix}.self_attn.q_proj.weight": rows(config.num_query_heads, heads.query_heads, d),
            f"{prefix}.self_attn.k_proj.weight": rows(config.num_kv_heads, heads.kv_heads, d),
            f"{prefix}.self_attn.v_proj.weight": rows(config.num_kv_heads, heads.kv_heads, d),
            f"{prefix}.self_attn.o_proj.weight": columns(config.num_query_heads, heads.query_heads, d),
            f"{prefix}.post_attention_layernorm.weight": Shard((hidden,)),
            f"{prefix}.mlp.gate_proj.weight": rows(ffn, ffn_range),
            f"{prefix}.mlp.up_proj.weight": rows(ffn, ffn_range),
            f"{prefix}.mlp.down_proj.weight": columns(ffn, ffn_range),
        }
    return table


def kept_formats(table: Mapping[str, Shard], formats: Mapping[str, GroupFormat]) -> dict[str, GroupFormat]:
    """What is kept as the checkpoint has it. Gate and up are one matrix to the kernels, so both must be of one format."""
    kept = {name: formats[name] for name in table if name in formats}
    for name in list(kept):
        if name.endswith(GATE) and kept[name] != kept.get(up := name.removesuffix(GATE) + UP):
            kept.pop(name)
            kept.pop(up, None)
        elif name.endswith(UP) and name.removesuffix(UP) + GATE not in kept:
            kept.pop(name, None)
    return kept
