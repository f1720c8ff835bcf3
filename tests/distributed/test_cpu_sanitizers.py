"""The C++ kernels' own tests again, compiled with AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = [f"tests/unit/kernels/{name}.py" for name in ("test_cpu_products", "test_cpu_attention", "test_cpu_recording")]
DRIVER = f"""
import sys
import pytest
from dataclasses import replace
from model_parallel.kernels.cpu import backend
sanitize = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
backend.CPU_KERNELS = replace(backend.CPU_KERNELS, flags=(*backend.CPU_KERNELS.flags, *sanitize))
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--timeout=1500", *{TESTS!r}]))
"""


def _runtime(name: str) -> str | None:
    """Path of a sanitizer's runtime library as the compiler knows it."""
    if shutil.which("g++") is None:
        return None
    command = ["g++", f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.mark.timeout(1800)
def test_kernels_run_clean_under_sanitizers() -> None:
    runtimes = [_runtime("libasan.so"), _runtime("libubsan.so")]
    if None in runtimes:
        pytest.skip("g++ has no sanitizer runtime here")
    result = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=ROOT,
        env={
            **os.environ,
            "LD_PRELOAD": ":".join(path for path in runtimes if path),
            # Python itself leaks by design; what the interpreter's modules do is not looked at.
            "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        },
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
