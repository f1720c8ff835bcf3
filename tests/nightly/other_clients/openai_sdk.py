import sys

import openai

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
assert parts[-1].usage.completion_tokens == 13
assert client.completions.create(model=model, prompt="x", echo=True).choices[0].text == "xParis is it."
assert client.responses.create(model=model, input="hi").output_text == "Paris is it."
events = list(client.responses.create(model=model, input="hi", stream=True))
assert events[-1].response.output_text == "Paris is it."
try:
    client.chat.completions.create(
        model=model, messages=messages, tools=[{"type": "function", "function": {"name": "f"}}]
    )
except openai.BadRequestError as error:
    assert error.param == "tools"
else:
    raise AssertionError("tools were taken")
print("openai", openai.__version__)
