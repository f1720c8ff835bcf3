"""The `packtrain` command, which is also `python -m serving.cli`. Ctrl-C ends it as later while it still imports."""

import os
import signal
import sys
from io import TextIOWrapper
from types import FrameType

_EXIT_CONFIG = 78


def main() -> None:
    """Entry point."""
    _leave_on_signals()
    _open_closed_streams()
    _escape_what_has_no_character()
    try:
        os.getcwd()
    except OSError as error:
        sys.stderr.write(
            f"error: the current directory is gone ({error.strerror}); change to another, as with `cd ~`\n"
        )
        sys.exit(_EXIT_CONFIG)
    try:
        from serving.cli.main import main as command

        command()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        _leave_what_nobody_reads()


def _leave_what_nobody_reads() -> None:
    """What standard error does not take, Python would try to write once more at the end, and change the exit status."""
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _leave_on_signals() -> None:
    """What would end the process at once leaves through its exits: a download or a compiler that it has started ends too, what it
    has stopped goes on, and no unfinished file stays. After nohup, SIGHUP stays ignored."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, leave)


def _open_closed_streams() -> None:
    """A standard stream that who started us has closed leads nowhere. Its number would be the next socket's otherwise, into
    which a library or a child then prints."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


def _escape_what_has_no_character() -> None:
    """Characters that the terminal's encoding lacks are written as "\\u20ac", instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, TextIOWrapper):
            continue
        keeps_bytes = stream.errors == "surrogateescape" and stream.encoding.lower() == "utf-8"
        if stream.errors in ("strict", "surrogateescape") and not keeps_bytes:
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
