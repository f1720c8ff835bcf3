"""What a model's card says about unset sampling fields reaches the engine, and what a request sets counts."""

from typing import Any

import pytest

from bench.support.fake_backend import FakeBackend, card
from serving.gateway.core.generation import _sampling_params
from serving.gateway.core.validate import GenerateQuery, TextPrompt
from serving.gateway.grpc.convert import model_card
from tests.unit.gateway.conftest import Serve
from tests.unit.gateway.http_client import post

DEFAULTS = {"temperature": 0.6, "top_p": 0.9, "top_k": 40.0, "max_tokens": 256.0}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0.6, 0.9, 40, 0.0)),
        ({"temperature": 1.0, "top_k": 0}, (1.0, 0.9, 0, 0.0)),
        ({"temperature": 0.0, "min_p": 0.1}, (0.0, 0.9, 40, 0.1)),
    ],
)
def test_unset_fields(given: dict[str, float], expected: tuple[float, ...]) -> None:
    query = GenerateQuery(model="tiny", prompt=TextPrompt("x"), **given)  # type: ignore[arg-type]
    sampling = _sampling_params(query, card(default_sampling=DEFAULTS), seed=1, max_tokens=5)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == expected
    assert isinstance(sampling.top_k, int)
    assert sampling.max_tokens == 5


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, (0.6, 0.9)),
        ({"temperature": 1.0}, (1.0, 0.9)),
        ({"temperature": 0, "top_p": 0.5}, (0.0, 0.5)),
        ({"temperature": None, "top_p": ""}, (0.6, 0.9)),
    ],
)
async def test_responses_tell_what_was_used(serve: Serve, given: dict[str, Any], told: tuple[float, float]) -> None:
    models = [card(default_sampling=DEFAULTS), card("neutral")]
    async with serve(FakeBackend(cards=models), http_port=0) as gateway:
        answer = (await post(gateway, "/v1/responses", {"model": "tiny", "input": "hi"} | given)).json()
        assert (answer["temperature"], answer["top_p"]) == told
        sampling = gateway.backend.requests[0].sampling
        assert (sampling.temperature, sampling.top_p) == told
        plain = (await post(gateway, "/v1/responses", {"model": "neutral", "input": "hi"})).json()
        assert (plain["temperature"], plain["top_p"]) == (1.0, 1.0)


def test_the_card_tells_them() -> None:
    shown = model_card(card(default_sampling=DEFAULTS, generation_config="vllm-like"))
    assert (shown.generation_config, dict(shown.default_sampling)) == ("vllm-like", DEFAULTS)
