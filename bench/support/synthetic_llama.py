"""Llama 2 checkpoints with the published hyper-parameters and random weights, in Meta's and Hugging Face's formats.

Weights are whole numbers of eight bits times a power of two, so that float16, bfloat16 and float32 hold them exactly: the
same weights can be written in each format's own type. Every tensor is drawn by its name and can be drawn again, so that
nothing has to be kept in memory.
"""

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.support.small_tokenizer import sentencepiece_model

Format = Literal["meta", "hf"]
TWIN_HEAD_DIM = 8
PUBLISHED_CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and "
    "system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + "
    "content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)


@dataclass(frozen=True, kw_only=True)
class SyntheticLlama:
    """One size of Llama 2 and its random weights, under Meta's names."""

    size: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    multiple_of: int
    ffn_dim_multiplier: float | None
    ffn: int
    """Published width of the feed-forward layer."""
    num_files: int
    """Of the Meta format."""
    vocab_size: int = 32000
    tokenizer: bytes = b""

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the whole tensors, by Meta's names."""
        kv = self.n_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (self.vocab_size, self.dim)}
        for layer in range(self.n_layers):
            parts: dict[str, tuple[int, ...]] = {
                "attention_norm": (self.dim,),
                "attention.wq": (self.dim, self.dim),
                "attention.wk": (kv, self.dim),
                "attention.wv": (kv, self.dim),
                "attention.wo": (self.dim, self.dim),
                "ffn_norm": (self.dim,),
                "feed_forward.w1": (self.ffn, self.dim),
                "feed_forward.w2": (self.dim, self.ffn),
                "feed_forward.w3": (self.ffn, self.dim),
            }
            shapes |= {f"layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
        return shapes | {"norm.weight": (self.dim,), "output.weight": (self.vocab_size, self.dim)}

    def tensor(self, name: str) -> Tensor:
        """bfloat16, the whole tensor."""
        shape = self.shapes()[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if len(shape) == 1:
            return torch.randint(48, 80, shape, generator=generator).to(torch.bfloat16) / 64
        numbers = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
        # Near 1/sqrt(inputs), which keeps activations of order one; the embedding is of order one itself.
        deviation = 1.0 if name == "tok_embeddings.weight" else shape[1] ** -0.5
        return numbers.to(torch.bfloat16).mul_(2.0 ** round(math.log2(deviation / 73)))

    def hugging_face(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by Hugging Face's name, rows permuted as transformers' convert_llama_weights_to_hf.py does."""
        names = {
            "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
            "attention_norm": "input_layernorm", "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
            "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
            "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj",
        }  # fmt: skip
        for name in self.shapes():
            weight = self.tensor(name)
            if name.endswith(("wq.weight", "wk.weight")):
                num_heads = weight.shape[0] // self.head_dim
                weight = weight.view(num_heads, self.head_dim // 2, 2, self.dim).transpose(1, 2).reshape(weight.shape)
            stem = name.removesuffix(".weight")
            if stem.startswith("layers."):
                _, layer, part = stem.split(".", 2)
                yield f"model.layers.{layer}.{names[part]}.weight", weight
            else:
                yield f"{names[stem]}.weight", weight

    def part(self, name: str, index: int) -> Tensor:
        """What file `index` of the Meta format holds of a tensor."""
        whole = self.tensor(name)
        if whole.ndim == 1:
            return whole
        by_columns = name.endswith(("attention.wo.weight", "w2.weight", "tok_embeddings.weight"))
        return whole.chunk(self.num_files, dim=int(by_columns))[index].clone()

    def write(self, directory: Path, form: Format, *, dtype: torch.dtype = torch.float16) -> Path:
        """`dtype` is of the Hugging Face format; Meta's is bfloat16, as published. A chat model's name says so."""
        directory.mkdir(parents=True)
        (directory / "tokenizer.model").write_bytes(self.tokenizer or sentencepiece_model())
        if form == "meta":
            self._write_meta(directory)
        else:
            self._write_hugging_face(directory, dtype)
        return directory

    def _write_meta(self, directory: Path) -> None:
        params = {
            "dim": self.dim, "multiple_of": self.multiple_of, "n_heads": self.n_heads, "n_layers": self.n_layers,
            "norm_eps": 1e-05, "vocab_size": -1,
        }  # fmt: skip
        if self.ffn_dim_multiplier is not None:
            params |= {"ffn_dim_multiplier": self.ffn_dim_multiplier, "n_kv_heads": self.n_kv_heads}
        if not self.tokenizer:
            params["vocab_size"] = self.vocab_size
        (directory / "params.json").write_text(json.dumps(params))
        for index in range(self.num_files):
            parts = {name: self.part(name, index) for name in self.shapes()}
            frequencies = 10000.0 ** -(torch.arange(0, self.head_dim, 2).float() / self.head_dim)
            torch.save(parts | {"rope.freqs": frequencies.bfloat16()}, directory / f"consolidated.{index:02}.pth")

    def _write_hugging_face(self, directory: Path, dtype: torch.dtype) -> None:
        config = {
            "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
            "hidden_size": self.dim, "initializer_range": 0.02, "intermediate_size": self.ffn,
            "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": self.n_heads,
            "num_hidden_layers": self.n_layers, "num_key_value_heads": self.n_kv_heads, "pretraining_tp": 1,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
            "torch_dtype": str(dtype).removeprefix("torch."), "use_cache": True, "vocab_size": self.vocab_size,
        }  # fmt: skip
        (directory / "config.json").write_text(json.dumps(config))
        if "chat" in directory.name:
            tokenizer = {"add_bos_token": True, "chat_template": PUBLISHED_CHAT_TEMPLATE}
            (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        weight_map: dict[str, str] = {}
        shard: dict[str, Tensor] = {}

        def flush() -> None:
            file_name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            save_file(shard, directory / file_name)
            weight_map.update(dict.fromkeys(shard, file_name))
            shard.clear()

        for name, weight in self.hugging_face():
            shard[name] = weight.to(dtype)
            if self.size == "7b" and name.endswith("q_proj.weight"):  # as the published files of that size
                shard[name.replace("q_proj.weight", "rotary_emb.inv_freq")] = torch.ones(self.head_dim // 2)
            if name.endswith("down_proj.weight"):
                flush()
        flush()
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


SIZES = {
    "7b": SyntheticLlama(
        size="7b", dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, multiple_of=256, ffn_dim_multiplier=None,
        ffn=11008, num_files=1,
    ),
    "13b": SyntheticLlama(
        size="13b", dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, multiple_of=256, ffn_dim_multiplier=None,
        ffn=13824, num_files=2,
    ),
    "70b": SyntheticLlama(
        size="70b", dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3,
        ffn=28672, num_files=8,
    ),
}  # fmt: skip


def twin(size: str) -> SyntheticLlama:
    """The same heads, files and rules at a small width and two layers."""
    full = SIZES[size]
    ffn = {"7b": 688, "13b": 864, "70b": 1792}[size]  # the published widths, a sixteenth
    tokenizer = b"" if size == "70b" else sentencepiece_model()
    return replace(
        full,
        dim=full.n_heads * TWIN_HEAD_DIM,
        n_layers=2,
        multiple_of=full.multiple_of // 16,
        ffn=ffn,
        vocab_size=500 if tokenizer else 520,
        tokenizer=tokenizer,
    )


def full_width(size: str, *, num_layers: int = 2) -> SyntheticLlama:
    """The published width."""
    return replace(SIZES[size], n_layers=num_layers)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def meta_logits(model: SyntheticLlama, token_ids: list[int]) -> Tensor:
    """float32 [tokens, vocabulary], by the definition of Meta's `llama/model.py` and its paper: adjacent pairs of a head are
    complex numbers, turned by exp(i · position · theta^(−2j/D))."""

    def weight(name: str) -> Tensor:
        return model.tensor(name).float()

    num_tokens, dim = len(token_ids), model.head_dim
    angles = torch.outer(torch.arange(num_tokens).double(), 10000.0 ** -(torch.arange(0, dim, 2).double() / dim))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None].to(torch.complex64)
    future = torch.full((num_tokens, num_tokens), float("-inf")).triu(1)

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(num_tokens, -1, dim // 2, 2))
        return torch.view_as_real(pairs * turn).flatten(2)

    h = weight("tok_embeddings.weight")[token_ids]
    for layer in range(model.n_layers):
        p = f"layers.{layer}"
        x = rms_norm(h, weight(f"{p}.attention_norm.weight"))
        queries = rotated(x @ weight(f"{p}.attention.wq.weight").T)
        keys = rotated(x @ weight(f"{p}.attention.wk.weight").T)
        values = (x @ weight(f"{p}.attention.wv.weight").T).view(num_tokens, -1, dim)
        repeats = model.n_heads // model.n_kv_heads
        keys, values = (t.repeat_interleave(repeats, dim=1) for t in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / math.sqrt(dim) + future
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).flatten(1)
        h = h + attended @ weight(f"{p}.attention.wo.weight").T
        x = rms_norm(h, weight(f"{p}.ffn_norm.weight"))
        gate = torch.nn.functional.silu(x @ weight(f"{p}.feed_forward.w1.weight").T)
        h = h + (gate * (x @ weight(f"{p}.feed_forward.w3.weight").T)) @ weight(f"{p}.feed_forward.w2.weight").T
    return rms_norm(h, weight("norm.weight")) @ weight("output.weight").T
