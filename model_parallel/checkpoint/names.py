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


def from_gguf(name: str) -> str:
    """Hugging Face's name of a GGUF tensor.

    A name that the Llama architecture does not have stays as it is, so that the loader reports it as left over.
    """
    if match := _GGUF_LAYER.fullmatch(name):
        layer, part = match.groups()
        if part in _GGUF_PARTS:
            return f"model.layers.{layer}.{_GGUF_PARTS[part]}.weight"
    return _GGUF_TABLES.get(name, name)


def is_known_buffer(name: str) -> bool:
    """Whether `name` is no parameter and yet harmless: published Llama 2 files carry RoPE's frequencies."""
    return name.endswith(".rotary_emb.inv_freq")
