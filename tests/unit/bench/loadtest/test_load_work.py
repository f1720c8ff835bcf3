"""What is sent: lengths, forms, shared beginnings, sessions, files; always the same for the same seed."""

import math
import random
import statistics
import tempfile
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.loadtest.files import _moment, left_out, load_entries, read_contents
from bench.loadtest.scenario import Fixed, LogNormal, ShareGptLike, Tenant, Trace, Uniform
from bench.loadtest.sender import key_of
from bench.loadtest.work import Entry, Facts, Workload, answered, extended, sample
from model_parallel.errors import ConfigError

EXAMPLES = Path(__file__).parents[4] / "examples" / "load"
FACTS = Facts(model="m", vocab_size=1000, tokens_per_word=1.0)


def tenant(work: dict[str, Any], **fields: Any) -> Tenant:
    return Tenant.model_validate({"work": {"kind": "synthetic"} | work} | fields)


def workload(work: dict[str, Any], entries: list[Entry] | None = None, seed: int = 0, **fields: Any) -> Workload:
    return Workload(tenant(work, **fields), seed, FACTS, entries or [])


def trace(format_: str, **work: Any) -> Tenant:
    name = {"mooncake": "mooncake.jsonl", "csv": "trace.csv"}.get(format_, f"{format_}.csv")
    return tenant({"kind": "trace", "format": format_, "path": EXAMPLES / name} | work, arrivals={"process": "trace"})


@given(st.integers(0, 2**32), st.integers(0, 10**6), st.integers(1, 300))
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(seed: int, index: int, length: int) -> None:
    work = {"input_tokens": length, "turns": {"count": 2, "think_s": 1}}
    first, second = workload(work, seed=seed).session(index), workload(work, seed=seed).session(index)
    assert msgspec.msgpack.encode(first) == msgspec.msgpack.encode(second)
    if length > 20:
        assert first != workload(work, seed=seed + 1).session(index)
        assert first != workload(work, seed=seed).session(index + 1)


@given(st.integers(0, 1000))
def test_prompts_have_the_length_asked_for_and_ids_of_the_vocabulary(index: int) -> None:
    (turn,) = workload({"input_tokens": {"kind": "uniform", "min": 3, "max": 9}, "output_tokens": 5}).session(index)
    assert 3 <= len(turn.content) <= 9 and turn.output_tokens == 5
    assert all(0 <= token < FACTS.vocab_size for token in turn.content)  # type: ignore[operator]


def test_lengths_have_the_means_asked_for() -> None:
    draw = random.Random(0)
    for lengths, mean in (
        (Fixed(tokens=7), 7), (Uniform(kind="uniform", min=10, max=20), 15),
        (LogNormal(kind="lognormal", mean=200, sigma=0.7), 200),
        (ShareGptLike(kind="sharegpt", max=1 << 20), 161),
    ):  # fmt: skip
        # 20,000 draws of a log-normal with sigma 1 have a mean within 1 % (one standard deviation).
        assert statistics.fmean(sample(lengths, draw, "input") for _ in range(20_000)) == pytest.approx(mean, rel=0.04)


def test_prefixes_are_shared_by_as_many_requests_as_there_are_of_each() -> None:
    made = workload({"prefix": {"tokens": 30, "count": 3}, "input_tokens": 10})
    prompts = [made.session(index)[0].content for index in range(60)]
    assert all(len(prompt) == 40 for prompt in prompts)
    assert len({tuple(prompt[:30]) for prompt in prompts}) == 3
    assert len({tuple(prompt[30:]) for prompt in prompts}) == 60


def test_chats_are_made_of_words() -> None:
    facts = Facts(model="m", vocab_size=1000, tokens_per_word=2.0)
    chat = tenant({"input_tokens": 100}, target="http://127.0.0.1", api="chat")
    ((role, text),) = Workload(chat, 0, facts, []).session(0)[0].content  # type: ignore[misc]
    assert role == "user" and len(text.split()) == 50


