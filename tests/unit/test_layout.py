"""The path of a module shows which process runs it, so no module lies loose where the rooms are."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("bench", "cluster", "model_parallel", "serving")


@pytest.mark.parametrize(
    ("package", "loose"),
    [("serving", {"__init__", "config"}), ("serving/gateway", {"__init__", "deployment", "server", "tls"})],
)
def test_no_module_lies_loose(package: str, loose: set[str]) -> None:
    assert {path.stem for path in (ROOT / package).glob("*.py")} == loose, "put it into the room of its process"


def test_every_package_says_what_it_is() -> None:
    packages = [path for top in PACKAGES for path in (ROOT / top).rglob("__init__.py")]
    silent = [path for path in packages if path.parent.name != "versions" and not path.read_text().startswith('"""')]
    assert silent == []


@pytest.mark.parametrize(
    "room",
    [
        "cluster",
        "model_parallel/collectives",
        "model_parallel/engine",
        "model_parallel/runtime",
        "serving/cli",
        "serving/gateway/core",
        "serving/tenants",
    ],
)
def test_no_two_modules_of_a_room_have_one_name(room: str) -> None:
    names = [path.stem for path in (ROOT / room).rglob("*.py") if not path.stem.startswith("__")]
    assert sorted(names) == sorted(set(names))
