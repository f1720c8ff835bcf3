"""Directories with adapters: what fits a model, and by what name everything else is refused."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from model_parallel.checkpoint import patterns
from model_parallel.checkpoint.adapter_files import (
    AdapterReader,
    AdapterTensor,
    adapter_bytes,
    adapter_shards,
    describe_adapter,
)
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


WEIGHTS = "adapter_model.safetensors"
LARGE = {"r": 128}
"""Of an adapter that is larger than what is read of a file at once."""


def after_the_first_tensor(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Have `change` called once, in the middle of the next reading of an adapter."""
    tensors = AdapterReader.tensors

    def interrupted(reader: AdapterReader) -> Iterator[AdapterTensor]:
        read = tensors(reader)
        yield next(read)
        monkeypatch.undo()
        change()
        yield from read

    monkeypatch.setattr(AdapterReader, "tensors", interrupted)


def load(path: Path, digest: str) -> dict[str, Any]:
    return load_adapter(path, digest, MODEL, 1, 0, torch.float32)


@pytest.mark.parametrize("describes", [False, True], ids=["loaded", "described"])
@pytest.mark.parametrize("num_bytes", [0, 100, -1, 1], ids=["emptied", "header", "shorter", "longer"])
def test_a_file_whose_length_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int, *, describes: bool
) -> None:
    save_adapter(tmp_path, adapter_tensors(MODULES, rank=128), **LARGE)
    digest, file = describe_adapter(tmp_path, MODEL).digest, tmp_path / WEIGHTS
    size = file.stat().st_size
    after_the_first_tensor(
        monkeypatch, lambda: os.truncate(file, num_bytes if num_bytes not in (-1, 1) else size + num_bytes)
    )
    with pytest.raises(CheckpointError, match=WEIGHTS):
        describe_adapter(tmp_path, MODEL) if describes else load(tmp_path, digest)


def test_a_file_that_is_written_anew_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of two adapters are neither of them, and what is not finite there is no fault of either."""
    tensors = adapter_tensors(MODULES, rank=128)
    save_adapter(tmp_path, {name: tensor * torch.nan for name, tensor in tensors.items()}, **LARGE)
    other = (tmp_path / WEIGHTS).read_bytes()
    save_adapter(tmp_path, tensors, **LARGE)
    digest = describe_adapter(tmp_path, MODEL).digest
    after_the_first_tensor(monkeypatch, lambda: (tmp_path / WEIGHTS).write_bytes(other))
    with pytest.raises(CheckpointError, match="holds another adapter than when it was added"):
        load(tmp_path, digest)


def test_files_that_are_replaced_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was opened is read to its end: the digest and the weights are both those of the adapter before."""
    tensors = adapter_tensors(MODULES, rank=128)
    save_adapter(tmp_path, tensors, **LARGE)
    digest, loaded = describe_adapter(tmp_path, MODEL).digest, load(tmp_path, describe_adapter(tmp_path, MODEL).digest)

    def replace() -> None:
        (tmp_path / "new").mkdir(exist_ok=True)
        save_adapter(tmp_path / "new", {name: 2 * tensor for name, tensor in tensors.items()}, lora_alpha=9, **LARGE)
        for file in (tmp_path / "new").iterdir():
            file.replace(tmp_path / file.name)

    after_the_first_tensor(monkeypatch, replace)
    again = load(tmp_path, digest)
    for name, update in loaded.items():
        for part, part_again in zip(update.parts, again[name].parts, strict=True):
            assert torch.equal(part.down_RI, part_again.down_RI) and torch.equal(part.up_OR, part_again.up_OR)
    with pytest.raises(CheckpointError, match="holds another adapter than when it was added"):
        load(tmp_path, digest)
    save_adapter(tmp_path, tensors, **LARGE)
    after_the_first_tensor(monkeypatch, replace)
    assert describe_adapter(tmp_path, MODEL).digest == digest != describe_adapter(tmp_path, MODEL).digest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_those_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in adapter_tensors(MODULES).items()}
    save_adapter(tmp_path, tensors)
    loaded = load(tmp_path, describe_adapter(tmp_path, MODEL).digest)
    update = loaded["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(update.parts[0].down_RI, tensors[tensor_name("model.layers.1.mlp.down_proj", "A")].float())
    assert torch.equal(update.parts[0].up_OR, tensors[tensor_name("model.layers.1.mlp.down_proj", "B")].float() * 2)


@given(data=st.data())
def test_a_damaged_header_is_refused_or_read_as_the_library_reads_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged")
    module = MODULES[0]
    save_adapter(path, adapter_tensors([module]), target_modules=[module])
    file = path / WEIGHTS
    content = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        # Mostly digits, because in them are the offsets and shapes.
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.sampled_from(b"0123456789") | st.integers(0, 255))
    file.write_bytes(content)
    reader = AdapterReader(path, MODEL)
    try:
        read = {tensor.name: bytes(tensor.content) for tensor in reader.tensors()}
    except CheckpointError as error:
        assert WEIGHTS in str(error)
        return
    assert read == {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    "offsets",
    [
        ([0, 576], [500, 1076]),
        ([0, 576], [600, 1176]),
        ([8, 584], [584, 1160]),
        ([0, 576], [576, 1148]),
        ([0, 576], [0, 576]),
        ([576, 0], [576, 1152]),
        ([0, 576], [-576, 0]),
    ],
    ids=["overlap", "gap", "begin", "length", "same", "backwards", "negative"],
)
def test_tensors_that_do_not_lie_one_after_the_other(tmp_path: Path, offsets: tuple[list[int], list[int]]) -> None:
    save_adapter(tmp_path, adapter_tensors(MODULES[:1]), target_modules=MODULES[:1])
    names = [tensor_name(MODULES[0], part) for part in "AB"]
    entries = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": where}
        for name, shape, where in zip(names, ([4, 36], [36, 4]), offsets, strict=True)
    }
    header = json.dumps(entries).encode()
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(1152))
    with pytest.raises(CheckpointError, match=WEIGHTS):
        describe_adapter(tmp_path, MODEL)
    with pytest.raises(SafetensorError), safe_open(tmp_path / WEIGHTS, framework="pt"):
        pass


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
