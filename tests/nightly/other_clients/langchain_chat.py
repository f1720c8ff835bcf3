import sys
from importlib.metadata import version

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

url = sys.argv[1] + "/v1"
chat = ChatOpenAI(base_url=url, api_key="any", model="tiny", max_retries=0)
assert chat.invoke("hi").content == "Paris is it."
history = [SystemMessage("be kind"), HumanMessage("hi", name="bob"), AIMessage("hello"), HumanMessage("more")]
assert chat.invoke(history).content == "Paris is it."
assert "".join(part.content for part in chat.stream(history)) == "Paris is it."
assert chat.batch(["a", "b"])[1].content == "Paris is it."
assert ChatOpenAI(base_url=url, api_key="any", model="tiny", use_responses_api=True).invoke("hi").text == "Paris is it."
text = OpenAI(base_url=url, api_key="any", model="tiny", max_retries=0)
assert text.invoke("x") == "Paris is it."
assert "".join(text.stream("x")) == "Paris is it."
print("langchain-openai", version("langchain-openai"))
