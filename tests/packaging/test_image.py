"""The container image: what its file says, and, by night, what the build script makes in an empty directory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SCRIPT = (ROOT / "image" / "build.sh").read_text()


def stages() -> dict[str, str]:
    """Base by stage, in order."""
    return {name: base for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)}


def test_the_image_has_a_stage_for_cpus_and_one_for_gpus() -> None:
    assert stages() == {"build": "${BASE}", "base": "${BASE}", "cpu": "base", "cuda": "base"}
    assert re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE) == ["${TARGET}"]


def test_it_does_not_run_as_root_and_has_no_compiler_on_cpus() -> None:
    final = DOCKERFILE.partition("FROM ${BASE} AS base")[2]
    assert re.findall(r"^USER (\S+)$", final, re.MULTILINE)[0] == "10001:10001"
    assert re.findall(r"^USER (\S+)$", final, re.MULTILINE)[-1] == "10001:10001"
    assert "g++" not in final
    assert "gcc" not in final.partition("AS cpu")[0]


def test_what_is_built_from_reaches_the_build() -> None:
    """.dockerignore leaves everything out but what is named."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    kept = {line[1:].rstrip("/") for line in lines if line.startswith("!")}
    assert lines[0] == "*"
    packages = {"bench", "cluster", "model_parallel", "protos", "serving"}
    assert packages | {"constraints.txt", "image", "pyproject.toml", "README.md", "LICENSE", "NOTICE"} <= kept
    assert not kept & {".git", "tests", "compose", "helm"}


def test_the_script_parses_and_refuses_another_target() -> None:
    subprocess.run(["bash", "-n", "image/build.sh"], cwd=ROOT, timeout=30, check=True)
    done = subprocess.run(
        ["bash", "image/build.sh"],
        cwd=ROOT,
        env=os.environ | {"TARGET": "tpu"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 64
    assert "must be cpu or cuda" in done.stderr


def test_compose_keeps_ports_on_loopback_and_passwords_in_files() -> None:
    compose = yaml.safe_load((ROOT / "compose" / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert not re.search(r":latest$", service["image"]), name
        for variable, value in service.get("environment", {}).items():
            assert "PASSWORD" not in variable or value.startswith("/run/secrets/"), name
    assert {"packtrain", "postgres", "prometheus", "grafana"} == set(compose["services"])
    assert compose["services"]["packtrain"]["read_only"] is True
    assert compose["networks"]["private"] == {"internal": True}


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_the_script_makes_an_environment_that_needs_no_compiler(tmp_path: Path) -> None:
    prefix = tmp_path / "packtrain"
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PREFIX": str(prefix),
        "TORCH": "torch",
        "HOME": str(tmp_path),
        **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
    }
    done = subprocess.run(
        ["bash", "image/build.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1700, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    bill = json.loads((prefix / "sbom.cdx.json").read_text())
    names = {component["name"] for component in bill["components"]}
    assert {"packtrain", "ray", "torch", "grpcio", "psycopg"} <= names
    assert "cyclonedx-bom" not in names
    assert (prefix / "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf").is_file()
    # With nothing but the environment itself on the path: there is no compiler.
    code = "from model_parallel.native import LIBRARIES, load_library; [load_library(x) for x in LIBRARIES]"
    bare = {"PATH": str(prefix / "bin"), "PACKTRAIN_CACHE": str(prefix / "cache"), "HOME": "/nonexistent"}
    subprocess.run([prefix / "bin/python", "-c", code], cwd="/", env=bare, timeout=300, check=True)
    subprocess.run(
        [prefix / "bin/packtrain", "--help"], cwd="/", env=bare, capture_output=True, timeout=300, check=True
    )