def test_a_conversation_grows_by_what_was_said() -> None:
    assert answered(extended([1, 2], [3]), "x", [4]) == [1, 2, 3, 4]
    assert answered(extended("a", "b"), "c", []) == "a\nbc"
    messages: Any = [("user", "hello")]
    history = answered(extended(None, messages), "hi", [])
    assert extended(history, [("user", "bye")]) == [("user", "hello"), ("assistant", "hi"), ("user", "bye")]


@pytest.mark.parametrize("format_", ["azure", "burstgpt", "mooncake", "csv"])
def test_traces_are_read_in_order_from_their_start(format_: str) -> None:
    entries = load_entries(trace(format_))
    assert len(entries) == 60
    assert entries[0].at_s == 0 and all(a.at_s <= b.at_s for a, b in pairwise(entries))
    # The samples were drawn at three requests a second.
    assert entries[-1].at_s == pytest.approx(20, rel=0.5)
    twice = load_entries(trace(format_, speed=2))
    assert twice[-1].at_s == pytest.approx(entries[-1].at_s / 2)
    (turn,) = Workload(trace(format_), 0, FACTS, entries).session(7)
    assert len(turn.content) == entries[7].input_tokens and turn.output_tokens == entries[7].output_tokens


MOMENTS = st.datetimes(datetime(2000, 1, 1), datetime(2050, 1, 1))
ZONE_FORMS = st.sampled_from(["", "Z", "+", "-"])


@given(MOMENTS, st.integers(0, 9), ZONE_FORMS, st.integers(0, 14 * 60), st.sampled_from(" T"))
def test_moments_are_read_with_any_fraction_and_zone(
    moment: datetime, digits: int, zone: str, offset: int, middle: str
) -> None:
    fraction = f"{moment.microsecond:06}000"[:digits]
    text = moment.strftime(f"%Y-%m-%d{middle}%H:%M:%S") + (f".{fraction}" if fraction else "")
    text += f"{zone}{offset // 60:02}:{offset % 60:02}" if zone in ("+", "-") else zone
    expected = moment.replace(microsecond=int((fraction + "000000")[:6]), tzinfo=UTC).timestamp()
    expected -= {"+": offset * 60, "-": -offset * 60}.get(zone, 0)
    assert _moment(text, "timestamp")[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "2023-11-16 18:15:46.",
        "2023-11-16 18:15:46.x",
        "18:15",
        "2023-11-16 18:15:46.5+",
        "",
        "-1",
        "1700000000000000000",
    ],
)
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"timestamp is .*; it must be seconds from 0 to 1e15, or a date and time"):
        _moment(text, "timestamp")


def test_mooncake_requests_with_the_same_block_begin_alike() -> None:
    made = trace("mooncake")
    entries = load_entries(made)
    first = next(i for i, entry in enumerate(entries) if entry.blocks == [1])
    other = next(i for i, entry in enumerate(entries) if entry.blocks == [1] and i > first)
    a, b = (Workload(made, 0, FACTS, entries).session(index)[0].content for index in (first, other))
    shortest = min(len(a), len(b))
    assert a[:shortest] == b[:shortest]


def test_a_trace_is_cut_to_what_fits() -> None:
    made = trace("csv", max_tokens=20)
    entries = [Entry(input_tokens=100, output_tokens=100), Entry(input_tokens=10, output_tokens=4)]
    turns = [Workload(made, 0, FACTS, entries).session(index)[0] for index in range(2)]
    assert [(len(turn.content), turn.output_tokens) for turn in turns] == [(1, 19), (10, 4)]


