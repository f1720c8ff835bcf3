"""An error of a constructor reaches the person at the terminal as its message alone."""

import traceback

import pytest

from model_parallel.errors import CheckpointError
from serving.contracts.start_failure import plain_reason, start_failures, telling_start_failures


def serve_status(error: Exception) -> str:
    """As Serve reports a constructor that raised: a traceback within a sentence."""
    try:
        with telling_start_failures():
            raise error
    except Exception as raised:
        trace = "".join(traceback.format_exception(raised))
        return f"The deployment failed to start 3 times in a row. See controller or replica logs for details. Error:\n{trace}"


def test_what_is_raised_on_purpose_is_found_in_a_traceback() -> None:
    message = 'a "quoted" path C:\\x\nand a second line'
    status = serve_status(CheckpointError(message))
    assert start_failures(status) == [message]
    assert plain_reason(status) == message


def test_what_the_system_refuses_is_found_too() -> None:
    assert plain_reason(serve_status(OSError(98, "Address already in use"))) == "[Errno 98] Address already in use"


def test_each_message_is_told_once() -> None:
    status = serve_status(CheckpointError("broken"))
    assert start_failures(status + status) == ["broken"]


def test_a_bug_is_told_by_its_last_line() -> None:
    assert plain_reason(serve_status(KeyError("x"))) == "KeyError: 'x'"


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "no reason was given"), ("one\ntwo", "one"), ("\n\n  spaced  \nmore", "spaced")],
)
def test_other_texts(text: str, reason: str) -> None:
    assert plain_reason(text) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "\x1b[36mray::ServeController.update()\x1b[39m (pid=1, ip=::1, repr=<ray.serve.Controller object at 0x7f3a>)\n"
            '  File "controller.py", line 3, in update\n    raise ValueError(1)\nValueError: no such deployment',
            "ValueError: no such deployment",
        ),
        ("\x1b[1;31mred\x1b[0m words", "red words"),
        ("<Group object at 0xDEADbeef> is gone", "<Group object> is gone"),
        ("look at 0 x", "look at 0 x"),
    ],
)
def test_what_is_for_terminals_and_debuggers_is_left_out(text: str, reason: str) -> None:
    assert plain_reason(text) == reason
