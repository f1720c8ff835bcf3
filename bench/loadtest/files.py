"""Reads prompts and traces from files. Everything is bounded, and what is wrong is named by file, line and field.

A byte-order mark, which spreadsheets write, is skipped.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bench.loadtest.scenario import JsonLines, ShareGpt, Tenant, Trace
from bench.loadtest.work import Entry
from model_parallel.errors import ConfigError

MAX_FILE_BYTES = 2 << 30
MAX_LINE_BYTES = 8 << 20
MAX_COUNT = 1 << 30
"""Tokens of a prompt or an answer."""
MAX_TOKEN_ID = (1 << 32) - 1
"""That a gRPC request can hold."""
AZURE = {"timestamp": "TIMESTAMP", "input_tokens": "ContextTokens", "output_tokens": "GeneratedTokens"}
"""Azure/AzurePublicDataset, AzureLLMInferenceTrace_*.csv."""
BURSTGPT = {"timestamp": "Timestamp", "input_tokens": "Request tokens", "output_tokens": "Response tokens"}
"""HPMLL/BurstGPT, BurstGPT_*.csv."""


class Contents(NamedTuple):
    """Of a file that work is read from."""

    entries: list[Entry]
    num_unanswered: int
    """Requests of a trace that had no answer. They are not among the entries."""


def load_entries(tenant: Tenant) -> list[Entry]:
    """What is sent of the file of the tenant's work; empty for synthetic work. Raises ConfigError."""
    return read_contents(tenant).entries


def read_contents(tenant: Tenant) -> Contents:
    """Of the file of the tenant's work; nothing for synthetic work. Raises ConfigError."""
    work = tenant.work
    if isinstance(work, JsonLines | ShareGpt | Trace):
        where = f"tenants.{tenant.name}.work.path: {work.path}"
        try:
            if (size := work.path.stat().st_size) > MAX_FILE_BYTES:
                raise ConfigError(f"{where} has {size} bytes; the limit is {MAX_FILE_BYTES}")
            entries, num_unanswered = [], 0
            for entry in _reader(work, where):
                if entry.output_tokens == 0:
                    num_unanswered += 1
                    continue
                entries.append(entry)
                if len(entries) == work.max_entries:
                    break
        except OSError as error:
            raise ConfigError(f"{where}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where} is not UTF-8: {error}") from error
        if not entries:
            raise ConfigError(f"{where} holds no request")
        if isinstance(work, Trace):
            return Contents(_from_start(entries, work.speed), num_unanswered)
        if tenant.chosen_form == "chat" and any(entry.ids for entry in entries):
            raise ConfigError(
                f"{where} holds token ids, which api {tenant.chosen_api} does not take as chat; set form: ids"
            )
        if tenant.chosen_api == "completions" and any(entry.messages for entry in entries):
            raise ConfigError(f"{where} holds messages, which api completions does not take")
        return Contents(entries, num_unanswered)
    return Contents([], 0)


def left_out(
    tenant: str, work: Trace, entries: Sequence[Entry], num_wanted: int, duration_s: float, *, num_unanswered: int = 0
) -> list[str]:
    """Notes on what of a trace is not sent, of which at most `num_wanted` requests are. `entries` are in order of time."""
    notes, wanted = [], entries[:num_wanted]
    if num_unanswered:
        notes.append(f"tenant {tenant}: {num_unanswered} requests of the trace had no answer, and are not sent")
    num_due = sum(entry.at_s < duration_s for entry in wanted)
    if num_due < len(wanted):
        notes.append(
            f"tenant {tenant}: {num_due} of {len(wanted)} requests of the trace are due within the duration of {duration_s:g} s; "
            f"the last is due at {wanted[-1].at_s:g} s: a longer duration sends all"
        )
    if len(entries) == work.max_entries:
        notes.append(
            f"tenant {tenant}: only the first {work.max_entries} requests of the trace were read (work.max_entries)"
        )
    return notes


def _reader(work: JsonLines | ShareGpt | Trace, where: str) -> Iterator[Entry]:
    if isinstance(work, JsonLines):
        return _json_lines(work.path, where, _prompt)
    if isinstance(work, ShareGpt):
        return _sharegpt(work, where)
    match work.format:
        case "mooncake":
            return _json_lines(work.path, where, _mooncake)
        case "azure":
            return _csv(work.path, where, AZURE)
        case "burstgpt":
            return _csv(work.path, where, BURSTGPT)
        case "csv":
            return _csv(work.path, where, work.columns.model_dump())


def _from_start(entries: list[Entry], speed: float) -> list[Entry]:
    """In order of time, the first at 0."""
    first_s = min(entry.at_s for entry in entries)
    moved = (msgspec.structs.replace(entry, at_s=(entry.at_s - first_s) / speed) for entry in entries)
    return sorted(moved, key=lambda entry: entry.at_s)


def _json_lines(path: Path, where: str, read: Callable[[dict[str, Any]], Entry]) -> Iterator[Entry]:
    with path.open(encoding="utf-8-sig") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if not line.strip():
                continue
            try:
                data = json.loads(line)
                if not isinstance(data, dict):
                    raise ValueError("it must be an object")
                yield read(data)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{where}, line {number}: {error}") from error


