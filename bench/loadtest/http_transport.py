"""Requests over OpenAI's HTTP API, to our gateway or anybody's server."""

import asyncio
import ssl
import time
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import msgspec

from bench.loadtest.replies import TRUNCATED, Reply
from bench.loadtest.scenario import Tenant
from bench.loadtest.work import Content

_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
_REFUSALS = frozenset({429, 503, 529})
MAX_EVENT_BYTES = 8 << 20
DEADLINE, DISCONNECTED = "DEADLINE_EXCEEDED", "DISCONNECTED"


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None

    @property
    def content(self) -> str | None:
        """New text; None in a chunk that is not about any. A token may have no text."""
        if self.text is not None:
            return self.text if self.text or self.finish_reason is None else None
        part = self.delta or self.message
        if part is None:
            return None
        text = part.content or part.reasoning_content
        # The chunk that opens a chat stream names the role; the one that ends it may repeat an empty text.
        return text or ("" if part.content == "" and part.role is None and self.finish_reason is None else None)


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Answer(msgspec.Struct):
    """A chunk, a whole answer, or an error: what is here of it."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Answer).decode
_encode = msgspec.json.Encoder().encode


class HttpTransport:
    """One tenant's connections, as many as it has requests under way."""

    def __init__(
        self, tenant: Tenant, model: str, api_key: str, context: ssl.SSLContext | None, *, keep_answers: bool = False
    ) -> None:
        self._tenant, self._model, self._keep_answers = tenant, model, keep_answers
        target = tenant.parsed_target
        self._url = f"{target.scheme}://{target.address}{target.path}{_PATHS[tenant.chosen_api]}"
        self._headers = {"content-type": "application/json"} | (
            {"authorization": f"Bearer {api_key}"} if api_key else {}
        )
        self._context = context
        self._session: aiohttp.ClientSession | None = None

    async def open(self, timeout_s: float) -> None:
        target = self._tenant.parsed_target
        try:
            async with asyncio.timeout(timeout_s):
                _, writer = await asyncio.open_connection(target.host, target.port, ssl=self._context)
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError) as error:
            raise ConnectionError(f"{self._tenant.target} cannot be reached: {error or 'no answer in time'}") from error
        connector = aiohttp.TCPConnector(limit=0, ssl=self._context or True)
        self._session = aiohttp.ClientSession(
            connector=connector, cookie_jar=aiohttp.DummyCookieJar(), headers=self._headers, trust_env=False
        )

    def prepare(self, prompt: Content, output_tokens: int, label: str) -> tuple[bytes, dict[str, str]]:
        tenant = self._tenant
        body: dict[str, Any] = {"model": self._model, "temperature": tenant.temperature, "max_tokens": output_tokens}
        if tenant.chosen_api == "chat":
            body["messages"] = [{"role": role, "content": text} for role, text in prompt]  # type: ignore[misc,str-unpack]
        else:
            body["prompt"] = prompt
        if tenant.ignore_eos:
            body["ignore_eos"] = True
        if tenant.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return _encode(body | tenant.extra_body), {"x-request-id": label}

    async def ask(self, prepared: Any, timeout_s: float, reply: Reply) -> None:
        assert self._session is not None
        body, headers = prepared
        reply.sent_s = time.monotonic()
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.post(
                    self._url,
                    data=body,
                    headers=headers,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=None),
                ) as response,
            ):
                if response.status != 200:
                    await self._read_error(response, reply)
                elif self._tenant.stream:
                    await self._read_stream(response, reply)
                else:
                    self._read_whole(await response.read(), reply)
        except TimeoutError:
            reply.fail(DEADLINE)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reply.fail(DISCONNECTED, type(error).__name__)

    async def _read_stream(self, response: aiohttp.ClientResponse, reply: Reply) -> None:
        """Server-sent events; only `data:` lines count."""
        rest, is_finished = b"", False
        async for data in response.content.iter_any():
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > MAX_EVENT_BYTES:
                raise ValueError("an event is too long")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                event = line[5:].strip()
                if event == b"[DONE]":
                    if is_finished:
                        reply.finish()
                    else:
                        reply.fail(TRUNCATED, "no finish_reason")
                    return
                answer = _decode(event)
                if answer.error is not None:
                    reply.fail("ERROR_IN_STREAM", _error_code(answer.error))
                    return
                self._take(answer, reply)
                is_finished = is_finished or any(choice.finish_reason for choice in answer.choices)
        reply.fail(TRUNCATED, "no [DONE]")

    def _take(self, answer: _Answer, reply: Reply) -> None:
        for choice in answer.choices:
            if (text := choice.content) is not None:
                reply.arrived(1)
                if self._keep_answers:
                    reply.text.append(text)
        if answer.usage is not None:
            reply.usage_prompt, reply.usage_output = answer.usage.prompt_tokens, answer.usage.completion_tokens

    def _read_whole(self, body: bytes, reply: Reply) -> None:
        answer = _decode(body)
        if answer.usage is not None:
            reply.usage_prompt, reply.usage_output = answer.usage.prompt_tokens, answer.usage.completion_tokens
        if not answer.choices:
            reply.fail(TRUNCATED, "no choices")
            return
        if self._keep_answers:
            reply.text = [answer.choices[0].content or ""]
        reply.finish()

    async def _read_error(self, response: aiohttp.ClientResponse, reply: Reply) -> None:
        try:
            reason = _error_code(_decode((await response.content.read(1 << 16)) or b"{}").error)
        except msgspec.DecodeError:  # not in OpenAI's form; the status says enough
            reason = ""
        reply.fail(
            f"HTTP_{response.status}",
            reason,
            is_refusal=response.status in _REFUSALS,
            retry_after_s=_retry_after(response.headers.get("retry-after")),
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def _error_code(error: Any) -> str:
    """The most telling label of an error object."""
    if isinstance(error, dict):
        return str(error.get("code") or error.get("type") or "")[:64]
    return ""


def _retry_after(value: str | None) -> float | None:
    """Seconds; the header holds them, or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
