"""Idle worker processes of Ray that have imported what a group's processes import.

Most of the time that a small group takes to start is imports: some four seconds of processor in its leader, and five in each
rank. Ray gives an actor an idle worker process where there is one, so a group that is lost comes back in the processes that were
made ready here. Ray counts only workers with the same detached ancestor: tasks of a leader make them ready for the next one.
"""

import asyncio
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from cluster import ray_api

logger = logging.getLogger(__name__)

BUSY_S = 10.0
"""A process is kept busy for so long, so that none is asked twice."""
TIMEOUT_S = 120.0
"""For all of a node's; a note older than that is of a leader that is gone."""
RETRY_S = 5.0
_LOWEST_PRIORITY = 19


async def keep_spares(num_spares: Mapping[str, int], modules: Sequence[str]) -> None:
    """Have so many on each node, by its id, and return when they are there. Raises RayError.

    One caller at a time is at work on a node: what it has made ready counts for the next one.
    """
    for node_id, num_wanted in num_spares.items():
        while not await asyncio.to_thread(_claim, node_id, time.time()):
            await asyncio.sleep(RETRY_S)
        try:
            await _prepare(node_id, num_wanted, modules)
        finally:
            await asyncio.to_thread(ray_api.write_record, _note(node_id), None)


async def _prepare(node_id: str, num_wanted: int, modules: Sequence[str]) -> None:
    tasks = ray_api.start_on_node(import_quietly, node_id, num_wanted, tuple(modules), BUSY_S)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    except TimeoutError:
        logger.warning("spare processes on node %s were not ready within %.0f s", node_id, TIMEOUT_S)
        return
    if failed := [outcome for outcome in outcomes if isinstance(outcome, BaseException)]:
        logger.warning("%d of %d spare processes are not there: %s", len(failed), num_wanted, failed[0])


def _note(node_id: str) -> str:
    return f"packtrain-spares-{node_id}"


def _claim(node_id: str, now_s: float) -> bool:
    """Whether nobody else makes spares ready on the node."""
    note = str(now_s).encode()
    if ray_api.create_record(_note(node_id), note):
        return True
    before = ray_api.read_record(_note(node_id))
    if before is not None and now_s - float(before) > TIMEOUT_S:
        ray_api.write_record(_note(node_id), note)
        return True
    return False


def import_quietly(modules: Sequence[str], busy_s: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Import modules without being in anybody's way, and return after `busy_s` at the earliest. Raises ImportError.

    In a thread of the lowest priority, which ends: a process may not raise its own again.
    """
    began_s = time.monotonic()
    errors: list[ImportError] = []

    def work() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        try:
            for module in modules:
                importlib.import_module(module)
        except ImportError as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="spare-imports")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    sleep(max(0.0, busy_s - (time.monotonic() - began_s)))