def _prompt(data: dict[str, Any]) -> Entry:
    told = [name for name in ("output_tokens", "max_tokens") if data.get(name) is not None]
    output_tokens = _count(data[told[0]], told[0]) if told else None
    prompt, messages = data.get("prompt"), data.get("messages")
    if (prompt is None) == (messages is None):
        raise ValueError("it must have either prompt or messages")
    if messages is not None:
        if not isinstance(messages, list) or not messages:
            raise ValueError("messages must be a list of {role, content}")
        return Entry(output_tokens=output_tokens, messages=[_message(message) for message in messages])
    if isinstance(prompt, str) and prompt:
        return Entry(output_tokens=output_tokens, turns=[_text(prompt, "prompt")])
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        for token in prompt:
            if not 0 <= token <= MAX_TOKEN_ID:
                raise ValueError(f"prompt holds the token id {token}; each must be from 0 to {MAX_TOKEN_ID}")
        return Entry(output_tokens=output_tokens, ids=prompt)
    raise ValueError("prompt must be a text or a list of token ids, not empty")


def _message(message: Any) -> tuple[str, str]:
    match message:
        case {"role": str(role), "content": str(content)}:
            return _text(role, "role"), _text(content, "content")
    raise ValueError("messages must be a list of {role, content}, both texts")


def _text(value: str, field: str) -> str:
    """JSON can spell half of a character, which cannot be sent."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{field} holds half of a surrogate pair, \\u{ord(value[error.start]):04x}, at character {error.start}"
        ) from None
    return value


def _mooncake(data: dict[str, Any]) -> Entry:
    blocks = data.get("hash_ids", [])
    if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
        raise ValueError("hash_ids must be a list of whole numbers")
    return Entry(
        at_s=_number(data.get("timestamp"), "timestamp") / 1e3,
        input_tokens=_count(data.get("input_length"), "input_length"),
        output_tokens=_count(data.get("output_length"), "output_length", least=0),
        blocks=blocks,
    )


def _sharegpt(work: ShareGpt, where: str) -> Iterator[Entry]:
    try:
        conversations = json.loads(work.path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    if not isinstance(conversations, list):
        raise ConfigError(f"{where} must hold a list of conversations")
    for number, conversation in enumerate(conversations):
        said = conversation.get("conversations") if isinstance(conversation, dict) else None
        if not isinstance(said, list):
            raise ConfigError(f"{where}, item {number}: it must have a list `conversations`")
        questions = [
            part["value"]
            for part in said
            if isinstance(part, dict) and part.get("from") in ("human", "user") and isinstance(part.get("value"), str)
        ]
        turns = [question for question in questions if question][: work.max_turns]
        try:
            turns = [_text(question, "value") for question in turns]
        except ValueError as error:
            raise ConfigError(f"{where}, item {number}: {error}") from error
        if turns:
            yield Entry(turns=turns)


def _csv(path: Path, where: str, columns: Mapping[str, str]) -> Iterator[Entry]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        try:
            names = list(rows.fieldnames or ())
            absent = [name for name in columns.values() if name not in names]
            if absent:
                raise ConfigError(f"{where} has no column {', '.join(map(repr, absent))}; it has {', '.join(names)}")
            if several := [name for name in columns.values() if names.count(name) > 1]:
                raise ConfigError(f"{where} has several columns {several[0]!r}; each name that is read must stand once")
            has_dates: bool | None = None
            for row in rows:
                try:
                    input_tokens = _count(row[columns["input_tokens"]], columns["input_tokens"])
                    output_tokens = _count(row[columns["output_tokens"]], columns["output_tokens"], least=0)
                    at_s, is_date = _moment(row[columns["timestamp"]], columns["timestamp"])
                    if has_dates not in (None, is_date):
                        raise ValueError(
                            f"{columns['timestamp']} is {row[columns['timestamp']]!r}, and lines before have "
                            f"{'dates' if has_dates else 'seconds'}; all must have the same"
                        )
                    has_dates = is_date
                except ValueError as error:
                    raise ConfigError(f"{where}, line {rows.line_num}: {error}") from error
                yield Entry(at_s=at_s, input_tokens=input_tokens, output_tokens=output_tokens)
        except csv.Error as error:
            raise ConfigError(f"{where}, line {rows.line_num}: {error}") from error


def _moment(value: Any, field: str) -> tuple[float, bool]:
    """Seconds of a number, or of a date and time (of one without a zone as if it were UTC), and whether it is a date."""
    try:
        return _number(value, field), False
    except ValueError:
        try:
            parsed = datetime.fromisoformat(str(value).strip())  # Azure's seven digits of a second too
        except ValueError:
            raise ValueError(f"{field} is {value!r}; it must be seconds from 0 to 1e15, or a date and time") from None
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp(), True


def _number(value: Any, field: str) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{field} is {value!r}; it must be a number") from None
    if not 0 <= number < 1e15:
        raise ValueError(f"{field} is {value!r}; it must be from 0 to 1e15")
    return number


def _count(value: Any, field: str, least: int = 1) -> int:
    number = _number(value, field)
    if number != int(number) or not least <= number <= MAX_COUNT:
        raise ValueError(f"{field} is {value!r}; it must be a whole number from {least} to {MAX_COUNT}")
    return int(number)
