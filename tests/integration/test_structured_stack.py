"""Answers in a form that the client asks for, from a real model on the served stack at TP=2; also when its group is lost."""

import json
import os
import signal
import threading
from collections.abc import Iterator

import jsonschema
import openai
import pytest

from serving.driver.app import RunningApp
from tests.support.stack import MODEL, group_handle, running_stack, stack_config
from tests.support.waiting import PATIENCE_S

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "facts": {"type": "array", "items": {"type": "string", "maxLength": 300}, "minItems": 5, "maxItems": 5},
    },
    "required": ["name", "age", "facts"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def app() -> Iterator[RunningApp]:
    with running_stack(stack_config(num_groups=2, max_model_len=2048)) as app:
        yield app


@pytest.fixture(scope="module")
def client(app: RunningApp) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{app.http_url}/v1", api_key="any", max_retries=0, timeout=PATIENCE_S * 4) as client:
        yield client


def stream(client: openai.OpenAI, first: threading.Event | None = None) -> str:
    text = ""
    for chunk in client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe a person."}],
        response_format=FORM,
        seed=11,
        stream=True,
    ):  # type: ignore[call-overload]
        text += chunk.choices[0].delta.content or ""
        if first is not None and len(text) > 40:
            first.set()
    return text


def test_a_schema_holds_and_survives_the_loss_of_a_group(client: openai.OpenAI) -> None:
    wanted = stream(client)
    jsonschema.validate(json.loads(wanted), SCHEMA)
    started, found = threading.Event(), []
    reader = threading.Thread(target=lambda: found.append(stream(client, started)))
    reader.start()
    assert started.wait(PATIENCE_S * 2)
    handles = group_handle()
    pids = handles.pids.remote().result(timeout_s=PATIENCE_S)  # type: ignore[attr-defined]
    os.kill(pids[1], signal.SIGKILL)
    reader.join(PATIENCE_S * 4)
    assert found == [wanted], "bit for bit"


def test_wrong_schemas_are_refused_and_others_go_on(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"schema\.properties\.a: Invalid type: objekt"):
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"properties": {"a": {"type": "objekt"}}}},
            },
        )
    answer = client.completions.create(
        model=MODEL, prompt="A date: ", max_tokens=20, extra_body={"guided_regex": "[0-9]{4}-[0-9]{2}"}, n=2
    )
    assert all(len(choice.text) == 7 and choice.finish_reason == "stop" for choice in answer.choices)
