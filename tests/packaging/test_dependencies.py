"""The declared dependencies against the imports in the sources, and the pins against the declarations."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGES = ("bench", "cluster", "model_parallel", "protos", "serving")
# Of bench, load testing alone is part of a running system; the rest measures beside development tools.
RUNNING = ("bench/loadtest", "cluster", "model_parallel", "protos", "serving")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = [Requirement(line) for line in PROJECT["dependencies"]]
DEV = [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"]]
# Packages that belong to several distributions at once.
SHARED = {
    "google.protobuf": "protobuf",
    "google.rpc": "googleapis-common-protos",
    "opentelemetry.exporter": "opentelemetry-exporter-otlp-proto-grpc",
    "opentelemetry.sdk": "opentelemetry-sdk",
    "opentelemetry.trace": "opentelemetry-api",
}
# CUDA builds of torch bring theirs, and others have no use for one.
WITH_TORCH = {"triton"}
# Generates the stubs; not part of a running system.
DEV_FILE = ROOT / "protos" / "generate.py"

_DISTRIBUTIONS = packages_distributions()  # reads what every installed package says: once
UNPICKLING_MODULES = {"_pickle", "cloudpickle", "dill", "marshal", "pickle", "shelve"}
UNPICKLING_COLLECTIVES = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "scatter_object_list",
}


def canonical(name: str) -> str:
    """As PEP 503 has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def sources() -> list[Path]:
    return sorted(path for package in RUNNING for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports, at any depth of it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} imports relatively"
            # `from google import protobuf` names a module in its second half.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def distribution(module: str) -> str | None:
    """The distribution that `module` comes from; None for the standard library and our own packages."""
    top, *rest = module.split(".")
    if top in sys.stdlib_module_names or top in (*PACKAGES, "bench"):
        return None
    if top in ("google", "opentelemetry"):
        return SHARED[f"{top}.{rest[0]}"]
    (name,) = set(_DISTRIBUTIONS[top])
    return canonical(name)


def imported(paths: list[Path]) -> set[str]:
    modules = {module for path in paths for module in imports(path)}
    return {name for module in modules if (name := distribution(module))}


def test_imports_and_declared_dependencies_are_the_same() -> None:
    modules = imported([path for path in sources() if path != DEV_FILE])
    assert modules - WITH_TORCH == {canonical(r.name) for r in RUNTIME}


def test_stub_generation_needs_only_dev_dependencies() -> None:
    assert imported([DEV_FILE]) <= {canonical(r.name) for r in RUNTIME + DEV}


@pytest.mark.parametrize("requirement", RUNTIME + DEV, ids=lambda requirement: requirement.name)
def test_constraints_pin_within_the_declared_range(requirement: Requirement) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    version = {canonical(name): version for name, version in pins.items()}[canonical(requirement.name)]
    assert requirement.specifier.contains(version)


def violations(path: Path) -> Iterator[str]:
    """What in a file could unpickle."""
    for module in imports(path):
        if module.split(".")[0] in UNPICKLING_MODULES or module == "torch.load":
            yield f"imports {module}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in UNPICKLING_COLLECTIVES:
            yield f"line {node.lineno} uses {node.attr}"
        if isinstance(node, ast.Call):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if ast.unparse(node.func) == "torch.load" and options.get("weights_only") != "True":
                yield f"line {node.lineno} calls torch.load without weights_only=True"
            if options.get("allow_pickle", "False") != "False":
                yield f"line {node.lineno} allows pickle"


def test_nothing_unpickles() -> None:
    found = {str(path.relative_to(ROOT)): list(violations(path)) for path in sources()}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "dist.all_gather_object(out, x)",
    ],
)
def test_the_search_for_pickle_finds(source: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert list(violations(path))
