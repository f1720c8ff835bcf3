"""One rule for what requests get that leave sampling fields unset."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_parallel.checkpoint.detect import CheckpointInfo, describe
from model_parallel.checkpoint.info import GenerationSettings
from model_parallel.errors import ConfigError
from serving.models.generation_defaults import RULES, default_sampling
from tests.support.llama_tokenizers import llama_directory

LLAMA_2_CHAT: dict[str, Any] = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 256}


def info(tmp_path: Path, **values: Any) -> CheckpointInfo:
    return replace(describe(llama_directory(tmp_path)), generation=GenerationSettings(**values))


@pytest.mark.parametrize(
    ("values", "auto", "vllm_like"),
    [
        ({}, {}, {}),
        (LLAMA_2_CHAT, {"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9, "max_tokens": 256}),
        (
            LLAMA_2_CHAT | {"do_sample": False, "repetition_penalty": 1.1},
            {"repetition_penalty": 1.1},
            {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "max_tokens": 256},
        ),
        ({"temperature": 0.6}, {}, {"temperature": 0.6}),
        ({"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}, {}, {}),
        ({"do_sample": True, "top_k": 50, "min_p": 0.05}, {"top_k": 50, "min_p": 0.05}, {"top_k": 50, "min_p": 0.05}),
        ({"do_sample": True, "top_k": -1}, {}, {}),
        ({"do_sample": True, "top_k": 512}, {}, {}),
        ({"do_sample": True, "temperature": 1e-5}, {"temperature": 0}, {"temperature": 0}),
    ],
)
def test_rules(tmp_path: Path, values: dict[str, Any], auto: dict[str, float], vllm_like: dict[str, float]) -> None:
    found = info(tmp_path, **values)
    assert {rule: default_sampling(found, rule) for rule in RULES} == {
        "auto": auto, "vllm-like": vllm_like, "none": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 3.0}, "temperature is 3.0; allowed: from 0 to 2"),
        ({"top_p": 0.0}, "top_p is 0.0; allowed: above 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"min_p": 2.0}, "min_p is 2.0"),
    ],
)
def test_values_that_no_request_could_have(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    found = info(tmp_path, do_sample=True, **values)
    with pytest.raises(ConfigError, match=f"generation_config.json: {message}.*set generation_config to none"):
        default_sampling(found, "auto")
    assert default_sampling(found, "none") == {}
