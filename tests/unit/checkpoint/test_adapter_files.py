"""Directories with adapters: what fits a model, and by what name everything else is refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model_parallel.checkpoint import patterns
from model_parallel.checkpoint.adapter_files import adapter_bytes, adapter_shards, describe_adapter
from model_parallel.checkpoint.adapter_weights import load_adapter
from model_parallel.errors import CheckpointError
from model_parallel.model.partition import shard_table
from tests.support.adapter_directories import MODEL, MODULES, Tensors, adapter_tensors, save_adapter, tensor_name


def test_settings_and_modules(tmp_path: Path) -> None:
    save_adapter(
        tmp_path, adapter_tensors(MODULES), base_model_name_or_path="a/base", lora_dropout=0.1, inference_mode=True
    )
    info = describe_adapter(tmp_path, MODEL)
    assert (info.rank, info.scale, info.base_model) == (4, 2.0, "a/base")
    assert list(info.modules) == sorted(MODULES)
    save_adapter(tmp_path, adapter_tensors(MODULES), use_rslora=True)
    again = describe_adapter(tmp_path, MODEL)
    assert again.scale == 4.0
    assert again.digest != info.digest


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (["q_proj"], {"self_attn.q_proj"}),
        (["self_attn.q_proj", "down_proj"], {"self_attn.q_proj", "mlp.down_proj"}),
        (r"model\.layers\.\d+\.mlp\.(up|gate)_proj", {"mlp.up_proj", "mlp.gate_proj"}),
    ],
)
def test_targets(tmp_path: Path, targets: Any, wanted: set[str]) -> None:
    modules = [module for module in MODULES if module.split(".", 3)[3] in wanted]
    save_adapter(tmp_path, adapter_tensors(modules), target_modules=targets)
    assert describe_adapter(tmp_path, MODEL).modules == tuple(sorted(modules))


def test_excluded_modules(tmp_path: Path) -> None:
    modules = [module for module in MODULES if "layers.1.mlp" not in module]
    save_adapter(tmp_path, adapter_tensors(modules), exclude_modules=r".*layers\.1\.mlp.*")
    assert describe_adapter(tmp_path, MODEL).modules == tuple(sorted(modules))


@pytest.mark.parametrize("made", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica", "MiCA"])
def test_initialisations_that_leave_the_base_model_alone(tmp_path: Path, made: Any) -> None:
    save_adapter(tmp_path, adapter_tensors(MODULES), init_lora_weights=made)
    assert describe_adapter(tmp_path, MODEL).modules == tuple(sorted(MODULES))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA can be served"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS', which is not supported"),
        ({"bias": "all"}, "bias is 'all', which is not supported"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], which is not supported"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"layers_to_transform": [0]}, r"layers_to_transform is \[0\]"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"something_new": 3}, "something_new is 3, which is not supported; it must not be set"),
        *(
            (
                {"init_lora_weights": made},
                f"init_lora_weights is {re.escape(repr(made))}; allowed: true, false, gaussian, eva",
            )
            for made in (
                "pissa_niter_16",
                "olora",
                "OLoRA",
                "corda",
                "loftq",
                "lora_ga",
                "something_new",
                "",
                3,
                ["eva"],
            )
        ),
        ({"r": 0}, "r is 0; allowed: from 1 to 128"),
        ({"r": 256}, "r is 256; allowed: from 1 to 128"),
        ({"r": None}, "does not give r"),
        ({"r": 2.5}, "r is 2.5; a whole number is needed"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'; a number"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'; true or false is needed"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules names lm_head, which cannot be adapted"),
        ({"target_modules": ["embed_tokens"]}, "target_modules names model.embed_tokens, which cannot be adapted"),
        ({"target_modules": ["c_attn"]}, "names no matrix of the model"),
        ({"target_modules": "("}, "which is no pattern"),
        ({"target_modules": "(.*.*)*(.*.*)*(.*.*)*Z"}, r"which takes more than 1 s, or more memory than it may"),
        ({"exclude_modules": "(.*.*)*(.*.*)*(.*.*)*Z"}, r"exclude_modules is .*, which takes more than 1 s"),
        ({"target_modules": "a" * 1001}, r"which has 1001 characters; allowed: 1000"),
        ({"target_modules": None}, "target_modules is None; names, or one pattern, are needed"),
        ({"target_modules": [1]}, r"target_modules is \[1\]"),
    ],
)
def test_settings_that_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "MAX_CPU_S", 1)
    save_adapter(tmp_path, adapter_tensors(MODULES), **settings)
    with pytest.raises(CheckpointError, match=message) as raised:
        describe_adapter(tmp_path, MODEL)
    assert str(tmp_path / "adapter_config.json") in str(raised.value)


Q = MODULES[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(tensor_name(Q, "B")), f"lacks {tensor_name(Q, 'B')}"),
        (lambda t: t.update({"extra": torch.ones(1)}), "holds tensors that cannot be served.*: extra"),
        (lambda t: t.update({tensor_name(Q, "A"): torch.ones(4, 35)}), rf"{tensor_name(Q, 'A')} has shape \[4, 35\]"),
        (lambda t: t.update({tensor_name(Q, "A"): torch.ones(8, 36)}), r"the model and r = 4 need \[4, 36\]"),
        (lambda t: t.update({tensor_name(Q, "B"): torch.ones(36, 4, dtype=torch.int8)}), "is of type I8"),
        (lambda t: t.update({tensor_name(Q, "magnitude"): torch.ones(36)}), "lora_magnitude"),
    ],
    ids=["missing", "left over", "features", "rank", "type", "dora"],
)
def test_tensors_that_are_refused(tmp_path: Path, change: Callable[[Tensors], Any], message: str) -> None:
    tensors = adapter_tensors(MODULES)
    change(tensors)
    save_adapter(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=message) as raised:
        describe_adapter(tmp_path, MODEL)
    assert str(tmp_path / "adapter_model.safetensors") in str(raised.value)


def test_files_that_are_not_there_or_broken(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no directory; an adapter is one with"):
        describe_adapter(tmp_path / "nowhere", MODEL)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        describe_adapter(tmp_path, MODEL)
    save_adapter(tmp_path, adapter_tensors(MODULES))
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for content in (b"", whole[:100], whole[:-1], b"version https://git-lfs.github.com/spec/v1\nsize 99\n"):
        weights.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
            describe_adapter(tmp_path, MODEL)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin cannot be read: save the adapter as safetensors"):
        describe_adapter(tmp_path, MODEL)


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    tensors = adapter_tensors(MODULES)
    tensors[tensor_name(Q, "B")][3, 1] = torch.inf
    save_adapter(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=rf"{tensor_name(Q, 'B')} holds numbers that are not finite"):
        load_adapter(tmp_path, describe_adapter(tmp_path, MODEL).digest, MODEL, 1, 0, torch.float32)


def test_a_directory_that_has_changed(tmp_path: Path) -> None:
    save_adapter(tmp_path, adapter_tensors(MODULES))
    digest = describe_adapter(tmp_path, MODEL).digest
    save_adapter(tmp_path, adapter_tensors(MODULES), lora_alpha=9)
    with pytest.raises(CheckpointError, match="holds another adapter than when it was added"):
        load_adapter(tmp_path, digest, MODEL, 1, 0, torch.float32)


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 9])
def test_parts_make_the_whole(tmp_path: Path, tp_size: int) -> None:
    """The ranks' products, side by side or added, are those of the whole: uneven heads and shared key/value heads too."""
    tensors = adapter_tensors(MODULES)
    save_adapter(tmp_path, tensors)
    info = describe_adapter(tmp_path, MODEL)
    tables = [shard_table(MODEL, tp_size, rank) for rank in range(tp_size)]
    for module in MODULES:
        whole = tensors[tensor_name(module, "B")] @ tensors[tensor_name(module, "A")]
        summed = torch.zeros_like(whole)
        for table in tables:
            down, up = adapter_shards(module, table, 4)
            part = tensors[tensor_name(module, "B")][up.index] @ tensors[tensor_name(module, "A")][down.index]
            summed[table[f"{module}.weight"].index] = part
        torch.testing.assert_close(summed, whole)
    loaded = [load_adapter(tmp_path, info.digest, MODEL, tp_size, rank, torch.float32) for rank in range(tp_size)]
    sizes = [
        sum(part.down_RI.nbytes + part.up_OR.nbytes for update in updates.values() for part in update.parts)
        for updates in loaded
    ]
    assert max(sizes) <= adapter_bytes(info, MODEL, tp_size, dtype="float32")
    qkv = loaded[0]["model.layers.0.self_attn.qkv_proj.weight"]
    heads = sum(tables[0][f"model.layers.0.self_attn.{m}_proj.weight"].shape[0] for m in "qkv")
    assert qkv.num_outputs == heads == qkv.parts[-1].last_output
    assert [part.first_output for part in qkv.parts] == sorted(part.first_output for part in qkv.parts)
