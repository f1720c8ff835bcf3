"""One set of tensor names: Hugging Face's, as in model/partition.py. Other formats are translated to them here."""

import re

from model_parallel.model.partition import EMBEDDING, FINAL_NORM, LM_HEAD

_GGUF_TABLES = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": LM_HEAD}
_GGUF_LAYER = re.compile(r"blk\.(0|[1-9]\d*)\.(\w+)\.weight")
_GGUF_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_META_TABLES = {"tok_embeddings.weight": EMBEDDING, "norm.weight": FINAL_NORM, "output.weight": LM_HEAD}
_META_LAYER = re.compile(r"layers\.(0|[1-9]\d*)\.([\w.]+)\.weight")
_META_PARTS = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}

_BUFFERS = tuple(f".rotary_emb.{name}" for name in ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached"))


def from_gguf(name: str) -> str:
    """Hugging Face's name of a GGUF tensor.

    A name that the Llama architecture does not have stays as it is, so that the loader reports it as left over.
    """
    return _translated(name, _GGUF_TABLES, _GGUF_LAYER, _GGUF_PARTS)


def from_meta(name: str) -> str:
    """Hugging Face's name of a tensor in Meta's own format; an unknown one stays as it is."""
    return _translated(name, _META_TABLES, _META_LAYER, _META_PARTS)


def _translated(name: str, tables: dict[str, str], layer: re.Pattern[str], parts: dict[str, str]) -> str:
    if (match := layer.fullmatch(name)) and match[2] in parts:
        return f"model.layers.{match[1]}.{parts[match[2]]}.weight"
    return tables.get(name, name)


def is_known_buffer(name: str) -> bool:
    """Whether `name` is no parameter and yet harmless: RoPE's frequencies and tables, which are computed here."""
    return name == "rope.freqs" or name.endswith(_BUFFERS)
