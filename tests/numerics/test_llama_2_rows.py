"""The twelve repositories of Llama 2: small twins of each, with the published heads, files and rules.

The same with the published widths: `pytest -m slow tests/numerics/test_llama_2_rows.py` (docs/llama2.md has results).
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from bench.support.synthetic_llama import Format, SyntheticLlama, full_width, meta_logits, twin
from model_parallel.checkpoint.detect import describe
from model_parallel.checkpoint.stored import StoredTensor
from model_parallel.engine.request import EngineRequest, SamplingParams
from tests.support.effort import is_night
from tests.support.local_engine import LocalGroup
from tests.support.ranks import group_config, prompt_logits
from tests.support.shards import load_parts

PROMPT_LEN = 32
MAX_RELATIVE_ERROR = 2e-3
ROWS: list[tuple[str, str, Format]] = [
    (size, chat, form) for size in ("7b", "13b", "70b") for chat in ("", "-chat") for form in ("meta", "hf")
]
TP_SIZES = {"7b": (1, 2, 3, 4, 5, 8), "13b": (1, 2, 4, 8), "70b": (1, 2, 3, 4, 8, 16)}
FULL_WIDTH_TP_SIZES = {"7b": (1, 2, 3, 4, 8), "13b": (1, 2, 4, 8), "70b": (1, 2, 4, 8, 16)}


def row_name(size: str, chat: str, form: Format) -> str:
    return f"llama-2-{size}{chat}{'-hf' if form == 'hf' else ''}"


@pytest.fixture(scope="module", params=ROWS, ids=[row_name(*row) for row in ROWS])
def row(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[SyntheticLlama, Path]:
    size, chat, form = request.param
    model = twin(size)
    return model, model.write(tmp_path_factory.mktemp("row") / row_name(size, chat, form), form)


def prompt(model: SyntheticLlama) -> list[int]:
    draw = torch.Generator().manual_seed(4)
    return torch.randint(3, model.vocab_size, (PROMPT_LEN,), generator=draw).tolist()


def reference_logits(model: SyntheticLlama, path: Path) -> Tensor:
    """transformers' for a directory in Hugging Face's format, the definition's for one in Meta's."""
    if (path / "params.json").exists():
        return meta_logits(model, prompt(model))
    theirs = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return theirs(torch.tensor([prompt(model)])).logits[0]


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max())


def test_description(row: tuple[SyntheticLlama, Path]) -> None:
    model, path = row
    info = describe(path)
    assert info.format == ("meta" if (path / "params.json").exists() else "huggingface")
    config = info.config
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (model.vocab_size, model.dim, model.ffn)
    assert (config.num_query_heads, config.num_kv_heads, config.num_layers) == (model.n_heads, model.n_kv_heads, 2)
    assert (config.max_position, config.rope_theta, config.rms_norm_eps) == (4096, 10000.0, 1e-5)
    assert (config.bos_token_id, config.eos_token_ids, info.tokenizer_kind) == (1, (2,), "tokenizer.model")
    assert config.num_parameters == sum(model.tensor(name).numel() for name in model.shapes())
    is_chat = "chat" in path.name  # Meta's format has no template
    assert info.chat_format == ("llama-2" if is_chat and info.format == "meta" else "")
    assert bool(info.chat_template) == (is_chat and info.format == "huggingface")
    assert len(info.weight_files) == (model.num_files if info.format == "meta" else 3)


def test_logits_at_every_tensor_parallel_size(row: tuple[SyntheticLlama, Path]) -> None:
    model, path = row
    reference = reference_logits(model, path)
    # A chat model differs in its files alone.
    sizes = TP_SIZES[model.size] if is_night() or "chat" not in path.name else (1, 2)
    for tp_size in sizes:
        ours = prompt_logits(group_config(path, tp_size), prompt(model), chunk=PROMPT_LEN)
        assert relative_error(ours, reference) <= MAX_RELATIVE_ERROR, tp_size


@pytest.mark.parametrize("size", ["7b", "13b", "70b"])
def test_both_formats_are_the_same_model(size: str, tmp_path: Path) -> None:
    """The weights that ranks load are equal bit for bit, and so are the tokens."""
    model = twin(size)
    paths = [model.write(tmp_path / form, form) for form in ("meta", "hf")]
    for num_ranks in (1, 3, 8):
        for rank in range(num_ranks):
            from_meta, from_hf = (load_parts(describe(path), num_ranks, rank) for path in paths)
            assert from_meta.keys() == from_hf.keys()
            for name, tensor in from_meta.items():
                assert torch.equal(tensor, from_hf[name]), (num_ranks, rank, name)
    sampling = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    asked = EngineRequest(request_id="r", prompt_token_ids=tuple(prompt(model)), sampling=sampling, eos_token_ids=(2,))
    answers = []
    for path in paths:
        group = LocalGroup(path, 2)
        answers.append(group.run([asked]).tokens("r"))
        group.close()
    assert answers[0] == answers[1]
    assert len(answers[0]) == 16


def test_only_the_files_that_hold_the_slice_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight files, one of 16 ranks: its half of one file's heads and feed-forward columns."""
    path = twin("70b").write(tmp_path / "llama-2-70b", "meta")
    read: set[Path] = set()

    def spy(part: StoredTensor) -> Tensor:
        assert part.mapped is not None
        if part.mapped.ndim > 1 and not {520, 65} & {*part.mapped.shape}:  # the vocabulary is cut at other places
            read.add(part.file)
        return part.mapped

    monkeypatch.setattr("model_parallel.checkpoint.meta._mapped", spy)
    load_parts(describe(path), 16, 5)
    assert read == {path / "consolidated.02.pth"}


def write_row(size: str, form: Format, directory: Path) -> tuple[SyntheticLlama, Path]:
    model = full_width(size)
    return model, model.write(directory / row_name(size, "", form), form)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("size", "form"), [(size, form) for size in TP_SIZES for form in ("meta", "hf")])
def test_logits_at_full_width(size: str, form: Format, tmp_path: Path) -> None:
    """The published width with two layers. Base and chat models differ in their weights and chat template alone."""
    model, path = write_row(size, form, tmp_path)
    reference = reference_logits(model, path)
    for tp_size in FULL_WIDTH_TP_SIZES[size]:
        error = relative_error(prompt_logits(group_config(path, tp_size), prompt(model), chunk=PROMPT_LEN), reference)
        print(f"{path.name} TP={tp_size}: largest difference {error:.1e} of the largest logit")
        assert error <= MAX_RELATIVE_ERROR
