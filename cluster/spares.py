"""Idle worker processes of Ray that have imported what a group's processes import.

Most of the time that a small group takes to start is imports: some four seconds of processor in its leader, and five in each
rank. Ray gives an actor an idle worker process that was never used, where there is one. So a group that is lost comes back in
processes that have started, and have imported all that (spare_imports.py), before. Of a private cluster, on the leader's node.
"""

import asyncio
import logging
import os
from collections.abc import Sequence

import psutil

from cluster import ray_api
from cluster.spare_imports import note_of_modules

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""For processes to start, and for others to have started theirs."""
POLL_S = 1.0
MIN_AVAILABLE_BYTES = 3 << 30
"""Of memory, or no more are started: what serves comes first."""
_UNUSED, _STARTING = "ray::IDLE", "default_worker.py"
_CLAIM = "packtrain-spares"


def num_workers() -> tuple[int, int]:
    """Worker processes of this node that are idle, and that start. (Ours run no tasks, so none of the idle ones was used.)"""
    titles = [_title(process) for process in psutil.Process(os.getppid()).children()]
    return sum(title.startswith(_UNUSED) for title in titles), sum(_STARTING in title for title in titles)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


async def keep_spares(num_wanted: int, modules: Sequence[str]) -> None:
    """Have at least so many on this node, and return when they have started. One caller at a time starts some. Raises RayError,
    TimeoutError."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while not await asyncio.to_thread(_claim):
            await asyncio.sleep(POLL_S)
        try:
            await asyncio.to_thread(_write_note, modules)
            while await asyncio.to_thread(_start_missing, num_wanted):
                await asyncio.sleep(POLL_S)
        finally:
            await asyncio.to_thread(ray_api.write_record, _CLAIM, None)


def _start_missing(num_wanted: int) -> bool:
    """Whether some are missing. One at a time starts, because what serves has the same priority."""
    num_idle, num_starting = num_workers()
    if num_idle < num_wanted and not num_starting:
        if (num_bytes := psutil.virtual_memory().available) < MIN_AVAILABLE_BYTES:
            logger.warning(
                "%d of %d spare processes are kept: %d MiB are available", num_idle, num_wanted, num_bytes >> 20
            )
            return False
        ray_api.start_idle_worker(START_TIMEOUT_S)
    return num_idle < num_wanted


def _write_note(modules: Sequence[str]) -> None:
    note = note_of_modules()
    part = note.with_suffix(f".{os.getpid()}")
    part.write_text("\n".join(modules))
    part.replace(note)


def _claim() -> bool:
    """Whether no other living process is at it."""
    claim = str(os.getpid()).encode()
    if ray_api.create_record(_CLAIM, claim):
        return True
    before = ray_api.read_record(_CLAIM)
    if before is not None and not psutil.pid_exists(int(before)):
        ray_api.write_record(_CLAIM, claim)
        return True
    return False
