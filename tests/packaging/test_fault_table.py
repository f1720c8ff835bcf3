"""docs/faults.md names tests; they exist, and the marked ones are nightly."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
DOCUMENT = TESTS.parent / "docs" / "faults.md"
REFERENCE = re.compile(r"`((?:[\w/]+\.py)?)::(\w+)`( †)?")


def references(row: str) -> Iterator[tuple[str, str, bool]]:
    """File, function and whether it is marked; `::name` is in the file named last."""
    file = ""
    for named, function, mark in REFERENCE.findall(row):
        file = named or file
        yield file, function, bool(mark)


def rows() -> dict[str, str]:
    """By the number, or numbers, of the case."""
    found = re.finditer(r"^\| (\d[\d, ]*) .*$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    return {row[1]: row[0] for row in found}


def is_nightly(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator) == "pytest.mark.nightly" for decorator in function.decorator_list)


def test_every_case_has_its_row() -> None:
    numbers = [int(number) for names in rows() for number in names.split(",")]
    assert sorted(numbers) == [1, 2, 3, 4, 7, 9, 18, 23, *range(31, 64)]


@pytest.mark.parametrize("case", rows())
def test_every_test_that_is_named_exists(case: str) -> None:
    named = list(references(rows()[case]))
    assert named or case == "54"
    for file, function, is_marked in named:
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        found = [node for node in tree.body if getattr(node, "name", "") == function]
        assert len(found) == 1, f"{file} has {len(found)} of {function}"
        test = found[0]
        assert isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef)
        assert is_nightly(test) == is_marked, f"{file}::{function}"
