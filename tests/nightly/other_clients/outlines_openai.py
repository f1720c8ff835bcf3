"""outlines' client of OpenAI's API."""

import sys
from importlib.metadata import version
from typing import Literal

import openai
import outlines
import pydantic


class Person(pydantic.BaseModel):
    """What is asked for."""

    name: str = pydantic.Field(max_length=6)
    mood: Literal["good", "bad"]


client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="any", max_retries=0)
model = outlines.from_openai(client, "tiny")
assert isinstance(Person.model_validate_json(model("hi", Person)), Person)
assert model("hi") == "Paris is it."
vllm = outlines.from_vllm(client, "tiny")
assert vllm("hi", Literal["yes", "no"]) in ("yes", "no")
assert isinstance(Person.model_validate_json(vllm("hi", Person)), Person)
assert len(vllm("hi", outlines.regex("[a-c]{5}"))) == 5
print("outlines", version("outlines"))
