"""Faults, each with what proves that it happened."""

import contextlib
import os
import random
import select
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil

from bench.chaos.processes import Group, is_gone, state_of, wait_until
from bench.chaos.proxy import Proxy

PROOF_TIMEOUT_S = 60.0
"""For a group to be gone; Serve takes 20 s to end a leader that is stopped."""
SLOW_S = 3.0
"""How long a process is slow."""
SLOW_SLICE_S = 0.02
"""It stands still for so long, and then runs for as long."""
SHORT_STOP_S = 0.5
"""A stop that a group must survive: half of the shortest silence after which it is given up."""
PARTITION_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was seen of a fault."""

    happened: bool
    detail: str
    loses_group: bool
    """The group had to be made anew."""


Fault = Callable[[Group, int, Proxy], Proof]
"""(group, one of its processes, the clients' proxy) → what was seen. Returns when the fault is over."""


def kill(group: Group, pid: int, proxy: Proxy) -> Proof:
    """SIGKILL. Its group must end as a whole."""
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        has_ended = bool(select.select([process], [], [], PROOF_TIMEOUT_S)[0])
    finally:
        os.close(process)
    return _lost(group, f"process {pid} was killed", happened=has_ended)


def stop(group: Group, pid: int, proxy: Proxy) -> Proof:
    """SIGSTOP until its group was given up and has ended as a whole, which it must."""
    with _standing_still(pid):
        return _lost(group, f"process {pid} was stopped", happened=_has_stopped(pid))


def short_stop(group: Group, pid: int, proxy: Proxy) -> Proof:
    """SIGSTOP, and SIGCONT before anybody gives the process up."""
    with _standing_still(pid):
        has_stopped = _has_stopped(pid)
        time.sleep(SHORT_STOP_S)
    return Proof(happened=has_stopped, detail=f"process {pid} stood still for {SHORT_STOP_S:g} s", loses_group=False)


def slow(group: Group, pid: int, proxy: Proxy) -> Proof:
    """The process runs half of the time, for some seconds."""
    num_seen, num_stops = 0, int(SLOW_S / (2 * SLOW_SLICE_S))
    for _ in range(num_stops):
        with _standing_still(pid):
            time.sleep(SLOW_SLICE_S)
            num_seen += state_of(pid) == psutil.STATUS_STOPPED
        time.sleep(SLOW_SLICE_S)
    detail = f"process {pid} was seen standing still {num_seen} of {num_stops} times"
    return Proof(happened=num_seen > num_stops / 2, detail=detail, loses_group=False)


def partition(group: Group, pid: int, proxy: Proxy) -> Proof:
    """Nothing passes between clients and gateway for a while, and then their connections are cut."""
    proxy.part()
    time.sleep(PARTITION_S)
    proxy.join()
    seen = proxy.observed
    detail = f"{seen.num_connections} connections were cut or refused, and {seen.num_bytes} bytes swallowed"
    return Proof(happened=seen.num_connections > 0, detail=detail, loses_group=False)


FAULTS: dict[str, Fault] = {
    "kill": kill, "stop": stop, "short-stop": short_stop, "slow": slow, "partition": partition,
}  # fmt: skip

POINTS: dict[str, Callable[[random.Random], float]] = {
    "start": lambda draw: 0.0,
    "middle": lambda draw: 0.5,
    "end": lambda draw: 0.95,
    "random": lambda draw: draw.uniform(0.0, 0.9),
}
"""When a fault happens: what part of the tokens of all streams has come."""


def _has_stopped(pid: int) -> bool:
    with contextlib.suppress(TimeoutError):
        wait_until(
            lambda: state_of(pid) == psutil.STATUS_STOPPED or is_gone(pid), PROOF_TIMEOUT_S, "the process stands still"
        )
    return state_of(pid) == psutil.STATUS_STOPPED


@contextlib.contextmanager
def _standing_still(pid: int) -> Iterator[None]:
    """The process is stopped within the block, and goes on after it, also after Ctrl-C. It may be gone by then, or before."""
    try:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _lost(group: Group, detail: str, *, happened: bool) -> Proof:
    try:
        wait_until(lambda: all(map(is_gone, group.pids)), PROOF_TIMEOUT_S, "the whole group is gone")
    except TimeoutError:
        left = [pid for pid in group.pids if not is_gone(pid)]
        return Proof(happened=False, detail=f"{detail}, and {left} of its group are still there", loses_group=True)
    return Proof(happened=happened, detail=detail, loses_group=True)
