"""Whole models with weights as their checkpoints have quantised them, against transformers on the dequantised weights."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import LlamaForCausalLM

from model_parallel.config import AdapterConfig
from model_parallel.engine.request import EngineRequest, SamplingParams
from model_parallel.errors import ConfigError
from tests.support.kernels import BACKENDS, use_backend
from tests.support.local_engine import LocalGroup
from tests.support.quantized_llama import Scheme, awq, compressed, gptq, quantize_checkpoint
from tests.support.ranks import group_config, prompt_logits, reference_from_gguf, save_random_llama

MAX_LOGIT_ERROR = 2e-4
"""Both sides compute in float32 and differ in the order of sums only."""
IDS = [3 + 7 * i % 500 for i in range(60)]
SHAPE: dict[str, object] = {
    "hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16, "intermediate_size": 208,
}  # fmt: skip
SCHEMES = {
    "awq": awq(16),
    "gptq": gptq(symmetric=False),
    "gptq-8-bits": gptq(bits=8, symmetric=False, version=2),
    "compressed": compressed(-1),
}


def _checkpoint(path: Path, scheme: Scheme, **shape: object) -> LlamaForCausalLM:
    """Transformers' model of the weights that are meant."""
    model = save_random_llama(path, **SHAPE | shape)
    meant = quantize_checkpoint(path, scheme)
    model.load_state_dict({name: weight.float() for name, weight in meant.items()})
    return model


def _logits(model: LlamaForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SCHEMES)
def test_logits_match_transformers(name: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(monkeypatch, backend)
    expected = _logits(_checkpoint(tmp_path, SCHEMES[name]))
    for tp_size in (1, 5) if backend == "cpu" else (2,):
        config = group_config(tmp_path, tp_size, quantization="packed")
        assert (prompt_logits(config, IDS, chunk=25) - expected).abs().max() <= MAX_LOGIT_ERROR


@pytest.mark.parametrize("backend", BACKENDS)
def test_reordered_inputs(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(monkeypatch, backend)
    expected = _logits(_checkpoint(tmp_path, gptq(16, reordered=True)))
    ours = prompt_logits(group_config(tmp_path, 1, quantization="packed"), IDS, chunk=60)
    assert (ours - expected).abs().max() <= MAX_LOGIT_ERROR


def _gguf(path: Path, model: LlamaForCausalLM, types: dict[str, Type]) -> Path:
    """types: by the last parts of names in GGUF; other matrices are Q4_0."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for part, num_heads in heads.items():
            if part in name:  # as llama.cpp's converter permutes them
                half = weight.shape[0] // num_heads // 2
                weight = weight.view(num_heads, 2, half, -1).transpose(1, 2).reshape(weight.shape)  # noqa: PLW2901
        theirs = names.get_name(name, try_suffixes=(".weight",))
        assert theirs is not None
        kind = (
            Type.F32
            if weight.ndim == 1
            else next((k for n, k in types.items() if theirs.endswith(f"{n}.weight")), Type.Q4_0)
        )
        if kind in (Type.Q4_K, Type.Q5_K, Type.Q6_K):  # the library reads these and cannot write them
            stored = _random_blocks(kind, tuple(weight.shape))
        else:
            stored = weight.numpy() if kind is Type.F32 else gguf.quants.quantize(weight.numpy(), kind)
        writer.add_tensor(theirs, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _random_blocks(kind: Type, shape: tuple[int, ...]) -> np.ndarray:
    """With scales that make weights of about 0.05."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(shape[0])
    blocks = rng.integers(0, 256, (shape[0], shape[1] // block_size, block_bytes), dtype=np.uint8)
    scale, minimum = {Type.Q4_K: (1e-4, 1e-3), Type.Q5_K: (5e-5, 8e-4), Type.Q6_K: (2e-5, 0.0)}[kind]
    at = 208 if kind is Type.Q6_K else 0
    blocks[:, :, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    if minimum:
        blocks[:, :, 2:4] = np.frombuffer(np.float16(minimum).tobytes(), np.uint8)
    return blocks.reshape(shape[0], -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_tied", [False, True], ids=["head", "tied"])
def test_gguf_logits_match_transformers(
    is_tied: bool, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As llama.cpp mixes types: Q4_K beside Q6_K in one fused matrix, and types that are dequantised."""
    use_backend(monkeypatch, backend)
    model = save_random_llama(
        tmp_path, hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=2,
        num_hidden_layers=2, tie_word_embeddings=is_tied,
    )  # fmt: skip
    types = {
        "token_embd": Type.Q6_K if is_tied else Type.Q8_0, "output": Type.Q6_K, "attn_q": Type.Q4_K, "attn_k": Type.Q4_K,
        "attn_v": Type.Q6_K, "attn_output": Type.Q5_K, "1.ffn_down": Type.Q8_0, "0.ffn_gate": Type.Q5_0,
        "0.ffn_up": Type.Q5_0, "1.ffn_up": Type.Q4_1,
    }  # fmt: skip
    path = _gguf(tmp_path / "model.gguf", model, types)
    expected = _logits(reference_from_gguf(path, has_head=not is_tied))
    ours = [
        prompt_logits(group_config(path, tp_size, quantization="packed"), IDS, chunk=25)
        for tp_size in ((1, 3) if backend == "cpu" else (2,))
    ]
    assert all((logits - expected).abs().max() <= MAX_LOGIT_ERROR for logits in ours)


def test_adapters_are_refused_where_parts_of_a_matrix_do_not_begin_where_kernels_can_add_to_them(
    tmp_path: Path,
) -> None:
    model = save_random_llama(
        tmp_path, hidden_size=256, intermediate_size=512, num_attention_heads=16, num_key_value_heads=1, num_hidden_layers=2
    )  # fmt: skip
    path = _gguf(tmp_path / "model.gguf", model, {"1.attn_v": Type.Q6_K})
    LocalGroup(path, 1, quantization="packed").close()
    LocalGroup(path, 1, adapters=AdapterConfig()).close()
    named = r"model\.layers\.1\.self_attn\.qkv_proj\.weight is of parts .* begins at output 272; adapters need a multiple of 32"
    with pytest.raises(ConfigError, match=named):
        LocalGroup(path, 1, quantization="packed", adapters=AdapterConfig())


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_do_not_depend_on_chunks(dtype: str, tp_size: int, tmp_path: Path) -> None:
    _checkpoint(tmp_path, awq(16))
    config = group_config(tmp_path, tp_size, dtype=dtype, quantization="packed")
    whole = prompt_logits(config, IDS, chunk=60)
    assert all(torch.equal(prompt_logits(config, IDS, chunk), whole) for chunk in (1, 7))


def test_tokens_are_the_same_alone_and_in_a_batch(tmp_path: Path) -> None:
    """Through the engine, whose decode steps are recorded."""
    _checkpoint(tmp_path, awq(16))
    greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    prompts = [IDS[:n] for n in (5, 17, 40)]

    requests = [
        EngineRequest(request_id=f"{i}", prompt_token_ids=tuple(prompt), sampling=greedy)
        for i, prompt in enumerate(prompts)
    ]
    group = LocalGroup(tmp_path, 1, dtype="bfloat16", quantization="packed")
    together = group.run(requests)
    alone = [group.run([request]) for request in requests]
    preempted = group.run(requests, num_blocks=8)
    group.close()
    assert preempted.num_preemptions
    for request, outcome in zip(requests, alone, strict=True):
        tokens = outcome.tokens(request.request_id)
        assert together.tokens(request.request_id) == preempted.tokens(request.request_id) == tokens
