"""What the commands share at the terminal: the console, stages with a bar, errors that end in one line."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any, NoReturn, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

EXIT_CONFIG = 78
"""sysexits.h EX_CONFIG: starting again will not help."""
_WIDE = 4096
"""Of output that no terminal shows: nothing of it is wrapped or cut."""


_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class SafeConsole(Console):
    """Shows control characters as escapes: what is shown may come from a stranger's checkpoint, which must not speak to the
    terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Of each text that is printed, a table's too."""
        return super().render_str(text.translate(_ESCAPES), **options)


def width_of(is_terminal: bool) -> int | None:
    """None: as wide as the terminal is."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and not int(columns):  # Rich would print nothing
        return shutil.get_terminal_size().columns if is_terminal else _WIDE
    return None if is_terminal or columns else _WIDE


def standard_output() -> Console:
    """For what a command is asked for."""
    return SafeConsole(highlight=False, width=width_of(sys.stdout.isatty()), soft_wrap=not sys.stdout.isatty())


for _name in ("COLUMNS", "LINES"):
    if not (os.environ.get(_name) or "0").isdecimal():
        del os.environ[_name]  # Rich fails at "²", which it takes for a number


class _StandardError:
    """Standard error, for Rich. What nobody can be told, because the reader of a pipe has gone or a disk is full, is left out: a
    server drains and stops all the same. Rich would end the program."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream().flush()

    def isatty(self) -> bool:
        return self._stream().isatty()

    def fileno(self) -> int:
        return self._stream().fileno()

    @property
    def encoding(self) -> str:
        return self._stream().encoding

    @staticmethod
    def _stream() -> TextIO:
        """While a bar is shown, what others write to sys.stderr goes through Rich."""
        stream: TextIO = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
        return stream


console = SafeConsole(
    file=cast(IO[str], _StandardError()),
    highlight=False,
    width=width_of(sys.stderr.isatty()),
    soft_wrap=not sys.stderr.isatty(),
)
"""For everything else that a command has to say."""


def help_width() -> int:
    """Of help texts."""
    return min(120, shutil.get_terminal_size((100, 24)).columns)


def say(text: str) -> None:
    """One line, without markup: paths and names may hold brackets. Never cut."""
    console.print(text, markup=False, soft_wrap=True)


def fail(message: str, status: int) -> NoReturn:
    """Each line of the message is one error."""
    for line in message.splitlines() or [""]:
        console.print("[bold red]error:[/] ", end="")
        say(line)
    sys.exit(status)


def warn(message: str) -> None:
    """Something works less well than it could."""
    console.print("[yellow]warning:[/] ", end="")
    say(message)


@contextmanager
def leaving_on_signals() -> Iterator[None]:
    """The block is left in good order, and the program with status 0, on SIGTERM, and on SIGHUP, which comes when the terminal is
    closed, unless nohup has it ignored."""
    terminals = [descriptor for descriptor in range(3) if os.isatty(descriptor)]
    is_told = False

    def leave(signum: int, frame: FrameType | None) -> None:
        nonlocal is_told
        is_told = True
        signal.alarm(0)  # while Ray starts, a handler of its own may have come first, which aborts three seconds later
        if signum == signal.SIGHUP:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # both the shell and the system send one
            for descriptor in terminals:
                if not os.isatty(descriptor):  # it is gone: what we say while we stop would fail
                    os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, leave)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, leave)
    try:
        yield
    except SystemExit:
        if is_told:  # in a call of Ray's, which makes an exit with status 1 of it
            raise SystemExit(0) from None
        raise


@contextmanager
def leaving_at_once(clean_up: Callable[[], None]) -> Iterator[None]:
    """Within the block the signals that end this process call `clean_up` and end it there; a second one does not wait for it.
    For calls of libraries in which an exception that a signal raises may be lost, or in the middle of which Python cannot end."""
    is_told = False

    def leave(signum: int, frame: FrameType | None) -> None:
        nonlocal is_told
        status = 130 if signum == signal.SIGINT else 0
        if is_told:
            os._exit(status)
        is_told = True
        try:
            signal.alarm(0)
            clean_up()
            console.show_cursor()  # which a bar hides
        finally:
            os._exit(status)

    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in ending}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, leave)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True, slots=True)
class Stage:
    """A line that says what is going on, for how long and, where that is known, how far it is."""

    progress: Progress
    task: TaskID

    def report(self, stage: str) -> None:
        """A new stage begins; it is also printed where there is no terminal."""
        self.progress.update(self.task, description=stage, completed=0, total=None)
        if not console.is_terminal:
            say(stage)

    def on_load(self, done_bytes: int, total_bytes: int) -> None:
        self.progress.update(self.task, completed=done_bytes, total=total_bytes)


@contextmanager
def stage(first: str) -> Iterator[Stage]:
    """Begin with the stage `first`."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        shown = Stage(progress, progress.add_task(first, total=None))
        shown.report(first)
        yield shown


@contextmanager
def fetch_progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of downloaded bytes."""
    columns = (TextColumn("fetching {task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)
