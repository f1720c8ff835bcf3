"""Clients of other makers, unmodified, against a gateway over loopback: each a script in `other_clients/`.

Most need an environment of their own, since they pin what the project does not: PACKTRAIN_CLIENTS names its Python. To make it:

    python -m venv /tmp/clients && /tmp/clients/bin/pip install -r tests/nightly/other_clients/requirements.txt
    PACKTRAIN_CLIENTS=/tmp/clients/bin/python pytest -m nightly tests/nightly/test_other_clients.py
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "other_clients"
ROOT = Path(__file__).parents[2]
OTHERS = os.environ.get("PACKTRAIN_CLIENTS", "")
OWN = ("openai_sdk", "lm_eval_remote")
FOREIGN = (
    "openai_sdk", "langchain_chat", "langchain_structured", "llama_index_chat", "litellm_client", "instructor_models",
    "outlines_openai", "pydantic_ai_agent", "llm_cli",
)  # fmt: skip

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    command = [sys.executable, str(SCRIPTS / "serve_fake.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            _, port = process.stdout.readline().split()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.stdin.close()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def run(python: str, script: str, url: str) -> None:
    command = [python, str(SCRIPTS / f"{script}.py"), url]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]


@pytest.mark.parametrize("script", OWN)
def test_clients_of_our_own_environment(url: str, script: str) -> None:
    run(sys.executable, script, url)


@pytest.mark.skipif(not OTHERS, reason="PACKTRAIN_CLIENTS does not name a Python with the clients of requirements.txt")
@pytest.mark.parametrize("script", FOREIGN)
def test_clients_of_another_environment(url: str, script: str) -> None:
    run(OTHERS, script, url)
