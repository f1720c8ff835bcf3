"""What imports pull in, seen from a fresh interpreter: import-linter sees only our own files, not what they load."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import importlib, pkgutil, sys
name, *banned = sys.argv[1:]
package = importlib.import_module(name)
for module in pkgutil.walk_packages(getattr(package, "__path__", ()), name + "."):
    importlib.import_module(module.name)
print(*(module for module in banned if module in sys.modules))
"""


@pytest.mark.parametrize(
    ("name", "banned"),
    [
        ("model_parallel", ["ray", "grpc", "google.protobuf"]),
        ("model_parallel.engine", ["ray", "torch"]),
        ("cluster.placement", ["ray", "torch"]),
        ("serving.contracts", ["ray", "torch", "cluster", "sqlalchemy", "opentelemetry"]),
        ("serving.gateway.core", ["ray", "torch", "cluster", "sqlalchemy"]),
        ("serving.gateway.server", ["ray", "torch", "cluster", "sqlalchemy"]),
        ("serving.tenants.client.accounts", ["ray", "torch", "cluster", "sqlalchemy"]),
        ("serving.observability", ["ray", "torch", "cluster", "sqlalchemy", "opentelemetry.sdk"]),
        ("serving.cli.main", ["ray", "torch", "sqlalchemy"]),
    ],
)
def test_import_is_light(name: str, banned: list[str]) -> None:
    """`name` is imported with everything below it."""
    command = [sys.executable, "-c", SCRIPT, name, *banned]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
