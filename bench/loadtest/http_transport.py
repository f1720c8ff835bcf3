"""Requests over OpenAI's HTTP API, to our gateway or anybody's server."""

import asyncio
import contextlib
import ssl
import time
from email.utils import parsedate_to_datetime
from typing import Annotated, Any

import aiohttp
import msgspec

from bench.loadtest.files import MAX_COUNT
from bench.loadtest.replies import TRUNCATED, Reply, told_wait
from bench.loadtest.scenario import Tenant
from bench.loadtest.server_events import Event, EventReader
from bench.loadtest.work import Content

_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
_REFUSALS = frozenset({429, 503, 529})
_STREAM_TYPES = frozenset({"text/event-stream", "text/plain", "application/octet-stream"})
"""The last one is also what stands for none."""
_READ_ON_S = 0.5
"""How long the end of a body is waited for after its [DONE], so that its connection can be used again."""
MAX_ANSWER_BYTES = 64 << 20
_MAX_ERROR_BYTES = 1 << 16
_MAX_LABEL = 64
_MAX_REASON = 100
DEADLINE, DISCONNECTED = "DEADLINE_EXCEEDED", "DISCONNECTED"
UNREADABLE = "UNREADABLE_ANSWER"
"""An answer is not what OpenAI's API has."""
ERROR_IN_ANSWER = "ERROR_IN_ANSWER"
"""The status was 200."""
ERROR_IN_STREAM = "ERROR_IN_STREAM"

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]


class _Delta(msgspec.Struct):
    """What a chunk, or a whole answer, adds. Only of the content must the form be known."""

    role: Any = None
    content: str | list[Any] | None = None
    reasoning: Any = None
    reasoning_content: Any = None
    refusal: Any = None
    tool_calls: Any = None
    function_call: Any = None

    @property
    def has_tokens(self) -> bool:
        """Of whatever kind, with a text."""
        return bool(
            self.content
            or self.reasoning
            or self.reasoning_content
            or self.refusal
            or self.tool_calls
            or self.function_call
        )


class _Choice(msgspec.Struct):
    index: int = 0
    text: str | None = None
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: Any = None

    @property
    def answer(self) -> str:
        """What a next turn repeats."""
        part = self.delta or self.message
        content = self.text if part is None else part.content
        return content if isinstance(content, str) else ""


class _TokenDetails(msgspec.Struct):
    reasoning_tokens: Count | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    completion_tokens_details: _TokenDetails | None = None


class _Answer(msgspec.Struct):
    """A chunk, a whole answer, or an error: what is here of it."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None
    object: Any = None
    code: Any = None
    type: Any = None

    def failure_of(self, *, is_error: bool = False) -> str | None:
        """Its label; None for what is no error, as far as it says itself. vLLM's older errors are the object itself."""
        if self.error is not None:
            return _label(self.error)
        is_error = is_error or self.object == "error"
        return _label({"code": self.code, "type": self.type}) if is_error else None


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
        self.num_connections = 0

    async def open(self, timeout_s: float) -> None:
        target = self._tenant.parsed_target
        try:
            async with asyncio.timeout(timeout_s):
                _, writer = await asyncio.open_connection(target.host, target.port, ssl=self._context)
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError) as error:
            raise ConnectionError(
                f"{self._tenant.target} cannot be reached: {str(error) or 'no answer in time'}"
            ) from error
        connector = aiohttp.TCPConnector(limit=0, ssl=self._context or True)
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_create_end.append(self._count_connection)
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            trust_env=False,
            trace_configs=[tracing],
        )

    async def _count_connection(self, *_: object) -> None:
        self.num_connections += 1

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
                asyncio.timeout(timeout_s) as limit,
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
                elif self._tenant.stream and response.content_type in _STREAM_TYPES:
                    await self._read_stream(response, reply)
                    limit.reschedule(None)  # the answer is here
                    await _read_on(response)
                else:
                    self._read_whole(response.content_type, await read_body(response, MAX_ANSWER_BYTES), reply)
        except TimeoutError:
            reply.fail(DEADLINE)
        except (aiohttp.ClientError, OSError) as error:
            reply.fail(DISCONNECTED, type(error).__name__)
        except (ValueError, RecursionError) as error:
            reply.fail(UNREADABLE, str(error)[:_MAX_REASON])

    async def _read_stream(self, response: aiohttp.ClientResponse, reply: Reply) -> None:
        stream, events = _Stream(reply, keep_answers=self._keep_answers), EventReader()
        async for received in response.content.iter_any():
            for event in events.feed(received):
                if stream.take(event):
                    return
        for event in events.end():
            if stream.take(event):
                return
        reply.fail(TRUNCATED, "no [DONE]")

    def _read_whole(self, content_type: str, body: bytes, reply: Reply) -> None:
        """Also what came instead of a stream: it says why, or it is no answer."""
        try:
            answer = _decode(body)
        except ValueError:
            if not self._tenant.stream:
                raise
            answer = _Answer()
        if (failure := answer.failure_of()) is not None:
            reply.fail(ERROR_IN_ANSWER, failure)
            return
        if self._tenant.stream:
            reply.fail(UNREADABLE, f"{content_type[:_MAX_LABEL]} is no stream of events")
            return
        if answer.usage is not None:
            _take_usage(answer.usage, reply)
        if not answer.choices:
            reply.fail(TRUNCATED, "no choices")
            return
        if self._keep_answers:
            reply.text = [answer.choices[0].answer]
        reply.finish()

    async def _read_error(self, response: aiohttp.ClientResponse, reply: Reply) -> None:
        try:
            reason = _decode((await read_body(response, _MAX_ERROR_BYTES)) or b"{}").failure_of() or ""
        except (ValueError, RecursionError):  # not in OpenAI's form; the status says enough
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


