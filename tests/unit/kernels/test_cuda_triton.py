"""The CUDA backend without a GPU: its Triton kernels in Triton's interpreter, and compiled.

Which of the two Triton does is settled when it is imported, so each has a process of its own. They run the tests of
interpreted_cuda.py and compiled_cuda.py.
"""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no build for this machine"
)


@needs_triton
@pytest.mark.parametrize(("tests", "interpret"), [("interpreted_cuda.py", "1"), ("compiled_cuda.py", "0")])
def test_the_triton_kernels(tests: str, interpret: str) -> None:
    if interpret == "1" and version("triton").startswith("3.6."):
        pytest.skip("the interpreter of Triton 3.6, which torch 2.11 brings, does not work with numpy 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(tests))]
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_cpu_does_without_triton() -> None:
    code = "import sys, model_parallel.runtime.rank_process, model_parallel.runtime.rank; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
