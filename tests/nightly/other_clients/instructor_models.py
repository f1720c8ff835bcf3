"""Instructor reads answers into pydantic models, by functions and by JSON schemas, and plain text."""

import sys
from importlib.metadata import version

import instructor
import openai
import pydantic


class Person(pydantic.BaseModel):
    """What is asked for."""

    name: str = pydantic.Field(max_length=6)
    age: int


api = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="any", max_retries=0)
ask = [{"role": "user", "content": "hi"}]
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(api, mode=mode)
    if mode is not instructor.Mode.JSON:  # which asks for any object, and says in the prompt of which form
        person = client.chat.completions.create(model="tiny", response_model=Person, messages=ask, max_retries=0)
        assert isinstance(person, Person), mode
    answer = client.chat.completions.create(model="tiny", response_model=None, messages=ask, max_retries=0)
    assert answer.choices[0].message.content == "Paris is it.", mode
print("instructor", version("instructor"))