class _Stream:
    """What has come of one streamed answer."""

    def __init__(self, reply: Reply, *, keep_answers: bool) -> None:
        self._reply, self._keep_answers = reply, keep_answers
        self._is_finished = False
        self._opened = set[int]()
        """Choices whose opening chunk has come."""
        self._has_shown_reasoning = False

    def take(self, event: Event) -> bool:
        """Whether it was the last that counts. Raises ValueError, RecursionError for what is no part of an answer."""
        if event.data.rstrip() == b"[DONE]":
            if self._is_finished:
                self._reply.finish()
            else:
                self._reply.fail(TRUNCATED, "no finish_reason")
            return True
        is_error = event.name == b"error"
        try:
            answer = _decode(event.data)
        except ValueError:
            if not is_error:
                raise
            answer = _Answer()
        if (failure := answer.failure_of(is_error=is_error)) is not None:
            self._reply.fail(ERROR_IN_STREAM, failure)
            return True
        for choice in answer.choices or ():
            self._take_choice(choice)
        if answer.usage is not None:
            _take_usage(answer.usage, self._reply)
            if self._has_shown_reasoning:
                self._reply.hidden_tokens = 0
        return False

    def _take_choice(self, choice: _Choice) -> None:
        delta = choice.delta
        has_tokens = bool(choice.text) if delta is None else delta.has_tokens
        if (
            not has_tokens and not choice.finish_reason
        ):  # A token may have no text; the chunk that ends a stream repeats that.
            has_tokens = (choice.text if delta is None else delta.content) is not None
            if delta is not None and delta.role is not None and choice.index not in self._opened:
                has_tokens = False
        self._opened.add(choice.index)
        if has_tokens:
            self._reply.arrived(1)
            if self._keep_answers:
                self._reply.text.append(choice.answer)
        if delta is not None and (delta.reasoning or delta.reasoning_content):
            self._has_shown_reasoning = True
        if choice.finish_reason:
            self._is_finished = True


def _take_usage(usage: _Usage, reply: Reply) -> None:
    reply.usage_prompt, reply.usage_output = usage.prompt_tokens, usage.completion_tokens
    details = usage.completion_tokens_details
    reply.hidden_tokens = (details.reasoning_tokens if details is not None else None) or 0


async def _read_on(response: aiohttp.ClientResponse) -> None:
    """To the body's end, which servers may send after the last event: a connection is closed where it has not come."""
    with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
        async with asyncio.timeout(_READ_ON_S):
            async for _ in response.content.iter_any():
                pass


async def read_body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """To its end, or so many bytes of it: one read gives no more than is there."""
    body = bytearray()
    while len(body) < limit and (part := await response.content.read(limit - len(body))):
        body += part
    return bytes(body)


def _label(error: Any) -> str:
    """The most telling one of an error."""
    if isinstance(error, dict):
        return str(error.get("code") or error.get("type") or "")[:_MAX_LABEL]
    return error[:_MAX_LABEL] if isinstance(error, str) else ""


def _retry_after(value: str | None) -> float | None:
    """The header holds seconds, or a date."""
    if value is None:
        return None
    try:
        return told_wait(float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
