"""Requests in the shapes that editors and chat pages send, which cannot be run here. Written after their documentation and
source, as of November 2026; values are ours."""

from typing import Any

import pytest

from tests.unit.gateway.conftest import Serve
from tests.unit.gateway.http_client import client, events, post

CHATS, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HISTORY = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": [{"type": "text", "text": "and?"}]},
]
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Open WebUI, chat": (
        CHATS,
        {
            "stream": True, "model": "tiny", "messages": HISTORY, "stream_options": {"include_usage": True},
            "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.0, "frequency_penalty": 0, "presence_penalty": 0,
            "repeat_penalty": 1, "seed": 42, "stop": ["</done>"], "max_tokens": 9, "logit_bias": None, "tools": [],
            "user": {"name": "A", "id": "1", "email": "a@example.com", "role": "admin"},
        },
    ),
    "Open WebUI, title": (
        CHATS,
        {
            "model": "tiny", "messages": [{"role": "user", "content": "Title, please."}], "stream": False,
            "max_completion_tokens": 20, "metadata": {"task": "title_generation", "chat_id": "1"},
        },
    ),
    "Continue, chat": (
        CHATS,
        {
            "messages": HISTORY, "model": "tiny", "max_tokens": 9, "temperature": 0.5, "stream": True,
            "stream_options": {"include_usage": True}, "top_p": None, "frequency_penalty": None, "presence_penalty": None,
            "stop": ["<|im_end|>", "<|im_start|>", "<|endoftext|>"], "tools": None, "prediction": None,
        },
    ),
    "Continue, autocompletion": (
        COMPLETIONS,
        {
            "model": "tiny", "prompt": "def f(x):\n    ", "max_tokens": 20, "temperature": 0.01, "top_p": None,
            "frequency_penalty": None, "presence_penalty": None, "stream": True,
            "stop": [
                "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>", "<|endoftext|>", "</fim_middle>", "</code>",
                "\n\n", "\r\n\r\n", "/src/", "#- coding: utf-8", "```", "\ndef ", "\nclass ", "\n\"\"\"#",
            ],
        },
    ),
    "LangChain's messages with names": (
        CHATS,
        {
            "model": "tiny", "stream": False, "n": 1, "temperature": 0.7,
            "messages": [{"role": "user", "content": "hi", "name": "bob"}, {"role": "assistant", "content": ""}, HISTORY[1]],
        },
    ),
    "Vercel AI SDK": (
        CHATS,
        {
            "model": "tiny", "temperature": 0, "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 20,
        },
    ),
    "LM Studio's and llama.cpp's clients": (
        CHATS,
        {
            "model": "tiny", "messages": HISTORY, "temperature": 0.8, "max_tokens": -1, "stream": False, "seed": -1,
            "cache_prompt": True, "n_predict": -1, "typical_p": 1, "tfs_z": 1, "mirostat": 0, "repeat_penalty": 1,
            "samplers": "edkypmxt", "dry_multiplier": 0, "xtc_probability": 0, "grammar": "", "logit_bias": [],
        },
    ),
    "vLLM's benchmark": (
        COMPLETIONS,
        {
            "model": "tiny", "prompt": "hi", "temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 20, "logprobs": None,
            "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
        },
    ),
    "lm-eval with old servers in mind": (
        COMPLETIONS,
        {
            "model": "tiny", "prompt": ["a b", "c d"], "max_tokens": 0, "temperature": 0, "logprobs": 1, "echo": True,
            "seed": 1234,
        },
    ),
    "an agent that replays a message as it came": (
        CHATS,
        {
            "model": "tiny",
            "messages": [
                HISTORY[1],
                {
                    "role": "assistant", "content": "Paris", "refusal": None, "annotations": [], "audio": None,
                    "function_call": None, "tool_calls": None, "reasoning_content": None, "reasoning": "hm",
                    "provider_specific_fields": {"x": 1},
                },
                HISTORY[1],
            ],
            "tool_choice": "auto", "parallel_tool_calls": True, "response_format": {"type": "text"}, "store": False,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SHAPES))
async def test_it_is_answered(serve: Serve, name: str) -> None:
    path, body = SHAPES[name]
    async with serve(http_port=0) as gateway:
        if isinstance(body.get("prompt"), list):
            from tests.unit.gateway.test_http_api import scored  # noqa: PLC0415

            gateway.backend.script = scored("", "")
        answer = await post(gateway, path, body)
        assert answer.status_code == 200, answer.text
        if body.get("stream"):
            parts = events(answer)
            said = [
                choice.get("text") or choice.get("delta", {}).get("content") or ""
                for part in parts
                for choice in part["choices"]
            ]
            assert "".join(said) == "Paris"
        elif path == CHATS:
            assert answer.json()["choices"][0]["message"]["content"] == "Paris"
        else:
            assert [choice["text"] for choice in answer.json()["choices"]] == body["prompt"]


async def test_open_webui_asks_for_models_first(serve: Serve) -> None:
    async with serve(http_port=0) as gateway, client(gateway, headers={"authorization": "Bearer none"}) as http:
        listed = (await http.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert {"id", "object", "created", "owned_by"} <= listed["data"][0].keys()
