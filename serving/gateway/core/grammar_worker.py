"""The process in which a gateway tries out grammars: a program that comes from a stranger, in effect, is compiled here first.

    python -m serving.gateway.core.grammar_worker

Reads frames (model_parallel/transport/frames.py) of msgpack from stdin: a Setup, then Trials, each of which it answers on stdout
with an empty frame when it begins, and with a Verdict. A trial that takes more time of the processor or more memory than it may
ends the process: the kernel sees to that. It ends by itself when its gateway does, which closes the pipe.
"""

import json
import os
import random
import re
import resource
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import msgspec
import numpy as np

from model_parallel.config import TokenTable
from model_parallel.engine.matching import GrammarCompiler, GrammarError, Matcher, allowed_bits
from model_parallel.transport.frames import FrameReader, encode_frame

MAX_EXTRA_BYTES = 512 << 20
"""Address space beyond what the process has when it begins."""
_MAX_PROBES = 200
"""Parts of a schema that are compiled by themselves to find the one that is wrong."""
_NUM_WALKS, _WALK_TOKENS = 3, 5
"""Texts that are begun with a grammar that compiles, and tokens of each: the library's limits on size are met in the first."""
_READ_BYTES = 1 << 16
_UNKNOWN_KEYWORDS = re.compile(r"Unimplemented keys: \[(.*)\]")

_UNSUPPORTED = re.compile(
    "(?:not|only|is) supported|are not disjoint|too many digits|is not present in a registry|too large to be followed"
)
"""In what is said of a schema that may be right. Other messages say that a schema is wrong, or that no value fits it."""

_IN_OUR_WORDS = {
    "oneOf constraints are not supported": (
        "oneOf is not supported where two of its alternatives may fit the same value; send anyOf"
    ),
    "Failed to generate regex for": (
        "minimum is supported up to 10^18 where there is no maximum, and maximum down to -10^18 where there is no minimum"
    ),
}
"""By how a message of the library begins that says nothing to a client."""


class Setup(msgspec.Struct, frozen=True, array_like=True):
    """Gateway → worker, first."""

    table: TokenTable
    max_compile_s: int
    """Seconds of processor for a trial."""


class Trial(msgspec.Struct, frozen=True, array_like=True):
    """Gateway → worker: can this be compiled and followed?"""

    grammar: str
    schemas: tuple[str, ...] = ()
    """JSON schemas that it is made of: to find the place of what is wrong."""


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """Worker → gateway."""

    error: str = ""
    """What is wrong; "" for nothing."""
    schema: int | None = None
    """In which schema, where that is known."""
    place: str = ""
    """Where in it: a path such as ".properties.age"."""
    unsupported_schemas: tuple[int, ...] = ()
    """All schemas that may be right, and ask for what the library does not know how to hold to."""


def try_out(compiler: GrammarCompiler, trial: Trial) -> Verdict:
    """Compile a grammar and follow it for some tokens; if that fails, find out where."""
    if not (error := _problem(compiler, trial.grammar)):
        return Verdict()
    schemas = [json.loads(schema) for schema in trial.schemas]
    problems = {index: _problem(compiler, "start: " + schema_rule(schema)) for index, schema in enumerate(schemas)}
    first = next(filter(problems.get, problems), None)
    found = None if first is None else _find(compiler, first, schemas[first])
    unsupported = tuple(index for index, problem in problems.items() if _UNSUPPORTED.search(problem))
    return Verdict(error) if found is None else msgspec.structs.replace(found, unsupported_schemas=unsupported)


def _problem(compiler: GrammarCompiler, text: str) -> str:
    """What is wrong with a grammar; "" for nothing."""
    try:
        grammar = compiler.compile(text)
    except GrammarError as error:
        return _line(str(error))
    draw = random.Random(0)  # the same verdict each time
    mask_W = np.zeros(compiler.num_words, dtype=np.int32)
    for _ in range(_NUM_WALKS):
        matcher = Matcher(grammar, spares_end=False)
        for num_tokens in range(_WALK_TOKENS):
            if not (matcher.is_open and matcher.fill(mask_W)):
                if limit := matcher.limit_met:
                    return f"is too large to be followed after {num_tokens} tokens: {_line(limit)}"
                break
            matcher.consume(
                draw.choice(np.flatnonzero(allowed_bits(mask_W[None], range(compiler.vocab_size))[0]).tolist())
            )
    return ""