@pytest.mark.parametrize(
    ("format_", "lines"),
    [
        ("csv", ["timestamp,input_tokens,output_tokens", "1,2,0", "2,3,4", "3,4,0"]),
        ("burstgpt", ["Timestamp,Model,Request tokens,Response tokens", "1,GPT-4,2,0", "2,GPT-4,3,4", "3,GPT-4,4,0"]),
        ("mooncake", [f'{{"timestamp": {n}, "input_length": 3, "output_length": {n % 2 * 4}}}' for n in (0, 1, 2)]),
    ],
)
def test_requests_of_a_trace_that_had_no_answer_are_counted(format_: str, lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "t").write_text("\n".join(lines))
    made = tenant({"kind": "trace", "format": format_, "path": tmp_path / "t"}, arrivals={"process": "trace"})
    entries, num_unanswered = read_contents(made)
    assert entries == [Entry(at_s=0.0, input_tokens=3, output_tokens=4)] and num_unanswered == 2
    assert isinstance(made.work, Trace)
    assert left_out("a", made.work, entries, 1, 60.0, num_unanswered=num_unanswered) == [
        "tenant a: 2 requests of the trace had no answer, and are not sent"
    ]


def test_what_of_a_trace_is_not_sent_is_told() -> None:
    work = trace("csv").work
    assert isinstance(work, Trace)
    entries = [Entry(at_s=float(at_s), input_tokens=10, output_tokens=4) for at_s in range(600)]
    assert left_out("a", work, entries, 600, 60.0) == [
        "tenant a: 60 of 600 requests of the trace are due within the duration of 60 s; the last is due at 599 s: a longer "
        "duration sends all"
    ]
    assert left_out("a", work, entries, 600, 600.0) == left_out("a", work, entries, 50, 60.0) == []
    shortened = work.model_copy(update={"max_entries": 600})
    assert left_out("a", shortened, entries, 600, 600.0) == [
        "tenant a: only the first 600 requests of the trace were read (work.max_entries)"
    ]


