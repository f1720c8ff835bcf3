import asyncio
import sys
from importlib.metadata import version

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=sys.argv[1] + "/v1", api_key="any")


async def main() -> None:
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        agent = Agent(kind("tiny", provider=provider), instructions="be kind")
        first = await agent.run("hi")
        assert first.output == "Paris is it.", first
        assert (await agent.run("more", message_history=first.all_messages())).output == "Paris is it."
        async with agent.run_stream("hi") as result:
            assert [part async for part in result.stream_text()][-1] == "Paris is it."


asyncio.run(main())
print("pydantic-ai-slim", version("pydantic-ai-slim"))
