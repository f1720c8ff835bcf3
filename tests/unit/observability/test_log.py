"""Records are one line, say whose they are, and cannot be forged from within."""

import json
import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.errors import ConfigError
from serving.config import log_format, log_level, tracing_is_on
from serving.observability.log import JsonFormatter, TextFormatter, Trouble, request_id

HOSTILE = "evil\r\n2026 INFO forged\x1b[2J\x9b31m\u2028\x7f\x00"


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("serving.x", logging.INFO, __file__, 1, "%s", (message,), None)
    made.fields = fields
    return made


def raised(error: BaseException) -> logging.LogRecord:
    try:
        raise error
    except BaseException as caught:
        return logging.LogRecord(
            "serving.x", logging.ERROR, __file__, 1, "failed", (), (type(caught), caught, caught.__traceback__)
        )


def test_json_has_the_fields_that_logs_are_searched_by() -> None:
    token = request_id.set("abc")
    try:
        item = json.loads(JsonFormatter("rank 3").format(record("loaded", num_bytes=7)))
    finally:
        request_id.reset(token)
    expected = {"level": "INFO", "process": "rank 3", "logger": "serving.x", "event": "loaded", "num_bytes": 7}
    assert {name: item[name] for name in expected} == expected
    assert (item["request_id"], item["time"][-1]) == ("abc", "Z")


@given(st.text())
def test_any_text_stays_in_its_json_string(text: str) -> None:
    line = JsonFormatter("gateway").format(record(text, label=text))
    assert all(" " <= character <= "~" for character in line)
    assert json.loads(line)["event"] == json.loads(line)["label"] == text


@given(st.text())
def test_any_text_stays_on_its_line(text: str) -> None:
    line = TextFormatter("gateway").format(record(text, label=text))
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line


def test_the_lines_of_an_exception_cannot_be_taken_for_records() -> None:
    lines = TextFormatter("gateway").format(raised(ValueError(HOSTILE))).splitlines()
    assert len(lines) > 3
    assert all(line.startswith("  | ") for line in lines[1:])
    assert not any(character in "\r\x1b\x9b\x7f\x00" for line in lines for character in line)


@pytest.mark.parametrize("kind", [JsonFormatter, TextFormatter])
def test_a_gateway_logs_places_and_types_but_no_messages(kind: type[JsonFormatter]) -> None:
    prompt = "secret".upper()  # not a literal, because a place is shown with its line of code
    try:
        try:
            raise KeyError(prompt)
        except KeyError as cause:
            raise RuntimeError(f"cannot do {prompt}") from cause
    except RuntimeError as error:
        failed = raised(error)
    quiet, loud = kind("gateway", error_messages=False).format(failed), kind("group").format(failed)
    assert "SECRET" in loud and "SECRET" not in quiet
    assert "builtins.RuntimeError" in quiet and "builtins.KeyError" in quiet and "test_log.py" in quiet


def test_the_environment_chooses_level_and_format(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value, read, word in [
        ("PACKTRAIN_LOG_LEVEL", "LOUD", log_level, "DEBUG"),
        ("PACKTRAIN_LOG_FORMAT", "xml", log_format, "json"),
    ]:
        monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=f"{name}.*{word}"):
            read()
        monkeypatch.setenv(name, "")
    assert (log_level(), log_format(), tracing_is_on()) == ("INFO", "text", False)


def test_traces_over_another_protocol_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    assert not tracing_is_on()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    with pytest.raises(ConfigError, match=r"OTEL_EXPORTER_OTLP_PROTOCOL.*grpc"):
        tracing_is_on()


def test_a_process_logs_json_when_told_to() -> None:
    code = (
        "import logging; from serving.observability.log import configure_logging, log_event; configure_logging('gateway');"
        "log_event(logging.getLogger('x'), logging.INFO, 'hello', num=1)"
    )
    environment = {"PACKTRAIN_LOG_FORMAT": "json", "PACKTRAIN_LOG_LEVEL": "debug"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stderr) | {"event": "hello", "num": 1} == json.loads(done.stderr)


def test_what_fails_again_and_again_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    trouble = Trouble(logging.getLogger("test"))
    trouble.over("all is well")
    for problem in ("locked", "locked", "gone", "gone"):
        trouble.met(problem)
    for _ in range(2):
        trouble.over("all is well")
    trouble.met("gone")
    assert caplog.messages == ["locked", "gone", "all is well", "gone"]
