"""What servers of other makes answer over HTTP, and what a load test makes of it."""

import asyncio
import json
import socket
from codecs import BOM_UTF8
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import cycle, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.loadtest import discover, http_transport
from bench.loadtest.discover import resolve
from bench.loadtest.html_report import report
from bench.loadtest.http_transport import HttpTransport, _retry_after
from bench.loadtest.leader import Run
from bench.loadtest.replies import Outcome, Reply
from bench.loadtest.scenario import Scenario, Tenant, parse_scenario
from bench.loadtest.server_events import MAX_EVENT_BYTES, Event, EventReader
from bench.loadtest.sharing import token_times
from bench.loadtest.summary import summarise
from tests.support.load import record, run_here

PAUSE_S = 0.01
"""Between the parts of an answer, so that they arrive apart."""
JSON = {"content_type": "application/json"}
DONE = b"data: [DONE]\n\n"


@asynccontextmanager
async def server(
    parts: Sequence[bytes], content_type: str = "text/event-stream", status: str = "200 OK", head: str = ""
) -> AsyncIterator[str]:
    """Answers everything with these parts, one after the other. Its address."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            length = [line for line in request.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            await reader.readexactly(int(length[0].partition(b":")[2]) if length else 0)
            writer.write(f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\n{head}".encode())
            writer.write(b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n")
            for part in parts:
                writer.write(b"%x\r\n%s\r\n" % (len(part), part))
                await writer.drain()
                await asyncio.sleep(PAUSE_S)
            writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()


async def ask(parts: Sequence[bytes], *, stream: bool = True, **how: str) -> Reply:
    async with server(parts, **how) as target:
        transport = HttpTransport(Tenant(target=target, stream=stream), "m", "", None, keep_answers=True)
        await transport.open(60)
        reply = Reply()
        await transport.ask(transport.prepare([("user", "x")], 4, "x"), 60, reply)
        await transport.close()
        return reply


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def chunk(finish_reason: str | None = None, **delta: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]})


def usage(**counts: Any) -> bytes:
    return event({"choices": [], "usage": counts})


OPENING, END = chunk(role="assistant", content=""), chunk("length", content="")


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("content", "x"),
        ("content", [{"type": "text", "text": "x"}]),
        ("content", ""),  # a token without a text
        ("reasoning", "x"),
        ("reasoning_content", "x"),
        ("refusal", "no"),
        ("tool_calls", [{"index": 0, "function": {"arguments": "{"}}]),
        ("function_call", {"arguments": "{"}),
    ],
)
@pytest.mark.parametrize("role", [{}, {"role": "assistant"}])
async def test_a_chunk_with_anything_new_has_a_token(name: str, token: Any, role: dict[str, str]) -> None:
    tokens = [chunk(**role, **{name: token}) for _ in range(3)]
    reply = await ask([OPENING, *tokens, END, usage(prompt_tokens=7, completion_tokens=3), DONE])
    assert (reply.outcome, len(reply.times_s), reply.num_chunk_tokens) == (Outcome.FINISHED, 3, 3)
    assert (reply.usage_prompt, reply.usage_output, reply.hidden_tokens) == (7, 3, 0)


async def test_chunks_with_nothing_new_have_no_token() -> None:
    empty = [event({"choices": []}), event({"choices": None, "usage": None}), chunk(content=None), chunk(tool_calls=[])]
    reply = await ask([OPENING, *empty, chunk(content="x"), END, DONE])
    assert (reply.outcome, len(reply.times_s), "".join(reply.text)) == (Outcome.FINISHED, 1, "x")


async def test_thought_that_is_counted_and_not_shown_is_no_part_of_the_time_per_token() -> None:
    told = usage(completion_tokens=50, completion_tokens_details={"reasoning_tokens": 47})
    answer = [chunk(content="x") for _ in range(3)]
    hidden = await ask([OPENING, *answer, END, told, DONE])
    shown = await ask([OPENING, chunk(reasoning="x"), *answer, END, told, DONE])
    assert (hidden.hidden_tokens, shown.hidden_tokens) == (47, 0)
    assert record(output_tokens=50, hidden_tokens=47, first_s=1.1, last_s=1.2).tpot_s == pytest.approx(0.05)


def test_an_answer_in_one_piece_has_no_time_per_token_and_others_are_told() -> None:
    whole = record(output_tokens=8, seen_tokens=1, seen_chunks=1, first_s=1.1, last_s=1.1)
    assert whole.tpot_s is None and record(output_tokens=1, seen_tokens=1, seen_chunks=1).tpot_s is None
    fewer = record(output_tokens=8, seen_tokens=4, seen_chunks=4)
    all_seen = record(output_tokens=8, seen_tokens=8, seen_chunks=4)
    thought = record(output_tokens=8, seen_tokens=4, seen_chunks=4, hidden_tokens=4)
    notes = summarise(Scenario(), Run(records=[whole, fewer, fewer, all_seen, thought]))["notes"]
    assert [note for note in notes if note.startswith("1 answers of several tokens came in one piece")]
    assert [note for note in notes if note.startswith("2 answers have more tokens")]
    assert not any("answers" in note for note in summarise(Scenario(), Run(records=[all_seen, thought]))["notes"])


def test_answers_whose_tokens_the_server_did_not_count_are_told() -> None:
    notes = summarise(Scenario(), Run(records=[record(), record(prompt_tokens=0), record(prompt_tokens=0)]))["notes"]
    assert [note for note in notes if note.startswith("2 answers came without usage")]


@pytest.mark.parametrize("last", [b"data: [DONE]", b"data: [DONE]\n", b"data:[DONE]\r\n\r\n", b"data: [DONE]\r\r"])
async def test_an_answer_may_end_with_its_body(last: bytes) -> None:
    reply = await ask([chunk(content="x"), END, last])
    assert (reply.outcome, reply.code) == (Outcome.FINISHED, "OK")


async def test_a_connection_is_used_again_where_the_body_ends_after_its_last_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else each answer of such a server has a connection of its own, and its opening is part of the time to first token."""
    monkeypatch.setattr(http_transport, "_READ_ON_S", 60)
    num_opened = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_opened
        num_opened += 1
        try:
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                length = [line for line in request.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                await reader.readexactly(int(length[0].partition(b":")[2]))
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                )
                for part in (chunk(content="x"), END, DONE):
                    writer.write(b"%x\r\n%s\r\n" % (len(part), part))
                await asyncio.sleep(PAUSE_S)
                writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    target = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    tenant = {"target": target, "max_requests": 8, "arrivals": {"process": "closed"}}
    run = await run_here(parse_scenario({"duration_s": 60, "tenants": [tenant]}, origin="the test"))
    listening.close()
    assert [each.outcome for each in run.records] == 8 * [Outcome.FINISHED]
    assert num_opened == 2  # one to see whether there is a server
    result = summarise(Scenario(), run)
    assert result["client"]["connections"] == 1


