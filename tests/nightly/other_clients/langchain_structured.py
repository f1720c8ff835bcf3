"""LangChain's structured output by each of its methods, and tools that are bound to a model."""

import sys
from importlib.metadata import version

import pydantic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


class Person(pydantic.BaseModel):
    """What is asked for."""

    name: str = pydantic.Field(max_length=6)
    age: int


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


chat = ChatOpenAI(base_url=sys.argv[1] + "/v1", api_key="any", model="tiny", max_retries=0)
for method in ("json_schema", "function_calling"):
    assert isinstance(chat.with_structured_output(Person, method=method).invoke("hi"), Person), method
    assert isinstance(list(chat.with_structured_output(Person, method=method).stream("hi"))[-1], Person), method
assert isinstance(chat.with_structured_output(None, method="json_mode").invoke("hi as JSON"), dict)
bound = chat.bind_tools([add], tool_choice="any")
answer = bound.invoke("1 + 2")
call = answer.tool_calls[0]
assert call["name"] == "add" and isinstance(call["args"]["a"], int)
history = [HumanMessage("1 + 2"), answer, *(ToolMessage("3", tool_call_id=each["id"]) for each in answer.tool_calls)]
assert chat.bind_tools([add]).invoke(history).content == "Paris is it."
print("langchain-openai", version("langchain-openai"))
