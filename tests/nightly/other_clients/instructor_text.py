"""Without a form that the server could hold to, Instructor can read plain text alone."""

import sys
from importlib.metadata import version

import instructor
import openai

client = instructor.from_openai(
    openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="any", max_retries=0), mode=instructor.Mode.MD_JSON
)
answer = client.chat.completions.create(
    model="tiny", response_model=None, messages=[{"role": "user", "content": "hi"}], max_retries=0
)
assert answer.choices[0].message.content == "Paris is it."
print("instructor", version("instructor"))
