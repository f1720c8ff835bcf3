"""Rows of the command line's lists, as a table, CSV or JSON."""

import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from rich.table import Table
from rich.text import Text

from serving.cli.terminal import standard_output
from serving.tenants.records import iso_time

Row = Mapping[str, Any]


class Format(StrEnum):
    """How rows are printed."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


def print_rows(rows: Iterable[Row], columns: Sequence[str], form: Format) -> None:
    """Print the named columns. CSV and JSON are written as rows come, however many there are."""
    picked = ([row[name] for name in columns] for row in rows)
    match form:
        case Format.TABLE:
            _print_table(list(picked), columns)
        case Format.CSV:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([" ".join(value) if isinstance(value, list) else value for value in row] for row in picked)
        case Format.JSON:
            separator = "["
            for row in picked:
                sys.stdout.write(f"{separator}\n  {json.dumps(dict(zip(columns, row, strict=True)))}")
                separator = ","
            sys.stdout.write("[]\n" if separator == "[" else "\n]\n")


def _print_table(rows: list[list[Any]], columns: Sequence[str]) -> None:
    """Columns in which no row has anything are left out, since terminals are narrow."""
    kept = [index for index in range(len(columns)) if not rows or any(row[index] not in (None, "") for row in rows)]
    table = Table()
    for index in kept:
        table.add_column(columns[index], overflow="fold")
    for row in rows:
        table.add_row(*(Text(_shown(columns[index], row[index])) for index in kept))  # Text: names are not markup
    standard_output().print(table)


def _shown(column: str, value: Any) -> str:
    match value:
        case None | "":
            return "-"
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(value) or "none"
        case float() if column.endswith("_unix_s"):
            return iso_time(value)
        case float():
            return f"{value:g}"
        case _:
            return str(value)
