"""Shared memory alone: what tests/unit/collectives/test_collectives.py does not ask of every kind."""

import gc
import hashlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.collectives.shared_memory.segment import SharedMemoryCollectives
from model_parallel.directories import cache_directory
from model_parallel.errors import GroupFailedError
from model_parallel.native import SHARED_MEMORY
from model_parallel.runtime.leader import store_file
from tests.support.effort import by_day
from tests.support.waiting import PATIENCE_S

SLOT_FLOATS = (256 << 10) // 4
"""Of collectives.cpp: a larger tensor goes in several turns."""
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
STRESS = Path(__file__).parents[2] / "support" / "shared_memory_stress.cpp"


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(5) as executor:
        yield executor


def make_group(size: int, timeout_s: float = PATIENCE_S) -> list[SharedMemoryCollectives]:
    with store_file() as path:
        return [SharedMemoryCollectives(path, rank, size, timeout_s=timeout_s) for rank in range(size)]


def on_all(
    pool: ThreadPoolExecutor,
    group: list[SharedMemoryCollectives],
    call: Callable[[SharedMemoryCollectives], torch.Tensor],
) -> list[torch.Tensor]:
    return list(pool.map(call, group))


@given(
    size=st.integers(2, 5),
    counts=st.lists(st.one_of(st.integers(0, 2000), st.integers(SLOT_FLOATS - 2, 3 * SLOT_FLOATS)), max_size=6),
    seed=st.integers(0, 1 << 30),
)
def test_sums_are_numpys_in_rank_order(pool: ThreadPoolExecutor, size: int, counts: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    group = make_group(size)
    for count in counts:
        scales = 10.0 ** random.integers(-8, 8, size=(size, 1))
        parts = (random.standard_normal((size, count)) * scales).astype(np.float32)
        expected = parts[0].copy()
        for part in parts[1:]:
            expected += part
        for result in on_all(pool, group, lambda c, p=parts: c.all_reduce(torch.from_numpy(p[c.rank].copy()))):
            assert result.numpy().tobytes() == expected.tobytes()


def test_special_values_pass_through(pool: ThreadPoolExecutor) -> None:
    parts = torch.tensor([[float("inf"), float("nan"), -0.0, 1e38], [float("-inf"), 1.0, -0.0, 3e38]])
    group = make_group(2)
    for result in on_all(pool, group, lambda c: c.all_reduce(parts[c.rank].clone())):
        torch.testing.assert_close(result, parts[0] + parts[1], rtol=0, atol=0, equal_nan=True)
        assert torch.signbit(result[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_large_gather_in_several_turns(pool: ThreadPoolExecutor, dtype: torch.dtype) -> None:
    parts = (torch.arange(3 * 200_003).reshape(3, 200_003) % 1009).to(dtype)
    for result in on_all(pool, make_group(3), lambda c: c.all_gather(parts[c.rank])):
        assert torch.equal(result, parts)


def test_strided_input_is_left_alone_and_contiguous_input_holds_the_sum(pool: ThreadPoolExecutor) -> None:
    group = make_group(2)
    strided, plain = torch.ones(2, 8, 4).transpose(1, 2), torch.ones(2, 4)
    for result in on_all(pool, group, lambda c: c.all_reduce(strided[c.rank])):
        assert torch.equal(result, torch.full((4, 8), 2.0))
    assert strided.sum() == 64
    on_all(pool, group, lambda c: c.all_reduce(plain[c.rank]))
    assert torch.equal(plain, torch.full((2, 4), 2.0))


def test_late_peer_is_named(pool: ThreadPoolExecutor) -> None:
    group = make_group(3, timeout_s=0.2)  # must expire
    waiting = [pool.submit(group[rank].all_reduce, torch.ones(4)) for rank in (0, 2)]
    for call, rank in zip(waiting, (0, 2), strict=True):
        with pytest.raises(GroupFailedError, match=rf"^rank {rank}: rank 1 did not come within 0\.2 s$"):
            call.result(PATIENCE_S)


def test_peer_that_sleeps_long_is_waited_for(pool: ThreadPoolExecutor) -> None:
    """Past the spinning and yielding, into the sleep."""
    group = make_group(2)
    for _ in range(5):
        waiting = pool.submit(group[0].all_reduce, torch.ones(4))
        time.sleep(0.03)
        group[1].all_reduce(torch.ones(4))
        assert torch.equal(waiting.result(PATIENCE_S), torch.full((4,), 2.0))


def test_other_threads_run_while_a_rank_waits(pool: ThreadPoolExecutor) -> None:
    """The rank's watch on its leader must not depend on its peers."""
    group = make_group(2)
    ticks = threading.Event()
    waiting = pool.submit(group[0].barrier)
    threading.Thread(target=ticks.set).start()
    assert ticks.wait(PATIENCE_S)
    group[1].barrier()
    waiting.result(PATIENCE_S)


def test_ranks_that_disagree_on_the_size_fail(pool: ThreadPoolExecutor) -> None:
    group = make_group(2)
    calls = [pool.submit(c.all_reduce, torch.ones(4 + c.rank)) for c in group]
    for call, rank in zip(calls, (0, 1), strict=True):
        with pytest.raises(GroupFailedError, match=f"rank {rank}: rank {1 - rank} brought another size"):
            call.result(PATIENCE_S)


def test_complete_turn_counts_although_a_peer_has_left_since(pool: ThreadPoolExecutor) -> None:
    for _ in range(50):
        group = make_group(2)
        waiting = pool.submit(group[0].all_reduce, torch.ones(4))
        group[1].all_reduce(torch.ones(4))
        group[1].close()
        assert torch.equal(waiting.result(PATIENCE_S), torch.full((4,), 2.0))
        with pytest.raises(GroupFailedError, match="rank 0: rank 1 did not come, and a rank has left"):
            group[0].barrier()


def test_groups_that_come_and_go_leave_nothing(pool: ThreadPoolExecutor) -> None:
    def num_mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:packtrain-store")

    gc.collect()  # or what earlier tests left to it would be given back in between
    files, mapped = len(os.listdir("/proc/self/fd")), num_mapped()
    for _ in range(20):
        group = make_group(2)
        on_all(pool, group, lambda c: c.all_reduce(torch.ones(3)))
        for collectives in group:
            collectives.close()
            collectives.close()
        del group, collectives
    assert (len(os.listdir("/proc/self/fd")), num_mapped()) == (files, mapped)
    assert not list(Path("/dev/shm").glob("*packtrain-store*")), "it never has a name"


def test_memory_that_cannot_be_had_fails_the_start(tmp_path: Path) -> None:
    with pytest.raises(GroupFailedError, match=r"rank 1 cannot map \d+ bytes of shared memory: .*No such file"):
        SharedMemoryCollectives(str(tmp_path / "absent"), 1, 2, timeout_s=1)  # must expire
    with pytest.raises(GroupFailedError, match="rank 0 cannot map"):
        SharedMemoryCollectives("/dev/full", 0, 2, timeout_s=1)  # must expire


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_stress_is_clean_under_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    flags = ["g++", "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    trivial = tmp_path / "trivial.cpp"
    trivial.write_text("int main() { return 0; }\n")
    built = subprocess.run([*flags, trivial, "-o", tmp_path / "trivial"], check=False, timeout=100)
    if built.returncode or subprocess.run([tmp_path / "trivial"], check=False, timeout=100).returncode:
        pytest.skip(f"-fsanitize={sanitizer} does not work here")
    sources = b"".join(path.read_bytes() for path in (STRESS, *SHARED_MEMORY.sources))
    program = cache_directory() / "stress" / hashlib.sha256(" ".join(flags).encode() + sources).hexdigest()[:24]
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*flags, STRESS, "-o", tmp_path / "stress"], check=True, timeout=100)
        unfinished = program.with_suffix(f".{os.getpid()}")
        shutil.copy(tmp_path / "stress", unfinished)
        unfinished.replace(program)
    # The turn counter wraps after 40.
    subprocess.run([program, str(by_day(50, by_night=300))], check=True, timeout=100)