async def test_a_server_that_does_not_answer_in_time_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of time has no text of its own."""
    monkeypatch.setattr(discover, "TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        target = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=r"cannot be reached: no answer in time$"):
            await resolve(parse_scenario({"tenants": [{"target": target}]}, origin="x"), None)


async def test_who_does_not_end_a_body_has_answered_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection is given up, and the wait for the end is no part of the answer."""
    monkeypatch.setattr(http_transport, "_READ_ON_S", 0.25)
    async with server([chunk(content="x"), END, DONE, *[b": still here\n\n"] * 1000]) as target:
        tenant = {"target": target, "max_requests": 3, "arrivals": {"process": "closed"}}
        run = await run_here(parse_scenario({"duration_s": 60, "tenants": [tenant]}, origin="the test"))
    assert [each.outcome for each in run.records] == 3 * [Outcome.FINISHED]
    assert [each.num_connections for each in run.healths] == [3]
    assert all(after.sent_s - each.ended_s > 0.2 for each, after in pairwise(run.records))


def test_what_an_answer_takes_in_memory_is_what_was_seen_of_it() -> None:
    """A server may say that one chunk had a thousand million tokens."""
    boasting = [
        record(tenant=place, session=number, output_tokens=1 << 30, seen_tokens=chunks, seen_chunks=chunks)
        for place in range(2)
        for number, chunks in enumerate((1, 2, 5))
    ]
    assert [len(token_times(each)) for each in boasting] == [1, 2, 5] * 2
    assert token_times(boasting[2]) == pytest.approx([1.1, 1.1225, 1.145, 1.1675, 1.19])
    two = parse_scenario({"warmup_s": 0.5, "tenants": [{"name": "a"}, {"name": "b"}]}, origin="the test")
    result = summarise(two, Run(records=boasting))
    assert result["total_output_tokens"] == 6 << 30
    assert "Service by tenant" in report(two, result, boasting)


LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
NAMES = st.sampled_from([b"", b"error", b"a:b"])
LINES = st.lists(st.sampled_from([b"", b"{", b"a b", b" :", b"x"]), min_size=1, max_size=3)
EVENTS = st.lists(st.tuples(NAMES, LINES), max_size=4)


@given(
    EVENTS, st.lists(LINE_ENDS, min_size=1, max_size=5), st.sampled_from([b": ", b":"]),
    st.lists(st.integers(0, 200), max_size=8), st.booleans(), st.sampled_from([b"", BOM_UTF8]), st.booleans(),
)  # fmt: skip
def test_events_are_the_same_however_they_are_cut(
    events: list[tuple[bytes, list[bytes]]], ends: list[bytes], colon: bytes, cuts: list[int], is_closed: bool, mark: bytes,
    has_comments: bool,
) -> None:  # fmt: skip
    expected, text, line_ends = [], mark, cycle(ends)
    for name, drawn in events:
        values = [line.lstrip(b" ") for line in drawn] if colon == b":" else drawn
        expected.append(Event(name, b"\n".join(values)))
        before = [b": a comment", b"id: 1"] * has_comments + [b"event: " + name] * bool(name)
        for line in [*before, *(b"data" + colon + value for value in values), b""]:
            end = next(line_ends)
            # A CR and a LF would be one end.
            text += line + (b"\r" if not line and end == b"\n" and text.endswith(b"\r") else end)
    if not is_closed:
        text = text.rstrip(b"\r\n")
    places = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    reader, found = EventReader(), []
    for begin, until in pairwise(places):
        found += list(reader.feed(text[begin:until]))
    if is_closed:
        assert found == expected  # at once, and not only when the body ends
    assert found + list(reader.end()) == expected


def test_an_empty_line_after_an_end_in_two_parts_ends_an_event() -> None:
    reader, found = EventReader(), []
    for part in (b"data: a\r", b"\n", b"\n", b"data: b\r", b"", b"\n", b"\r", b"\n"):
        found += list(reader.feed(part))
    assert found == [Event(b"", b"a"), Event(b"", b"b")]


def test_an_event_that_is_too_long_is_refused() -> None:
    for end in (b"", b"\n"):
        reader = EventReader()
        part = b"data: " + b"x" * 1000 + end
        with pytest.raises(ValueError, match="more than"):
            for _ in range(MAX_EVENT_BYTES):
                list(reader.feed(part * 1000))


@pytest.mark.parametrize(
    ("parts", "how", "code", "reason"),
    [
        ([json.dumps({"error": {"code": "boom", "message": "x"}}).encode()], JSON, "ERROR_IN_ANSWER", "boom"),
        ([b'{"object":"error",', b'"type":"boom"}'], JSON, "ERROR_IN_ANSWER", "boom"),
        ([b"<html>"], {"content_type": "text/html"}, "UNREADABLE_ANSWER", "text/html is no stream of events"),
        ([b'{"choices":[]}'], JSON, "UNREADABLE_ANSWER", "application/json is no stream of events"),
        ([chunk(content="x"), event({"error": {"type": "boom"}}), DONE], {}, "ERROR_IN_STREAM", "boom"),
        ([chunk(content="x"), event({"error": "boom"}), DONE], {}, "ERROR_IN_STREAM", "boom"),
        ([chunk(content="x"), event({"object": "error", "code": 500}), DONE], {}, "ERROR_IN_STREAM", "500"),
        ([chunk(content="x"), b'event: error\ndata: {"code":"boom"}\n\n'], {}, "ERROR_IN_STREAM", "boom"),
        ([chunk(content="x"), b"event: error\ndata: it broke\n\n"], {}, "ERROR_IN_STREAM", ""),
        ([chunk(content=7)], {}, "UNREADABLE_ANSWER",
         "Expected `str | array | null`, got `int` - at `$.choices[0].delta.content`"),
        ([chunk(content="x"), usage(completion_tokens="8")], {}, "UNREADABLE_ANSWER", None),
        ([chunk(content="x"), usage(completion_tokens=10**19)], {}, "UNREADABLE_ANSWER", None),
        ([chunk(content="x"), usage(completion_tokens=-1)], {}, "UNREADABLE_ANSWER", None),
        ([b"data: {\n\n"], {}, "UNREADABLE_ANSWER", None),
        ([b'data: {"error": ' + b"[" * 100_000], {}, "UNREADABLE_ANSWER", None),
        ([chunk(content="x"), DONE], {}, "TRUNCATED", "no finish_reason"),
        ([chunk(content="x"), END], {}, "TRUNCATED", "no [DONE]"),
        ([b'{"error":{"code":', b'"busy"}}'], JSON | {"status": "429 X"}, "HTTP_429", "busy"),
        ([b'{"object":"error","code":400}'], JSON | {"status": "400 X"}, "HTTP_400", "400"),
        ([b"<html>"], {"status": "500 X", "content_type": "text/html"}, "HTTP_500", ""),
    ],
)  # fmt: skip
async def test_what_a_server_says_is_kept(
    parts: list[bytes], how: dict[str, str], code: str, reason: str | None
) -> None:
    reply = await ask(parts, **how)
    assert reply.code == code
    assert reason is None or reply.reason == reason
    assert reply.outcome is (Outcome.REFUSED if code == "HTTP_429" else Outcome.FAILED)


