"""llama.cpp's own tests of vocabularies, from the source package of llama-cpp-python: texts, and the token ids that it gives.

The vocabularies are of Llama 2, Llama 3, Phi-3, GPT-2 and others whose rules GGUF files of the Llama architecture name.
"""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from model_parallel.checkpoint.detect import CheckpointInfo
from model_parallel.checkpoint.gguf_file import GgufFile
from model_parallel.checkpoint.info import TokenizerSettings
from model_parallel.config import ModelConfig
from serving.text.tokenizer import Tokenizer, make_tokenizer

REQUIREMENT = "llama-cpp-python==0.3.36"
SEPARATOR = "\n__ggml_vocab_test__\n"
VOCABULARIES = (
    "llama-spm", "llama-bpe", "phi-3", "gpt-2", "mpt", "qwen2", "deepseek-coder", "refact", "starcoder", "command-r",
)  # fmt: skip
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of llama.cpp's vocabulary files; nothing of the package is built or run but its metadata."""
    directory = tmp_path_factory.mktemp("llama-cpp")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "--dest", str(directory), REQUIREMENT], check=True, timeout=1500)
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as package:
        wanted = [member for member in package.getmembers() if "/models/ggml-vocab-" in member.name]
        package.extractall(directory, members=wanted, filter="data")
    return next(directory.glob("**/ggml-vocab-llama-spm.gguf")).parent


def vocabulary_tokenizer(path: Path) -> Tokenizer:
    """Of a file that holds a vocabulary and no model."""
    file = GgufFile(path)
    config = ModelConfig(
        vocab_size=file.array_length("tokenizer.ggml.tokens"), hidden_size=8, intermediate_size=8, num_layers=1,
        num_query_heads=1, num_kv_heads=1, head_dim=8, rms_norm_eps=1e-5, rope_theta=1e4, max_position=8,
        bos_token_id=file.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=(file.get("tokenizer.ggml.eos_token_id"),),
    )  # fmt: skip
    settings = TokenizerSettings(
        add_bos=file.get("tokenizer.ggml.add_bos_token"), legacy=True,
        add_prefix_space=file.get("tokenizer.ggml.add_space_prefix"),
    )  # fmt: skip
    return make_tokenizer(
        CheckpointInfo(
            path=path, format="gguf", config=config, weight_files=(path,), tokenizer_kind="gguf", tokenizer_path=path,
            tokenizer=settings, licence="",
        )
    )  # fmt: skip


def mismatches(tokenizer: Tokenizer, path: Path) -> tuple[int, list[str]]:
    """Number of tests beside a vocabulary file, and the texts whose ids differ from llama.cpp's."""
    texts = Path(f"{path}.inp").read_bytes().decode().split(SEPARATOR)[:-1]  # every text is followed by one
    lines = Path(f"{path}.out").read_text().splitlines()
    expected = [[int(token_id) for token_id in line.split()] for line in lines]
    assert len(texts) == len(expected)
    # llama.cpp's test gives neither BOS nor what a text spells as a control token, as encode does without parse_special.
    wrong = [t for t, ids in zip(texts, expected, strict=True) if tokenizer.encode(t, add_bos=False) != ids]
    return len(texts), wrong


@pytest.mark.parametrize("name", VOCABULARIES)
def test_same_ids_as_llama_cpp(vocabularies: Path, name: str) -> None:
    path = vocabularies / f"ggml-vocab-{name}.gguf"
    num_tests, wrong = mismatches(vocabulary_tokenizer(path), path)
    assert num_tests >= 40
    assert wrong == []
