import sys
from importlib.metadata import version

import litellm

about = {"api_base": sys.argv[1] + "/v1", "api_key": "any", "num_retries": 0}
messages = [{"role": "user", "content": "hi"}]
for model in ("openai/tiny", "hosted_vllm/tiny"):
    answer = litellm.completion(model=model, messages=messages, **about)
    assert answer.choices[0].message.content == "Paris is it."
    stream = litellm.completion(model=model, messages=messages, stream=True, **about)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == "Paris is it."
text = litellm.text_completion(model="text-completion-openai/tiny", prompt="x", **about)
assert text.choices[0].text == "Paris is it."
# A message as LiteLLM gives it back, with the fields that it adds.
again = litellm.completion(
    model="openai/tiny", messages=[*messages, answer.choices[0].message.model_dump(), *messages], **about
)
assert again.choices[0].message.content == "Paris is it."
print("litellm", version("litellm"))
