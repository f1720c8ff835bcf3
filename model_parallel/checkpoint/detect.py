"""What a checkpoint is, read from its configuration alone: no torch, no weights, and no code that comes with it."""

from pathlib import Path

from model_parallel.checkpoint.huggingface_config import describe_huggingface
from model_parallel.checkpoint.info import CheckpointInfo, TokenizerKind
from model_parallel.checkpoint.meta_config import describe_meta, directory_name
from model_parallel.checkpoint.placeholders import GGUF_MAGIC, is_present, what_it_is
from model_parallel.checkpoint.settings import join, read_json
from model_parallel.errors import CheckpointError

__all__ = ["CheckpointInfo", "TokenizerKind", "describe", "directory_name", "read_json"]


def describe(source: Path) -> CheckpointInfo:
    """Read the configuration of a directory in Hugging Face's or Meta's format, or of a GGUF file.

    Raises CheckpointError naming the file and the setting when something is missing, broken, or would need arithmetic
    that is not implemented.
    """
    if source.is_file():
        return _describe_file(source)
    if source.is_symlink() and not source.exists():
        raise CheckpointError(f"{source} {what_it_is(source)}")
    if not source.is_dir():
        problem = "is neither a file nor a directory" if source.exists() else "does not exist"
        raise CheckpointError(
            f"{source} {problem}; a directory in Hugging Face's or Meta's format or a GGUF file is needed"
        )
    if is_present(source / "config.json"):
        return describe_huggingface(source)
    if is_present(source / "params.json"):
        return describe_meta(source)
    raise CheckpointError(
        f"{source} holds neither config.json (Hugging Face's format) nor params.json (Meta's){_instead(source)}"
    )


def _describe_file(source: Path) -> CheckpointInfo:
    with source.open("rb") as file:
        magic = file.read(len(GGUF_MAGIC))
    if magic == GGUF_MAGIC:
        from model_parallel.checkpoint.gguf_config import describe_gguf  # noqa: PLC0415 - needs NumPy, a quarter of what a command loads

        return describe_gguf(source)
    found = what_it_is(source)
    reason = f": it {found}" if found else ""
    if source.name in ("config.json", "params.json") or source.suffix in (".safetensors", ".bin", ".pth", ".model"):
        reason += f"; to serve the checkpoint around it, give its directory, {source.parent}"
    raise CheckpointError(f"{source} is not a GGUF file{reason}")


def _instead(directory: Path) -> str:
    """What a directory without a configuration holds that could be meant."""
    if (directory / "adapter_config.json").is_file():
        return "; it holds an adapter (LoRA): name it in the lora section of its base model, or merge the two"
    entries = sorted(directory.iterdir())
    if files := [path.name for path in entries if path.suffix == ".gguf"]:
        return f"; to serve a GGUF file in it, name the file: {join(files)}"
    holds = ("config.json", "params.json")
    if inner := [path.name for path in entries if any(is_present(path / name) for name in holds)]:
        return f"; did you mean a directory in it: {join(inner)}"
    if snapshots := sorted(directory.glob("snapshots/*/config.json")):
        return f"; did you mean {snapshots[-1].parent}"
    return "" if entries else "; it is empty"