def schema_rule(schema: Any) -> str:
    """A schema as the right side of a rule."""
    return "%json " + json.dumps(schema, ensure_ascii=False)


def _find(compiler: GrammarCompiler, index: int, schema: Any) -> Verdict | None:
    """The smallest part of a schema that cannot be compiled by itself; None when all of it can."""
    definitions = {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema, dict) and key in schema}
    num_left = _MAX_PROBES

    def problem_of(part: Any) -> str:
        nonlocal num_left
        num_left -= 1
        whole = part if part is schema or not isinstance(part, dict) else definitions | part
        return _problem(compiler, "start: " + schema_rule(whole))

    error = problem_of(schema)
    if not error:
        return None
    place, part = "", schema
    found = True
    while found and num_left > 0:
        found = False
        for step, inner in _parts(part):
            if num_left <= 0:
                break
            if inner_error := problem_of(inner):
                place, part, error, found = f"{place}.{step}", inner, inner_error, True
                break
    return Verdict(error, index, place)


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """Schemas inside a schema, with their paths."""
    if not isinstance(schema, dict):
        return
    for key in ("$defs", "definitions", "properties", "patternProperties"):
        for name, part in schema[key].items() if isinstance(schema.get(key), dict) else ():
            yield f"{key}.{name:.60}", part
    for key in ("allOf", "anyOf", "oneOf", "prefixItems"):
        for index, part in enumerate(schema[key] if isinstance(schema.get(key), list) else ()):
            yield f"{key}[{index}]", part
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield key, schema[key]


def _line(message: str) -> str:
    """The library's message on one line, without the grammar that it quotes below it."""
    told = [line.strip().removeprefix("error: ") for line in message.splitlines() if line.strip().startswith("error: ")]
    if told:  # of a regular expression
        return f"{told[0]}, in a regular expression"
    first = message.partition("\n")[0]
    what = (first.partition("failed to compile JSON schema: ")[2] or first).partition(". Enable ")[0]
    if unknown := _UNKNOWN_KEYWORDS.fullmatch(what):
        return f"not supported: {unknown[1]}"
    return next((ours for begins, ours in _IN_OUR_WORDS.items() if what.startswith(begins)), what)


def _limit(max_compile_s: int, most_bytes: int) -> None:
    """Until the next trial."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used_s = int(usage.ru_utime + usage.ru_stime)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (used_s + 1 + max_compile_s, hard))
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _frames(source: BinaryIO) -> Iterator[bytes]:
    reader = FrameReader()
    while data := os.read(source.fileno(), _READ_BYTES):
        reader.feed(data)
        while (payload := reader.next_payload()) is not None:
            yield payload


def _answer(payload: bytes) -> None:
    sys.stdout.buffer.write(encode_frame(payload))
    sys.stdout.buffer.flush()


def main() -> None:
    """See above."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    frames = _frames(sys.stdin.buffer)
    setup = msgspec.msgpack.decode(next(frames), type=Setup)
    compiler = GrammarCompiler(setup.table)
    with open("/proc/self/statm", encoding="ascii") as file:
        num_pages = int(file.read().split()[0])
    most_bytes = num_pages * resource.getpagesize() + MAX_EXTRA_BYTES
    decode = msgspec.msgpack.Decoder(Trial).decode
    encode = msgspec.msgpack.Encoder().encode
    for payload in frames:
        _limit(setup.max_compile_s, most_bytes)
        _answer(b"")
        _answer(encode(try_out(compiler, decode(payload))))


if __name__ == "__main__":
    main()
