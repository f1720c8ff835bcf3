"""The digest of a checkpoint changes with what is read of it, and with nothing else."""

from pathlib import Path

import pytest

from model_parallel.checkpoint.detect import describe
from model_parallel.checkpoint.fingerprint import fingerprint
from tests.support.llama_tokenizers import llama_directory, tokenizer_json, write_gguf


def digest(source: Path) -> str:
    return fingerprint(describe(source))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return llama_directory(
        tmp_path, tokenizer__json=tokenizer_json(), tokenizer_config__json="{}", generation_config__json="{}"
    )


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_what_is_used_counts(directory: Path, name: str) -> None:
    before = digest(directory)
    path = directory / name
    path.write_bytes(path.read_bytes() + (b"\n" if path.suffix == ".json" else b"\0"))
    assert digest(directory) != before


@pytest.mark.parametrize("name", ["chat_template.jinja", "special_tokens_map.json", "added_tokens.json"])
def test_settings_that_come_count(directory: Path, name: str) -> None:
    before = digest(directory)
    (directory / name).write_text("{}")
    assert digest(directory) != before


@pytest.mark.parametrize("name", ["pytorch_model.bin", "tf.json", "eval.json", "tokenizer.model", "optimizer.pth"])
def test_what_lies_beside_them_does_not(directory: Path, name: str) -> None:
    """A link that leads nowhere, a directory and a file that nobody may read."""
    before = digest(directory)
    path = directory / name
    path.symlink_to("../../blobs/ffff")
    assert digest(directory) == before
    path.unlink()
    path.mkdir()
    assert digest(directory) == before
    path.rmdir()
    path.write_text("{}")
    path.chmod(0)
    assert digest(directory) == before


def test_a_single_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", "llama")
    before = digest(path)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert digest(path) != before
