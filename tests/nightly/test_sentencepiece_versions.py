"""Token ids are the same under every allowed version of sentencepiece."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.support.small_tokenizer import sentencepiece_model
from tests.support.llama_tokenizers import CONTROL_TEXTS, TEXTS

ROOT = Path(__file__).parents[2]
VERSIONS = ("0.2.1", "0.2.3")
"""Those that pyproject.toml allows: 0.2.2 is excluded."""
SCRIPT = """
import json, sys
from pathlib import Path
from serving.text.tokenizer import load_tokenizer
import sentencepiece
tokenizer = load_tokenizer(Path(sys.argv[1]))
texts = json.loads(sys.stdin.read())
print(json.dumps({"version": sentencepiece.__version__, "ids": [tokenizer.encode(text, add_bos=False) for text in texts]}))
"""
pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1200)]


def test_ids_do_not_depend_on_the_version(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    config = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    (checkpoint / "tokenizer.model").write_bytes(sentencepiece_model())
    (checkpoint / "added_tokens.json").write_text('{"<|im_end|>": 500, "<pad>": 512}')
    answers = {}
    for version in VERSIONS:
        target = tmp_path / version
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*install, f"sentencepiece=={version}"], check=True, timeout=500)
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(checkpoint)],
            input=json.dumps([*TEXTS, *CONTROL_TEXTS]),
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
            env={"PYTHONPATH": f"{target}:{ROOT}", "PATH": "/usr/bin:/bin"},
        )
        answer = json.loads(done.stdout)
        assert answer["version"] == version
        answers[version] = answer["ids"]
    first = answers[VERSIONS[0]]
    assert all(ids == first for ids in answers.values())
