"""The C++ kernels' own tests again, compiled with AddressSanitizer and UndefinedBehaviorSanitizer.

What is compiled is kept in the cache beside the kernels that serve, by the hash of its sources and flags.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from model_parallel.native import CPU_KERNELS, INSTRUCTION_SETS, load_library, machine_instruction_sets
from tests.support.effort import DAY, NIGHT, is_night

ROOT = Path(__file__).parents[2]
TESTS = [
    f"tests/unit/kernels/test_cpu_{name}.py"
    for name in ("products", "group_products", "adapters", "attention", "recording")
]
DRIVER = """
import os
import sys
import pytest
from dataclasses import replace
from model_parallel.kernels.cpu import backend
from model_parallel.native import ISA_VARIABLE

class OneInstructionSet:
    @pytest.hookimpl
    def pytest_collection_modifyitems(self, config, items):
        others = [item for item in items if self.of(item) not in (None, os.environ[ISA_VARIABLE])]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]

    def of(self, item):
        return item.callspec.params.get("kernels") if hasattr(item, "callspec") else None

def sanitized(library):
    # Checks in code that is inlined and unrolled as for speed take minutes to compile.
    sanitize = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    return replace(library, flags=(*library.flags, *sanitize))

backend.CPU_KERNELS = sanitized(backend.CPU_KERNELS)
backend.CPU_OPERATIONS = {isa: sanitized(library) for isa, library in backend.CPU_OPERATIONS.items()}
sys.exit(pytest.main(sys.argv[1:], plugins=[OneInstructionSet()]))
"""
# Without the unit tests' other fixtures, which load Ray.
OPTIONS = ("-q", "--noconftest", "-p", "tests.conftest", "-p", "tests.unit.kernels.conftest", "-p", "no:cacheprovider")


def _runtime(name: str) -> str | None:
    """Path of a sanitizer's runtime library as the compiler knows it."""
    if shutil.which("g++") is None:
        return None
    command = ["g++", f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    # Without vectors and without optimisation, each number that is multiplied is checked by itself: five minutes.
    "isa",
    [pytest.param(isa, marks=pytest.mark.nightly if isa == "scalar" else ()) for isa in INSTRUCTION_SETS],
)
def test_kernels_run_clean_under_sanitizers(isa: str) -> None:
    runtimes = [_runtime("libasan.so"), _runtime("libubsan.so")]
    if None in runtimes:
        pytest.skip("g++ has no sanitizer runtime here")
    if isa not in machine_instruction_sets(load_library(CPU_KERNELS)):
        pytest.skip(f"this machine does not have {isa}")
    profile = NIGHT if is_night() else DAY
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, *OPTIONS, f"--hypothesis-profile={profile}", "--timeout=1500", *TESTS],
        cwd=ROOT,
        env={
            **os.environ,
            "PACKTRAIN_CPU_ISA": isa,
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
