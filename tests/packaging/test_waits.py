"""In tests what must come is waited for generously, a profile says how much is tried, and Ray is started or joined by name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SHORTEST_S = 30
EXPIRES = "must expire"
"""In a comment of the line, where it is meant to run out."""
BY_NAME = {"timeout", "timeout_s"}
BY_PLACE = {"timeout": 0, "wait_for": 1, "join": 0, "result": 0, "settimeout": 0, "communicate": 1}
"""Functions that wait, and which of their arguments says how long."""


def waits(call: ast.Call) -> Iterator[float]:
    """The seconds that a call names as a number."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    arguments = [keyword.value for keyword in call.keywords if keyword.arg in BY_NAME]
    place = BY_PLACE.get(function)
    if place is not None and len(call.args) > place:
        arguments.append(call.args[place])
    for argument in arguments:
        if isinstance(argument, ast.Constant) and isinstance(argument.value, int | float):
            yield argument.value


def problems(text: str) -> list[str]:
    """What is wrong with a file of tests."""
    lines = text.splitlines()
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        line = f"line {node.lineno}: {lines[node.lineno - 1].strip()}"
        is_meant = any(EXPIRES in each for each in lines[node.lineno - 1 : node.end_lineno])
        if not is_meant and any(seconds < SHORTEST_S for seconds in waits(node)):
            found.append(f"{line} waits less than {SHORTEST_S} s")
        if any(keyword.arg == "max_examples" and isinstance(keyword.value, ast.Constant) for keyword in node.keywords):
            found.append(f"{line} has a number of examples of its own")
        if ast.unparse(node.func) == "ray.init" and not any(keyword.arg == "address" for keyword in node.keywords):
            found.append(f"{line} joins whatever cluster another test, or anybody, has started on this machine")
    return found


UNIT_TESTS_OF_RAY = TESTS / "unit" / "test_no_ray.py"
"""Its calls are refused before they reach Ray."""
FILES = sorted(
    path
    for path in TESTS.rglob("*.py")
    if path != UNIT_TESTS_OF_RAY and (path.name != "conftest.py" or path.parent != TESTS)
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_nothing_hangs_on_the_machine_and_what_else_runs_on_it(path: Path) -> None:
    assert problems(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("line", "num_problems"),
    [
        ("asyncio.timeout(5)", 1),
        ("asyncio.timeout(60)", 0),
        ("await asyncio.wait_for(event.wait(), 5)", 1),
        ("future.result(timeout=0.5)", 1),
        ("future.result(0.5)  # must expire", 0),
        ("stub.Generate(request, timeout=2)", 1),
        ("', '.join(words)", 0),
        ("settings(max_examples=300)", 1),
        ("settings(max_examples=3 * number)", 0),
        ("ray.init(num_cpus=2)", 1),
        ('ray.init(address="local", num_cpus=2)', 0),
    ],
)
def test_it_sees_what_it_looks_for(line: str, num_problems: int) -> None:
    assert len(problems(f"async def test():\n    {line}\n")) == num_problems
