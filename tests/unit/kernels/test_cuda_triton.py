"""A CPU needs no Triton. What Triton's kernels compute is tested by interpreted_cuda.py and compiled_cuda.py (`make test`)."""

import subprocess
import sys

from tests.support.waiting import PATIENCE_S


def test_the_cpu_does_without_triton() -> None:
    code = "import sys, model_parallel.runtime.rank_process, model_parallel.runtime.rank; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=4 * PATIENCE_S)
