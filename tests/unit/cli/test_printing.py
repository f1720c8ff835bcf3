"""Tables of the command line."""

import csv
import io

import pytest

from serving.cli.printing import Format, print_rows

ROWS = [{"name": "r0", "started_unix_s": 1795870000.25, "duration_s": 1.5}]


def test_a_moment_is_read_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(ROWS, ("started_unix_s", "duration_s"), Format.TABLE)
    shown = capsys.readouterr().out
    assert "2026-11-28T12:46:40+00:00" in shown and "1.5" in shown


def test_programs_get_the_number(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(ROWS, ("started_unix_s",), Format.CSV)
    assert next(csv.DictReader(io.StringIO(capsys.readouterr().out))) == {"started_unix_s": "1795870000.25"}
