"""The rank's side of the link, and the process that `SpawnedExecutor` starts for each rank.

A rank lives only with its leader: a thread sleeps on the connection and ends the process the moment it hangs up, also
while the main thread is stuck inside a collective. The same thread looks after a leader that is to be ended when it hangs
(leader_watch.py).
"""

import ctypes
import importlib
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from typing import Protocol, cast

import msgspec
import torch

from model_parallel.collectives.cuda import join_gpus
from model_parallel.collectives.gloo import TorchCollectives
from model_parallel.collectives.interface import Collectives, SoloCollectives
from model_parallel.collectives.rendezvous import Rendezvous
from model_parallel.collectives.shared_memory.segment import SharedMemoryCollectives
from model_parallel.config import GroupConfig, ParallelConfig
from model_parallel.engine.messages import StepPlan, StepResult
from model_parallel.errors import ConfigError, EngineError, GroupFailedError
from model_parallel.runtime.leader_watch import LOOK_PERIOD_S, LeaderWatch
from model_parallel.runtime.life_locks import HeldLifeLock
from model_parallel.runtime.movement import MovementReports
from model_parallel.runtime.rank_link import (
    Ack,
    Connection,
    Failed,
    Launch,
    LeaderMessage,
    Progress,
    Ready,
    Result,
    Start,
    Step,
    Stop,
    connect,
)
from model_parallel.transport.frames import LinkError

_PR_SET_PDEATHSIG = 1
_BLAME_DELAY_S = 0.1
"""A rank that failed because of a peer waits this long, so that the leader hears of the peer first and names it."""


class RankWorker(Protocol):
    """What the runtime needs of a rank; `runtime.rank.Rank` is the real one."""

    @property
    def kernels_name(self) -> str: ...

    @property
    def deterministic(self) -> bool:
        """A row's bits do not depend on the rest of the step."""
        ...

    @property
    def num_done(self) -> int:
        """Grows while a step is computed; read by another thread."""
        ...

    @property
    def is_compiling(self) -> bool:
        """What it does now can take long without anything that could be counted; read by another thread."""
        ...

    def execute(self, plan: StepPlan) -> StepResult: ...

    def close(self) -> None: ...


RankFactory = Callable[[GroupConfig, int, Collectives, Callable[[int, int], None] | None], RankWorker]
"""(config, rank, collectives, progress(bytes done, bytes in all)) → a rank that has loaded its shard."""


def serve_rank(launch: Launch, store_listener: socket.socket | None = None) -> None:
    """Connect, load and run steps until the leader says Stop.

    `store_listener` is where rank 0 of a group on several hosts serves the key-value store. Ends the process when the
    leader is gone, or after telling it of a failure.
    """
    life = HeldLifeLock(launch.life_path, launch.rank) if launch.life_path else None
    connection = connect(launch.host, launch.port, secret=launch.secret, epoch=launch.epoch, rank=launch.rank)
    stopped = threading.Event()
    watch = None if life is None else LeaderWatch(life)
    threading.Thread(
        target=_end_with_leader, args=(connection, stopped, watch), name="packtrain-leader", daemon=True
    ).start()
    try:
        _run(connection, launch, store_listener)
    except Exception as error:  # the border of the process: whatever it is, the leader must hear of it
        if not isinstance(error, EngineError):
            traceback.print_exc()
        if isinstance(error, GroupFailedError):
            time.sleep(_BLAME_DELAY_S)
        try:
            connection.send(Failed(type(error).__name__, str(error)))
        finally:
            os._exit(1)
    stopped.set()
    if life is not None:
        life.release()
    connection.shutdown()
    connection.close()


def _run(connection: Connection[LeaderMessage], launch: Launch, store_listener: socket.socket | None) -> None:
    start = connection.receive()
    if not isinstance(start, Start) or start.config.epoch != launch.epoch:
        raise LinkError(f"the leader of epoch {launch.epoch} began with {start!r:.200}")
    parallel = start.config.parallel
    torch.set_num_threads(parallel.num_threads)
    collectives = _join(parallel, launch.rank, start.rendezvous, store_listener)
    worker = import_rank(launch.rank_class)(
        start.config, launch.rank, collectives, lambda done, total: connection.send(Progress(done, total))
    )
    collectives.barrier()
    connection.send(Ready(os.getpid(), worker.kernels_name, worker.deterministic))
    with closing(MovementReports(connection, worker)) as reports:
        while not isinstance(message := connection.receive(), Stop):
            if not isinstance(message, Step):
                raise LinkError(f"the leader sent {type(message).__name__} to a rank that runs")
            reports.begin(message.plan.step_id)
            result = worker.execute(message.plan)
            reports.end(Result(result) if launch.rank == 0 else Ack(launch.epoch, message.plan.step_id))
    worker.close()
    collectives.close()


def _join(parallel: ParallelConfig, rank: int, where: Rendezvous, store_listener: socket.socket | None) -> Collectives:
    if parallel.tp_size == 1:
        return SoloCollectives()
    if where.memory_path:
        return SharedMemoryCollectives(where.memory_path, rank, parallel.tp_size, timeout_s=parallel.step_timeout_s)
    if parallel.device == "cuda":
        return join_gpus(parallel, rank, where, store_listener)
    return TorchCollectives(parallel, rank, where, store_listener)


def _end_with_leader(
    connection: Connection[LeaderMessage], stopped: threading.Event, watch: LeaderWatch | None
) -> None:
    poller = select.poll()
    poller.register(connection.sock, select.POLLRDHUP)
    while not poller.poll(LOOK_PERIOD_S * 1e3 if watch is not None else None):
        if watch is not None and not stopped.is_set():
            watch.look()
    if not stopped.is_set():
        os._exit(1)


def import_rank(path: str) -> RankFactory:
    """Raises ConfigError when "module:Class" does not name anything."""
    module, _, name = path.partition(":")
    try:
        return cast(RankFactory, getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"rank_class is {path!r}; it must be module:Class: {error}") from error


def main() -> None:
    """Read a Launch from stdin and be that rank. A parent that dies takes the process along, connected or not."""
    parent_pid = int(sys.argv[1])
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        return
    serve_rank(msgspec.json.decode(sys.stdin.buffer.readline(), type=Launch))


if __name__ == "__main__":
    main()
