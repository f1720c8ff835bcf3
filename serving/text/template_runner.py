"""Renders a checkpoint's chat template on a few fixed conversations, in a process of its own, and ends.

    python template_runner.py < request.json > answer.json

A template is a program that came with the weights. It runs here alone: when a model is started or inspected, never for a
request, in jinja2's sandbox for untrusted templates (as transformers runs it), with bounds on memory, time and output, no files
to write, and no secrets in its environment or arguments. Imports nothing of the project.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2.debug  # noqa: F401  (jinja2 imports it with the first error, when no file may be opened any more)
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MAX_MEMORY_BYTES = 1 << 30
_MAX_FILES = 16
_MAX_TEXT_CHARS = 1 << 18
_MAX_ALL_CHARS = 1 << 25


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks answers for training, is its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's type)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message)[:500])


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _strftime_now(form: object) -> str:
    """A mark, where transformers puts the date: whoever asked puts it in when a request comes."""
    return f"\ue000{form}\ue001"


def render_all(
    template: str, conversations: list[dict[str, Any]], tokens: dict[str, str], now: str = ""
) -> list[dict[str, str]]:
    """{"text": …} or {"error": …} for each conversation. `now` (ISO 8601) is the time that the template is told; without it a
    mark stands in the place of each date. Raises TemplateError for a template that is none."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    strftime_now = datetime.fromisoformat(now).strftime if now else _strftime_now
    environment.globals.update(raise_exception=_raise_exception, strftime_now=strftime_now)
    compiled = environment.from_string(template)
    answers = []
    num_chars = 0
    for conversation in conversations:
        try:
            text = compiled.render(**tokens, **conversation, add_generation_prompt=True, tools=None, documents=None)
            num_chars += len(text)
            is_short = len(text) <= _MAX_TEXT_CHARS and num_chars <= _MAX_ALL_CHARS
            answers.append({"text": text} if is_short else {"error": "its text is too long"})
        except Exception as error:  # whatever a template raises: it is its answer to this conversation
            answers.append({"error": f"{type(error).__name__}: {error}"[:300]})
    return answers


def main() -> None:
    """See above."""
    request = json.load(sys.stdin)
    max_cpu_s = request.pop("max_cpu_s")
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (max_cpu_s, max_cpu_s))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MAX_FILES, _MAX_FILES))
    try:
        answer: dict[str, Any] = {"answers": render_all(**request)}
    except Exception as error:  # a template that cannot be compiled
        answer = {"error": f"{type(error).__name__}: {error}"[:300]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
