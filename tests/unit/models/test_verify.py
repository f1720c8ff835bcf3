"""What is wrong with a checkpoint is told before anything loads, all of it at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.support.synthetic_llama import twin
from model_parallel.checkpoint.detect import describe
from serving.config import ChatConfig
from serving.models.verify import main, verify


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return twin("7b").write(tmp_path / "model-chat", "hf")


def test_a_whole_checkpoint_has_no_problems(checkpoint: Path) -> None:
    assert verify(describe(checkpoint)) == []


def test_a_broken_tokenizer_is_named(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.model").write_bytes(b"not a tokenizer")
    (problem,) = verify(describe(checkpoint))
    assert "tokenizer.model" in problem


def test_a_format_whose_control_tokens_are_missing_is_named(checkpoint: Path) -> None:
    (problem,) = verify(describe(checkpoint), ChatConfig(format="chatml"))
    assert "chatml chat format" in problem and "<|im_start|>" in problem


def test_a_format_that_is_configured_is_checked_in_place_of_the_checkpoint_s(checkpoint: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>{% endfor %}<|im_start|>"
    )
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    info = describe(checkpoint)
    (problem,) = verify(info)
    assert "or to none to serve the model without chat" in problem
    custom = {"format": "custom", "user": "{content}", "assistant": "{content}"}
    for chat in ({"format": "none"}, custom, {"format": "llama-2"}):
        assert verify(info, ChatConfig.model_validate(chat)) == []


def test_several_problems_are_told_together(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.model").write_bytes(b"not a tokenizer")
    weights = next(checkpoint.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    problems = verify(describe(checkpoint))
    assert len(problems) == 2
    assert weights.name in problems[1]


def test_a_tied_head_that_differs_is_told(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    (problem,) = verify(describe(checkpoint))
    assert "lm_head" in problem


def test_the_process_prints_a_list(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "serving.models.verify", str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
    monkeypatch.setattr(sys, "argv", ["verify", str(tmp_path / "missing")])
    main()
    (problem,) = json.loads(capsys.readouterr().out)
    assert "missing" in problem
    monkeypatch.setattr(sys, "argv", ["verify", str(checkpoint), '{"format":"chatml"}'])
    main()
    (problem,) = json.loads(capsys.readouterr().out)
    assert "chatml chat format" in problem
