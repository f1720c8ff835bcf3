"""The digest of a checkpoint changes with what is read of it, and with nothing else."""

import os
import shutil
from pathlib import Path

import pytest

from model_parallel.checkpoint.detect import describe
from model_parallel.checkpoint.fingerprint import fingerprint, weights_fingerprint
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


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_what_ranks_load_counts_for_them(directory: Path, name: str) -> None:
    before = weights_fingerprint(describe(directory))
    path = directory / name
    path.write_bytes(path.read_bytes() + (b"\n" if path.suffix == ".json" else b"\0"))
    assert weights_fingerprint(describe(directory)) != before


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "tokenizer_config.json"])
def test_what_gateways_go_by_does_not_count_for_ranks(directory: Path, name: str) -> None:
    """A group that is lost after such a change comes back."""
    before = weights_fingerprint(describe(directory))
    (directory / name).write_text('{"temperature": 0.5}')
    assert weights_fingerprint(describe(directory)) == before


def test_it_is_the_same_wherever_the_files_lie(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """And whenever they were written."""
    copy = tmp_path_factory.mktemp("other node") / "model"
    shutil.copytree(directory, copy)
    os.utime(copy / "model.safetensors", (1, 1))
    assert weights_fingerprint(describe(copy)) == weights_fingerprint(describe(directory))
    assert digest(copy) == digest(directory)
