"""What imports pull in, seen from a fresh interpreter: import-linter sees only our own files, not what they load."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]
SCRIPT = """
import importlib, json, pkgutil, sys
for name, banned in json.loads(sys.argv[1]):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(getattr(package, "__path__", ()), name + "."):
        importlib.import_module(module.name)
    if found := [module for module in banned if module in sys.modules]:
        sys.exit(f"{name} imports {', '.join(found)}")
"""
SERVER = ["ray", "torch", "cluster", "sqlalchemy"]


@pytest.mark.parametrize(
    "imports",
    [
        # One after the other in one interpreter: what may load least comes first. A CPU needs no Triton.
        [
            ("model_parallel.runtime.rank_process", ["triton"]),
            ("model_parallel.runtime.rank", ["triton"]),
            ("model_parallel", ["ray", "grpc", "google.protobuf"]),
        ],
        [("serving.cli.main", ["ray", "torch", "sqlalchemy", "numpy"])],
        [
            ("serving.contracts", [*SERVER, "opentelemetry"]),
            ("serving.tenants.client.accounts", SERVER),
            ("serving.observability", [*SERVER, "opentelemetry.sdk"]),
            ("serving.gateway.core", SERVER),
            ("serving.gateway.server", SERVER),
            ("model_parallel.engine", ["ray", "torch"]),
            ("cluster.placement", ["ray", "torch"]),
            ("serving.driver.app", ["torch", "sqlalchemy", "alembic"]),
        ],
    ],
    ids=["ranks", "commands", "others"],
)
def test_imports_are_light(imports: list[tuple[str, list[str]]]) -> None:
    """Each is imported with everything below it."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(imports)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
