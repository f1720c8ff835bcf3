"""Which files of a directory in Hugging Face's format hold its weights.

Where an index exists it decides, as it does for those who wrote it: what else lies in the directory is stale. Files named
NAME-00001-of-00002 without an index are taken together. safetensors files are taken before torch's.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from model_parallel.checkpoint.placeholders import is_present
from model_parallel.checkpoint.settings import join, read_json
from model_parallel.errors import CheckpointError

_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARD = {
    ".safetensors": re.compile(r"model-(\d+)-of-(\d+)\.safetensors"),
    ".bin": re.compile(r"pytorch_model-(\d+)-of-(\d+)\.bin"),
}
# What people have beside, or instead of, weights that can be read, and what to do about it.
_OTHER_FORMATS = {
    "adapter_config.json": "it holds an adapter (LoRA); name it in the lora section of its base model, or merge the two",
    "consolidated.safetensors": "consolidated.safetensors is of Mistral's own format; download the model-*.safetensors files",
    "tf_model.h5": "TensorFlow's weights cannot be read; convert them to safetensors with transformers",
    "flax_model.msgpack": "Flax's weights cannot be read; convert them to safetensors with transformers",
    "model.onnx": "ONNX cannot be read; download the safetensors files",
}


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files, in order, their index where there is one, and what was ignored."""

    files: tuple[Path, ...]
    index: Path | None = None
    warnings: tuple[str, ...] = ()


def find_weight_files(directory: Path) -> WeightFiles:
    """Raises CheckpointError naming everything that is missing."""
    for single, several in zip(_SINGLE_FILES, _INDEX_FILES, strict=True):
        if is_present(directory / several):
            return _indexed(directory / several, single)
        if is_present(directory / single):
            return WeightFiles((directory / single,), None, _stale_shards(directory / single))
        if files := _numbered(directory, Path(single).suffix):
            return WeightFiles(files)
    for name, advice in _OTHER_FORMATS.items():
        if (directory / name).exists():
            raise CheckpointError(f"{directory} holds none of {', '.join((*_SINGLE_FILES, *_INDEX_FILES))}: {advice}")
    loose = sorted(path.name for path in directory.iterdir() if path.suffix in (".safetensors", ".gguf"))
    hint = f"; it holds {join(loose)}, which is no name that is looked for" if loose else ""
    raise CheckpointError(f"{directory} holds none of {', '.join((*_SINGLE_FILES, *_INDEX_FILES))}{hint}")


def read_weight_map(index: Path) -> dict[str, str]:
    """File names by tensor, from an index. Raises CheckpointError."""
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointError(f"{index}: weight_map must give a file name for each tensor")
    return weight_map


def _indexed(index: Path, single: str) -> WeightFiles:
    directory, suffix = index.parent, Path(single).suffix
    names = sorted(set(read_weight_map(index).values()))
    for name in names:
        if Path(name).name != name or Path(name).suffix != suffix:
            raise CheckpointError(f"{index}: {name!r:.80} is not the name of a {suffix} file in the same directory")
    if missing := [name for name in names if not is_present(directory / name)]:
        other = [n for n in _SINGLE_FILES + _INDEX_FILES if n not in (single, index.name) and (directory / n).is_file()]
        hint = f"; to load {other[0]} instead, delete {index.name}" if other else "; download what is missing"
        verb = "is" if len(missing) == 1 else "are"
        raise CheckpointError(f"{index} names {join(missing)}, which {verb} missing{hint}")
    stale = [name for name in _present(directory, suffix, single) if name not in names]
    warnings = (f"{directory}: {index.name} does not name {join(stale)}: not read",) if stale else ()
    return WeightFiles(tuple(directory / name for name in names), index, warnings)


def _present(directory: Path, suffix: str, single: str) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if p.name == single or _SHARD[suffix].fullmatch(p.name))


def _stale_shards(single: Path) -> tuple[str, ...]:
    others = [name for name in _present(single.parent, single.suffix, single.name) if name != single.name]
    return (f"{single.parent}: {single.name} is read, and not {join(others)}, which have no index",) if others else ()


def _numbered(directory: Path, suffix: str) -> tuple[Path, ...]:
    """Files NAME-i-of-n, all n of them; () when there is none."""
    found = {p: m for p in sorted(directory.iterdir()) if (m := _SHARD[suffix].fullmatch(p.name))}
    if not found:
        return ()
    counts = sorted({int(match[2]) for match in found.values()})
    if len(counts) > 1:
        raise CheckpointError(
            f"{directory} holds files of {' and of '.join(map(str, counts))} parts, and no index says which are the "
            "model's; delete the stale ones"
        )
    numbers = {int(match[1]) for match in found.values()}
    if missing := [number for number in range(1, counts[0] + 1) if number not in numbers]:
        raise CheckpointError(
            f"{directory} lacks {join(f'part {n} of {counts[0]}' for n in missing)} of its {suffix} files, and has no "
            "index; download what is missing"
        )
    return tuple(found)
