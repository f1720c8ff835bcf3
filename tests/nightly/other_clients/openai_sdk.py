import sys

import openai
import pydantic

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="any", max_retries=0, timeout=60)
messages = [{"role": "user", "content": "hi"}]
model = client.models.list().data[0].id
answer = client.chat.completions.create(model=model, messages=messages)
assert answer.choices[0].message.content == "Paris is it."
stream = client.chat.completions.create(
    model=model, messages=messages, stream=True, stream_options={"include_usage": True}
)
parts = list(stream)
assert "".join(choice.delta.content or "" for part in parts for choice in part.choices) == "Paris is it."
assert parts[-1].usage.completion_tokens == 12
assert client.completions.create(model=model, prompt="x", echo=True).choices[0].text == "xParis is it."
assert client.responses.create(model=model, input="hi").output_text == "Paris is it."
events = list(client.responses.create(model=model, input="hi", stream=True))
assert events[-1].response.output_text == "Paris is it."
try:
    client.chat.completions.create(model=model, messages=messages, functions=[{"name": "f"}])
except openai.BadRequestError as error:
    assert error.param == "functions"
else:
    raise AssertionError("functions were taken")


class Person(pydantic.BaseModel):
    """What an answer is parsed into."""

    name: str = pydantic.Field(max_length=6)
    age: int


parse = getattr(client.chat.completions, "parse", None) or client.beta.chat.completions.parse
assert isinstance(parse(model=model, messages=messages, response_format=Person).choices[0].message.parsed, Person)
assert isinstance(client.responses.parse(model=model, input="hi", text_format=Person).output_parsed, Person)
tool = openai.pydantic_function_tool(Person)
answer = parse(model=model, messages=messages, tools=[tool], tool_choice="required", parallel_tool_calls=False)
assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, Person)
print("openai", openai.__version__)
