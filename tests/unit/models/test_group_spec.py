"""From a configuration's entry to a group's specification."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from model_parallel.config import AdapterConfig, DraftConfig, ParallelConfig
from model_parallel.errors import CheckpointError, ConfigError
from model_parallel.machine import Machine
from serving.config import AdapterEntry, ModelEntry
from serving.contracts.models import AdapterCard
from serving.models.group_spec import check_memory, describe_card, held_bytes, resolve_model
from serving.models.sizes import draft_memory_of
from tests.support.adapter_directories import MODEL as TINY
from tests.support.adapter_directories import save_adapter
from tests.support.llama_tokenizers import byte_level_json, llama_directory, tokenizer_json


def _entry(path: Path, **overrides: object) -> ModelEntry:
    return ModelEntry.model_validate({"name": "small", "source": str(path), **overrides})


def test_the_cache_bounds_the_length(smollm2_path: Path) -> None:
    assert resolve_model(_entry(smollm2_path)).card.max_model_len == 8192
    spec = resolve_model(_entry(smollm2_path, kv_cache_tokens=1000, block_size=16, deterministic=True))
    assert spec.parallel.deterministic and not resolve_model(_entry(smollm2_path)).parallel.deterministic
    assert (spec.cache.num_blocks, spec.card.max_model_len) == (63, 1008)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"max_model_len": 10_000}, ["10000", "8192"]),
        ({"max_model_len": 4096, "kv_cache_tokens": 1024}, ["4096", "1024"]),
        ({"tensor_parallel_size": 10}, ["models.small.tensor_parallel_size is 10", "9 query heads"]),
    ],
)
def test_what_cannot_work_is_refused_with_both_numbers(
    overrides: dict[str, object], parts: list[str], smollm2_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model(_entry(smollm2_path, **overrides))
    assert all(part in str(caught.value) for part in parts), caught.value


def test_each_rank_needs_a_token() -> None:
    model = replace(TINY, vocab_size=4)
    ParallelConfig(tp_size=4).check_fits(model)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size is 5 .* vocabulary has 4 tokens; .* the most is 4"):
        ParallelConfig(tp_size=5).check_fits(model)


def machine(available_bytes: int) -> Machine:
    return Machine(
        num_cpus=4, num_host_cpus=4, total_memory_bytes=available_bytes, available_memory_bytes=available_bytes
    )


def test_what_does_not_fit_the_host_is_refused(smollm2_path: Path) -> None:
    spec = resolve_model(_entry(smollm2_path, tensor_parallel_size=2, num_groups=2, kv_cache_tokens=100_000))
    check_memory([spec], machine(64 << 30))
    with pytest.raises(ConfigError, match=r"models\.small .* 100000 tokens of KV cache.* tokens fit"):
        check_memory([spec], machine(6 << 30))


def test_adapters_are_checked_with_their_model(smollm2_path: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path)  # of another model
    adapter = {"name": "small-sql", "source": str(tmp_path)}
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors lacks .*layers"):
        resolve_model(_entry(smollm2_path, lora={"adapters": [adapter]}))


def _card(source: Path, config: AdapterConfig | None) -> AdapterCard:
    entry = AdapterEntry(name="tiny-sql", source=source, tenants=("acme",))
    return describe_card(entry, "tiny", TINY, ParallelConfig(), config, is_configured=True)


def test_an_adapter_has_room_on_its_ranks(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    card = _card(tmp_path, AdapterConfig())
    assert (card.name, card.parent, card.rank, card.tenants) == ("tiny-sql", "tiny", 4, ("acme",))
    with pytest.raises(
        ConfigError, match=r"'tiny-sql' takes \d+ bytes on a rank, and models\.tiny\.lora\.max_bytes is 9"
    ):
        _card(tmp_path, AdapterConfig(max_bytes=9))
    with pytest.raises(ConfigError, match="model 'tiny' takes no adapters: its lora section is not set"):
        _card(tmp_path, None)


def test_memory_for_adapters_is_set_aside(smollm2_path: Path) -> None:
    spec = resolve_model(_entry(smollm2_path, lora={"max_bytes": 8 << 30}))
    assert spec.adapter_config is not None and spec.adapters == ()
    with pytest.raises(ConfigError, match=r"adapters 8\.00 GiB"):
        check_memory([spec], machine(8 << 30))


def _tiny(path: Path, tokenizer: str | None = None) -> Path:
    path.mkdir()
    return llama_directory(path, tokenizer__json=tokenizer or tokenizer_json())


def test_a_draft_model_has_the_same_tokens(smollm2_path: Path, tmp_path: Path) -> None:
    model, draft, other = (
        _tiny(tmp_path / name, tokenizer)
        for name, tokenizer in (("model", None), ("draft", None), ("other", byte_level_json([])))
    )
    given = {"device": "cpu", "speculation": "auto", "kv_cache_tokens": 1000}
    spec, plain = (resolve_model(_entry(model, **given, draft_model=each)) for each in (str(draft), None))
    assert spec.draft == DraftConfig(checkpoint_path=str(draft), share=1.0)
    memory = draft_memory_of(spec.entry)
    assert memory is not None
    drafts = held_bytes(spec, 1) - held_bytes(plain, 1)
    assert drafts >= memory.weight_bytes + memory.kv_bytes_per_token * spec.cache.num_tokens
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}<|im_start|>"
    (draft / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ConfigError, match="needs the control token"):
        resolve_model(_entry(draft, **given))
    assert resolve_model(_entry(model, **given, draft_model=str(draft))).draft == spec.draft  # nobody chats with it
    with pytest.raises(ConfigError, match=r"^models\.small\.source 'nowhere' is neither a known model nor an existing"):
        resolve_model(_entry(Path("nowhere"), **given))
    with pytest.raises(
        ConfigError, match=r"models\.small\.draft_model 'nowhere' is neither a known model nor an existing"
    ):
        resolve_model(_entry(model, **given, draft_model="nowhere"))
    with pytest.raises(ConfigError, match=r"models\.small\.draft_model: .* has 49152 tokens, and .*model has 512"):
        resolve_model(_entry(model, **given, draft_model=str(smollm2_path)))
    with pytest.raises(
        ConfigError, match=r"models\.small\.draft_model: token \d+ is b'.*' in .*other, and b'.*' in .*model"
    ):
        resolve_model(_entry(model, **given, draft_model=str(other)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"speculation": "off"}, "speculation is off, and draft_model needs auto"),
        ({"speculation": "prompt_lookup"}, "speculation is prompt_lookup, and draft_model needs auto"),
        ({"speculation": "auto", "device": "cuda"}, "device is cuda, and draft_model works on CPUs alone"),
    ],
)
def test_a_draft_model_that_would_not_be_used_is_refused(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _entry(Path("model"), draft_model="draft", **overrides)


def test_fp8_and_deterministic_exclude_each_other(smollm2_path: Path) -> None:
    with pytest.raises(
        ValueError, match="deterministic is true, and quantization fp8, whose products depend on what else"
    ):
        _entry(smollm2_path, quantization="fp8", deterministic=True)
    with pytest.raises(ConfigError, match=r"parallel\.deterministic is true, and fp8 products depend on what else"):
        ParallelConfig(quantization="fp8", deterministic=True)
