import sys
from importlib.metadata import version

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

llm = OpenAILike(
    model="tiny", api_base=sys.argv[1] + "/v1", api_key="any", is_chat_model=True, context_window=8192, max_retries=0
)
messages = [ChatMessage(role="system", content="be kind"), ChatMessage(role="user", content="hi")]
assert llm.chat(messages).message.content == "Paris is it."
assert "".join(part.delta for part in llm.stream_chat(messages)) == "Paris is it."
assert llm.complete("x").text == "Paris is it."
plain = OpenAILike(model="tiny", api_base=sys.argv[1] + "/v1", api_key="any", is_chat_model=False, context_window=8192)
assert plain.complete("x").text == "Paris is it."
print("llama-index-llms-openai-like", version("llama-index-llms-openai-like"))
