"""Logits against transformers, for every way of cutting heads, feed-forward columns and vocabulary."""

import itertools
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from serving.text.tokenizer import load_tokenizer
from tests.support.converted import reference_model
from tests.support.effort import by_day, rest_by_night
from tests.support.kernels import BACKENDS, INSTRUCTION_SETS, use_backend
from tests.support.ranks import group_config, prompt_logits, save_random_llama

ROOT = Path(__file__).parents[2]
TALE = """Once upon a time there was a king who lived in a castle by the sea. He had three daughters, and the youngest of them
was so beautiful that the sun itself, which has seen so much, was astonished whenever it shone in her face. Close by the king's
castle lay a great dark forest, and under an old lime-tree in the forest was a well, and when the day was very warm, the king's
child went out to the forest and sat down by the fountain."""
PROMPT_LEN = 256
# Both sides compute in float32 and differ in the order of sums only; the bound is the project's promise.
MAX_LOGIT_ERROR = 2e-4

CONFIGS = {
    "mha": {},
    "gqa_8_to_1": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "gqa_3_to_1": {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16, "hidden_size": 144},
    "odd_heads": {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 14, "hidden_size": 70},
    "gqa_odd": {"num_attention_heads": 14, "num_key_value_heads": 7, "head_dim": 8, "hidden_size": 126},
    "tied": {"tie_word_embeddings": True, "vocab_size": 509},
    "llama3_scaling": {
        "head_dim": 16, "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "linear_scaling": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "dynamic_scaling": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    "wide_heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rope_theta": 500000.0},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(monkeypatch, backend)


def _ids(vocab_size: int, seed: int = 0) -> list[int]:
    return torch.randint(0, vocab_size, (PROMPT_LEN,), generator=torch.Generator().manual_seed(seed)).tolist()


def _reference(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> LlamaForCausalLM:
    return reference_model(smollm2_path)


CUTS = list(itertools.product(CONFIGS, (1, 2, 3, 4, 5), BACKENDS))
CUTS_BY_DAY = [
    (name, tp_size, backend)
    for name, tp_size, backend in CUTS
    if tp_size in ((2, 5) if backend == "cpu" else (3,)) or name == "gqa_3_to_1"
]
"""Every model with even and uneven cuts, and one with every cut, on both backends."""


@pytest.mark.parametrize(("name", "tp_size", "backend"), rest_by_night(CUTS, by_day=CUTS_BY_DAY, has_names=True))
def test_logits_match_transformers(name: str, tp_size: int, tmp_path: Path) -> None:
    model = save_random_llama(tmp_path, **CONFIGS[name])
    tp_size = min(tp_size, model.config.num_attention_heads)
    ids = _ids(model.config.vocab_size)
    ours = prompt_logits(group_config(tmp_path, tp_size), ids, chunk=100)
    assert (ours - _reference(model, ids)).abs().max() <= MAX_LOGIT_ERROR


@pytest.mark.parametrize("backend", [f"cpu-{each}" for each in INSTRUCTION_SETS])
@pytest.mark.parametrize("tp_size", [1, 3])
def test_every_instruction_set_that_the_machine_has(tp_size: int, tmp_path: Path) -> None:
    model = save_random_llama(tmp_path, **CONFIGS["gqa_3_to_1"])
    ids = _ids(500)
    ours = prompt_logits(group_config(tmp_path, tp_size), ids, chunk=100)
    assert (ours - _reference(model, ids)).abs().max() <= MAX_LOGIT_ERROR


SMOLLM2_CASES = [(backend, tp_size) for backend in BACKENDS for tp_size in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("backend", "tp_size"), rest_by_night(SMOLLM2_CASES, by_day=[("cpu", 2), ("reference", 3)], has_names=True)
)
def test_smollm2_logits_match_transformers(smollm2: LlamaForCausalLM, smollm2_path: Path, tp_size: int) -> None:
    ids = _ids(smollm2.config.vocab_size)
    ours = prompt_logits(group_config(smollm2_path, tp_size), ids, chunk=PROMPT_LEN)
    assert (ours - _reference(smollm2, ids)).abs().max() <= MAX_LOGIT_ERROR


CHUNK_CASES = list(
    itertools.product((1, 2, 3), ("float32", "bfloat16"), (*BACKENDS, *(f"cpu-{each}" for each in INSTRUCTION_SETS)))
)
CHUNK_CASES_BY_DAY = [case for case in CHUNK_CASES if case[2] == "cpu"] + [
    (1, "float32", "reference"),
    (2, "bfloat16", "reference"),
]


@pytest.mark.parametrize(
    ("tp_size", "dtype", "backend"), rest_by_night(CHUNK_CASES, by_day=CHUNK_CASES_BY_DAY, has_names=True)
)
def test_logits_do_not_depend_on_chunks(tp_size: int, dtype: str, tmp_path: Path) -> None:
    save_random_llama(tmp_path, **CONFIGS["gqa_3_to_1"])
    # More than a tile of the attention kernels, which is 128 positions.
    ids, config = _ids(500)[: by_day(150, by_night=PROMPT_LEN)], group_config(tmp_path, tp_size, dtype=dtype)
    whole = prompt_logits(config, ids, chunk=PROMPT_LEN)
    for chunk in (1, 7, 64):
        assert torch.equal(prompt_logits(config, ids, chunk), whole), f"chunks of {chunk}"


@pytest.mark.parametrize(
    ("backend", "tp_size"),
    rest_by_night(
        [(backend, tp_size) for backend in BACKENDS for tp_size in (1, 2, 3)], by_day=[("cpu", 2)], has_names=True
    ),
)
def test_bfloat16_agrees_with_float32_on_the_most_likely_token(
    smollm2: LlamaForCausalLM, smollm2_path: Path, tp_size: int
) -> None:
    """On natural text."""
    tokenizer, licence = load_tokenizer(smollm2_path), (ROOT / "LICENSE").read_text()
    length = by_day(150, by_night=400)
    prompts = [tokenizer.encode(text)[:length] for text in (licence[3000:6000], licence[6000:9000], TALE)]
    expected = torch.cat([_reference(smollm2, ids).argmax(-1) for ids in prompts])
    config = group_config(smollm2_path, tp_size, dtype="bfloat16")
    ours = torch.cat([prompt_logits(config, ids, chunk=512).argmax(-1) for ids in prompts])
    assert (ours == expected).float().mean() >= 0.99