@pytest.mark.parametrize(
    ("parts", "outcome", "code"),
    [
        ([b'{"choices":[{"message":{"content":"x"}}],', b'"usage":{"completion_tokens":1}}'], Outcome.FINISHED, "OK"),
        ([b'{"error":{"code":"boom"}}'], Outcome.FAILED, "ERROR_IN_ANSWER"),
        ([b"<html>"], Outcome.FAILED, "UNREADABLE_ANSWER"),
        ([b'{"choices":[]}'], Outcome.FAILED, "TRUNCATED"),
    ],
)
async def test_whole_answers(parts: list[bytes], outcome: Outcome, code: str) -> None:
    reply = await ask(parts, stream=False, content_type="application/json")
    assert (reply.outcome, reply.code) == (outcome, code)
    assert reply.text == (["x"] if outcome is Outcome.FINISHED else [])


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3.0), ("0.5", 0.5), ("0", 0.0), ("-1", None), ("nan", None), ("inf", None), ("1e400", None), ("soon", None),
        ("Fri, 31 Dec 99999 23:59:59 GMT", None), ("Fri, 31 Dec 99999999999999999999999 23:59:59 GMT", None),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0), ("", None),
    ],
)  # fmt: skip
def test_a_time_to_come_back_is_a_time(header: str, seconds: float | None) -> None:
    assert _retry_after(header) == seconds


@pytest.mark.parametrize(
    "told",
    [
        '{"data": [{"id": "m", "max_model_len": Infinity}]}', '{"data": [{"id": "m", "max_model_len": 1e400}]}',
        '{"data": [{"id": "m", "max_model_len": -5}]}', '{"data": [{"id": 5}]}', '{"data": 5}', "[]", "[" * 100_000,
    ],
)  # fmt: skip
async def test_what_is_no_list_of_models_is_told(told: str) -> None:
    async with server([told.encode()], content_type="application/json") as target:
        with pytest.raises(ConnectionError, match="/v1/models does not answer as OpenAI's API does"):
            await resolve(parse_scenario({"tenants": [{"target": target}]}, origin="x"), None)


@pytest.mark.parametrize("told", ["1e400", "-1", '"x"', "null", "1e300", "[" * 100_000])
async def test_a_count_of_tokens_that_is_none_is_not_used(told: str) -> None:
    body = f'{{"data": [{{"id": "m"}}], "count": {told}}}' if not told.startswith("[") else '{"data": [{"id": "m"}]}'
    async with server([body.encode()], content_type="application/json") as target:
        (found,) = await resolve(parse_scenario({"tenants": [{"target": target}]}, origin="x"), None)
    assert found.facts.tokens_per_word == 1


async def test_a_list_of_models_may_come_in_pieces() -> None:
    listed = json.dumps({"data": [{"id": "m"}], "count": 800}).encode()
    async with server([listed[:9], listed[9:30], listed[30:]], content_type="application/json") as target:
        scenario = parse_scenario({"tenants": [{"target": target}]}, origin="x")
        (found,) = await resolve(scenario, None)
    assert found.facts.model == "m"
    assert found.facts.tokens_per_word == pytest.approx(2)  # 800 tokens of 400 words, by the same body
