"""What tests of sizes and limits share: SmolLM2's tokenizer, which takes a second to read and decides nothing here."""

from functools import cache
from pathlib import Path

import pytest

from model_parallel.checkpoint.detect import CheckpointInfo, describe
from serving.config import ChatConfig
from serving.models import group_spec
from serving.models.chat import ModelText, resolve_text


@cache
def _text(path: Path) -> ModelText:
    return resolve_text(describe(path))


@pytest.fixture(autouse=True)
def _one_tokenizer(monkeypatch: pytest.MonkeyPatch, smollm2_path: Path) -> None:
    def remembered(info: CheckpointInfo, chat: ChatConfig | None = None) -> ModelText:
        return _text(info.path) if chat is None and info.path == smollm2_path else resolve_text(info, chat)

    monkeypatch.setattr(group_spec, "resolve_text", remembered)