def test_prompts_and_conversations_are_read() -> None:
    prompts = tenant({"kind": "jsonl", "path": EXAMPLES / "prompts.jsonl"})
    entries = load_entries(prompts)
    assert Workload(prompts, 0, FACTS, entries).session(len(entries))[0].content == entries[0].turns[0]
    shared = tenant({"kind": "sharegpt", "path": EXAMPLES / "sharegpt.json", "max_turns": 2})
    turns = Workload(shared, 0, FACTS, load_entries(shared)).session(0)
    assert [turn.content for turn in turns] == ["What do you know about tea?", "Say it in one sentence."]


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("jsonl", '{"prompt": "a"}\n{"prompt": 5}\n', "line 2: prompt must be"),
        ("jsonl", '{"prompt": "a", "messages": []}\n', "line 1: it must have either"),
        ("jsonl", '{"messages": [{"role": "user"}]}\n', "line 1: messages must be"),
        ("jsonl", '{"prompt": "a", "output_tokens": 0}\n', "output_tokens is 0"),
        (
            "jsonl",
            '{"prompt": [99999999999]}\n',
            "token id 99999999999; each must be from 0 to 4294967295",
        ),
        ("jsonl", '{"prompt": [5, -1]}\n', "line 1: prompt holds the token id -1"),
        (
            "jsonl",
            '{"prompt": "a"}\n{"prompt": "ab\\ud800"}\n',
            r"line 2: prompt holds half of a surrogate pair, \\ud800",
        ),
        (
            "jsonl",
            '{"messages": [{"role": "user", "content": "\\udc00"}]}\n',
            "line 1: content holds half of a surrogate",
        ),
        ("jsonl", '{"messages": [{"role": "\\udc00", "content": "a"}]}\n', "line 1: role holds half of a surrogate"),
        ("jsonl", '{"prompt": "a", "output_tokens": null, "max_tokens": 0}\n', "line 1: max_tokens is 0"),
        (
            "sharegpt",
            '[{"conversations": [{"from": "human", "value": "\\ud83d"}]}]',
            "item 0: value holds half of a surrogate",
        ),
        (
            "trace",
            "timestamp,input_tokens,output_tokens\n1,2,3\n2024-05-10,2,3\n",
            "line 3: timestamp is '2024-05-10'",
        ),
        (
            "trace",
            "timestamp,input_tokens,output_tokens\n2024-05-10,2,3\n1,2,3\n",
            "line 3: timestamp is '1', and .* dates",
        ),
        ("trace", "timestamp,input_tokens,output_tokens,input_tokens\n1,2,3,4\n", "several columns 'input_tokens'"),
        ("jsonl", "[" * 100_000, "line 1"),
        ("jsonl", "", "holds no request"),
        ("sharegpt", "{}", "must hold a list"),
        ("sharegpt", '[{"conversation": []}]', "item 0"),
        ("trace", "timestamp,input_tokens\n1,2\n", "has no column 'output_tokens'"),
        ("trace", "timestamp,input_tokens,output_tokens\nnoon,2,3\n", "line 2: timestamp is 'noon'"),
        ("trace", "timestamp,input_tokens,output_tokens\n1,2.5,3\n", "input_tokens is '2.5'"),
        ("trace", "timestamp,input_tokens,output_tokens\n1,2,nan\n", "output_tokens is 'nan'"),
        ("trace", "timestamp,input_tokens,output_tokens\n1,2\n", "output_tokens is None"),
        (
            "trace",
            "timestamp,input_tokens,output_tokens\n1,999999999999,5\n",
            "input_tokens is '999999999999'; it must be a whole number from 1 to 1073741824",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_named(kind: str, text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    of_trace = {"format": "csv"} if kind == "trace" else {}
    arrivals = {"arrivals": {"process": "trace"}} if kind == "trace" else {}
    with pytest.raises(ConfigError, match=expected):
        load_entries(tenant({"kind": kind, "path": tmp_path / "file", **of_trace}, **arrivals))


def test_an_answer_is_as_long_as_a_line_says(tmp_path: Path) -> None:
    (tmp_path / "f").write_text(
        '{"prompt": "a", "output_tokens": null, "max_tokens": 7}\n{"prompt": "\\ud83d\\ude00"}\n'
    )
    entries = load_entries(tenant({"kind": "jsonl", "path": tmp_path / "f"}))
    assert [entry.output_tokens for entry in entries] == [7, None]
    assert entries[1].turns == ["\U0001f600"]  # a pair that is whole


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("jsonl", '{"prompt": "a"}\n'),
        ("sharegpt", '[{"conversations": [{"from": "human", "value": "a"}]}]'),
        ("csv", "timestamp,input_tokens,output_tokens\n1,2,3\n"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"),
        ("mooncake", '{"timestamp": 27482, "input_length": 1500, "output_length": 52, "hash_ids": []}\n'),
    ],
)
def test_a_byte_order_mark_is_skipped(kind: str, text: str, tmp_path: Path) -> None:
    """Spreadsheets write one."""
    (tmp_path / "file").write_text(text, encoding="utf-8-sig")
    of_trace = {"kind": "trace", "format": kind} if kind in ("csv", "azure", "mooncake") else {"kind": kind}
    arrivals = {"arrivals": {"process": "trace"}} if "format" in of_trace else {}
    marked = load_entries(tenant(of_trace | {"path": tmp_path / "file"}, **arrivals))
    (tmp_path / "file").write_text(text)
    assert marked == load_entries(tenant(of_trace | {"path": tmp_path / "file"}, **arrivals))
    assert len(marked) == 1


def test_a_key_begins_after_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n", encoding="utf-8-sig")
    assert key_of(tenant({"kind": "synthetic"}, api_key_file=tmp_path / "key")) == "secret"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load_entries(tenant({"kind": "jsonl", "path": tmp_path / "nowhere"}))


@given(st.text(max_size=300))
def test_whatever_a_trace_holds_it_is_read_or_refused(text: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".csv", encoding="utf-8", newline="") as file:
        file.write("timestamp,input_tokens,output_tokens\n" + text)
        file.flush()
        try:
            entries = load_entries(
                tenant({"kind": "trace", "format": "csv", "path": file.name}, arrivals={"process": "trace"})
            )
        except ConfigError:
            return
        assert all(math.isfinite(entry.at_s) and entry.input_tokens >= 1 for entry in entries)
