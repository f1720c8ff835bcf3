"""The heap that steps of a CPU rank work in. In processes of their own, because settings of the C library are for all."""

import subprocess
import sys

import pytest

RESERVED_BYTES = 24_000_000
PROGRAM = """
import os, sys
import torch
from model_parallel.host_memory import reserve_heap

def held_bytes():
    with open("/proc/self/smaps_rollup") as rollup:
        return next(1024 * int(line.split()[1]) for line in rollup if line.startswith("Anonymous:"))

for num_bytes in map(int, sys.argv[1:-1]):
    if not os.fork():
        break  # each but the last in a child, which spares its importing torch
    os.wait()
else:
    num_bytes = int(sys.argv[-1])
torch.ones(7_000_000)  # once such a block is freed, glibc takes smaller ones from the heap
loaded, kept = [], []
for _ in range(100):  # loading leaves holes of 400 kB
    loaded.append(torch.ones(100_000))
    kept.append(torch.ones(50))
del loaded
reserve_heap(num_bytes)
growths = []
for num_rows in (1, 2, 4, 8):
    before = held_bytes()
    for _ in range(2):
        results = [torch.ones(num_rows, 100_000) for _ in range(6)]
        del results
    growths.append(held_bytes() - before)
print(*growths)
"""


def growths(*reserved_bytes: int) -> list[list[int]]:
    """For each: bytes by which the heap grew with each larger step."""
    run = [sys.executable, "-c", PROGRAM, *map(str, reserved_bytes)]
    done = subprocess.run(run, capture_output=True, check=True, text=True, timeout=120)
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


def test_steps_of_any_size_work_in_what_is_reserved() -> None:
    """Where nothing is reserved, the heap grows with the largest step, by megabytes; else by pages for Python's own objects."""
    unreserved, reserved = map(max, growths(0, RESERVED_BYTES))
    if unreserved == 0:
        pytest.skip(
            "the heap of this machine's C library does not grow with the largest step, so nothing need be reserved"
        )
    assert unreserved > 1_000_000
    assert reserved < unreserved / 5
