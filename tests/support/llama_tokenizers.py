"""Small tokenizers with Llama 2's rules, trained on the spot."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from sentencepiece import sentencepiece_model_pb2
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from bench.support.small_tokenizer import CORPUS, sentencepiece_model
from serving.text.token_bytes import byte_level_bytes

# The kinds of text that tokenizers go wrong on.
TEXTS = [
    "", " ", "  ", "a", " a", "a ", "Hello world", "  two  spaces  ", "\n", "\n\n x\n", "\t\ttabs", "a\r\nb",
    "The capital of France is Paris.", "It's we'll they've I'M don't", "naïve café Straße größer", "日本語のテキスト",
    "🙂", "👩‍👩‍👧‍👦 family", "a🙂b", "עברית العربية", "e\u0301 combining", "\u200bzero\u00a0width",
    "def f(x):\n    return x**2\n",
    "{'key': [1, 2.5]}", "<html><body class=\"x\">&amp;</body></html>", "x" * 300, "!?.,;:-_()[]{}",
    "\x00\x01\x7f", "▁ ▁▁",
    "\ufffd", "Ġ Ċ", "\uff26\uff35", "<0x0A>", "</s", "INST",
]  # fmt: skip
CONTROL_TEXTS = [
    "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "a</s>b", " </s> ", "<s><s>",
    "<|im_end|>\n<|im_start|>system",
    "</s></s>hello", "<<s>s>", "< /s>", "[INST]",
]  # fmt: skip


def pieces() -> list[Any]:
    """(piece, score, type) of every token of `sentencepiece_model`."""
    return list(sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model()).pieces)  # type: ignore[attr-defined]


def tokenizer_json() -> str:
    """The same tokenizer in the form of the published tokenizer.json of Llama 2."""
    vocab = {p.piece: i for i, p in enumerate(pieces())}
    scores = {p.piece: p.score for p in pieces()}
    merges = sorted(
        (
            (piece[:cut], piece[cut:])
            for piece in vocab
            for cut in range(1, len(piece))
            if piece[:cut] in vocab and piece[cut:] in vocab
        ),
        key=lambda merge: -scores["".join(merge)],
    )
    library = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return str(library.to_str())


def tokenizer_json_with(texts: Sequence[str], *, scheme: str = "") -> str:
    """The same with control tokens after its 500; with `scheme` ("always", "first", "never") the space that texts begin with is
    of the kind that newer files have, a Metaspace step."""
    data = json.loads(tokenizer_json())
    for i, text in enumerate(texts):
        data["added_tokens"].append(data["added_tokens"][1] | {"id": 500 + i, "content": text})
    if scheme:
        data["normalizer"] = None
        data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return json.dumps(data)


def byte_level_json(texts: Sequence[str]) -> str:
    """A byte-level BPE with Llama 3's rule of cutting text, BOS and EOS at 1 and 2, and control tokens after them."""
    library = Tokenizer(models.BPE())
    rule = Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(rule, "isolated"), byte_level])
    library.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", *texts]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    return str(library.to_str())


def llama_directory(directory: Path, **files: str | bytes) -> Path:
    """A directory with a configuration like Llama 2's and the given files ("a__b" for a.b), without weights."""
    config = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes(b"")
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return directory


def write_gguf(path: Path, model: str) -> Path:
    """A GGUF file of `pieces`, of a tokenizer of this kind."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": 1, "context_length": 8, "embedding_length": 8, "feed_forward_length": 8,
        "attention.head_count": 2,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model(model)
    writer.add_token_list([p.piece for p in pieces()])
    writer.add_token_scores([p.score for p in pieces()])
    writer.add_token_types([p.type for p in pieces()])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_tensor("token_embd.weight", np.zeros((512, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiktoken_directory(parent: Path) -> Path:
    """Meta's format of Llama 3, with the vocabulary of `byte_level_json`."""
    vocab: dict[str, int] = json.loads(byte_level_json([]))["model"]["vocab"]
    ranked = [byte_level_bytes(text) for text in sorted(vocab, key=lambda text: vocab[text])[3:]]
    directory = parent / "Llama-3-8B-Instruct"
    directory.mkdir()
    lines = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranked))
    (directory / "tokenizer.model").write_bytes(lines)
    (directory / "consolidated.00.pth").write_bytes(b"")
    params = {"dim": 8, "n_layers": 1, "n_heads": 2, "vocab_size": -1, "use_scaled_rope": True, "rope_theta": 500000.0}
    (directory / "params.json").write_text(json.dumps(params))
    return directory
