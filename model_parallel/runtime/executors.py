"""Executors for one host: ranks as threads of this process, and ranks as processes that it spawns."""

import contextlib
import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

import msgspec
import torch

from model_parallel.collectives.interface import Collectives, SoloCollectives
from model_parallel.collectives.threads import Exchange, ThreadCollectives
from model_parallel.config import GroupConfig
from model_parallel.engine.messages import StepPlan, StepResult
from model_parallel.errors import ConfigError, GroupFailedError
from model_parallel.python_process import module_command
from model_parallel.runtime.leader import (
    LOOPBACK,
    RANK_CLASS,
    STOP_TIMEOUT_S,
    OnProgress,
    SocketExecutor,
    local_rendezvous,
    store_file,
)
from model_parallel.runtime.rank import Rank
from model_parallel.runtime.rank_link import Launch
from model_parallel.runtime.rank_process import RankFactory, RankWorker

T = TypeVar("T")


class InProcessExecutor:
    """Ranks in this process: a single one in the caller's thread, several each in a thread of its own.

    For tests, benchmarks and offline use. Threads cannot be ended from outside, so only collectives keep
    step_timeout_s; a single rank has no bound.
    """

    def __init__(
        self, config: GroupConfig, *, rank_factory: RankFactory = Rank, on_progress: OnProgress | None = None
    ) -> None:
        """Loads all ranks. Raises whatever a rank raised: ConfigError, CheckpointError, ..."""
        size, timeout_s = config.parallel.tp_size, config.parallel.step_timeout_s
        self._failure: str | None = None
        self._submitted: deque[StepPlan] = deque()
        self._exchange = Exchange(size, timeout_s=config.parallel.start_timeout_s)
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"packtrain-rank-{rank}") for rank in range(size)]

        def load(rank: int) -> RankWorker:
            torch.set_num_threads(config.parallel.num_threads)
            collectives: Collectives = SoloCollectives() if size == 1 else ThreadCollectives(self._exchange, rank)
            progress = None if on_progress is None else partial(on_progress, rank)
            return rank_factory(config, rank, collectives, progress)

        self._workers: list[RankWorker] = []
        try:
            self._workers = [load(0)] if size == 1 else self._on_every_rank([partial(load, r) for r in range(size)])
        except BaseException:
            self.shutdown()
            raise
        self._exchange.timeout_s = timeout_s

    def submit(self, plan: StepPlan) -> None:
        """The step runs when it is collected: these ranks have no time of their own."""
        self._submitted.append(plan)

    def collect(self) -> StepResult:
        plan = self._submitted.popleft()
        if self._failure is not None:
            raise GroupFailedError(self._failure)
        try:
            if len(self._workers) == 1:
                return self._workers[0].execute(plan)
            return self._on_every_rank([partial(worker.execute, plan) for worker in self._workers])[0]
        except Exception as error:
            self._failure = f"step {plan.step_id} failed: {type(error).__name__}: {error}"
            raise GroupFailedError(self._failure) from error

    def _on_every_rank(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Results by rank. When a rank raises, the others' collectives are broken off and its exception is raised."""
        futures = [thread.submit(call) for thread, call in zip(self._threads, calls, strict=True)]
        if any(future.exception() for future in wait(futures, return_when=FIRST_EXCEPTION).done):
            self._exchange.abort()
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, GroupFailedError)):  # the cause before its consequences
            raise error
        return [future.result() for future in futures]

    def set_failure_callback(self, callback: Callable[[str], None]) -> None:
        """Never called: these ranks run inside steps only, so none can be lost between them."""

    def shutdown(self) -> None:
        self._failure = self._failure or "the group was shut down"
        self._exchange.abort()
        while self._workers:
            self._workers.pop().close()
        for thread in self._threads:
            thread.shutdown()


def visible_devices(environment: Mapping[str, str], tp_size: int) -> list[str]:
    """The GPU of each rank, as CUDA_VISIBLE_DEVICES names it: the first ones of those that this process may use."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    devices = [str(rank) for rank in range(tp_size)] if listed is None else [d for d in listed.split(",") if d]
    if len(devices) < tp_size:
        raise ConfigError(f"tensor_parallel_size is {tp_size} and CUDA_VISIBLE_DEVICES names {len(devices)} GPUs")
    return devices[:tp_size]


class SpawnedExecutor(SocketExecutor):
    """A process of its own for every rank, on this host."""

    def __init__(
        self, config: GroupConfig, *, rank_class: str = RANK_CLASS, on_progress: OnProgress | None = None
    ) -> None:
        """Starts and loads all ranks. Raises ConfigError, CheckpointError, GroupFailedError; nothing is left then."""
        super().__init__(config)
        self._rank_class = rank_class
        self._devices = visible_devices(os.environ, config.parallel.tp_size) if config.parallel.device == "cuda" else []
        self._processes: list[subprocess.Popen[bytes]] = []
        # Linux ends the ranks with the thread that spawned them (PR_SET_PDEATHSIG), so it must last as long as they do.
        self._spawner = ThreadPoolExecutor(1, thread_name_prefix="packtrain-spawner")
        with store_file() as path:
            deadline = time.monotonic() + config.parallel.start_timeout_s
            where = local_rendezvous(config.parallel, path)
            self._start(LOOPBACK, [where] * config.parallel.tp_size, on_progress, deadline)

    def _launch(self, host: str, port: int, secret: bytes) -> None:
        for rank in range(self.config.parallel.tp_size):
            launch = Launch(
                host=host,
                port=port,
                secret=secret,
                epoch=self.config.epoch,
                rank=rank,
                rank_class=self._rank_class,
                life_path=self._life_path,
            )
            process = self._spawner.submit(self._spawn, rank).result()
            self._processes.append(process)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:  # it died already; _check_launched tells
                process.stdin.write(msgspec.json.encode(launch) + b"\n")

    def _spawn(self, rank: int) -> subprocess.Popen[bytes]:
        environment = dict(os.environ)
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices[rank]
        return subprocess.Popen(
            module_command("model_parallel.runtime.rank_process", str(os.getpid())),
            stdin=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a Ctrl-C in the terminal is for the leader, which then ends its ranks in order
        )

    def _check_launched(self) -> None:
        for rank, process in enumerate(self._processes):
            if process.poll() is not None:
                raise GroupFailedError(f"rank {rank} ended with status {process.returncode} before it connected")

    def _kill_ranks(self) -> None:
        for process in self._processes:
            process.kill()

    def _reap_ranks(self) -> None:
        for end in (lambda p: None, subprocess.Popen.terminate, subprocess.Popen.kill):
            deadline = time.monotonic() + STOP_TIMEOUT_S
            for process in self._processes:
                end(process)
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(deadline - time.monotonic(), 0.0))
        self._spawner.shutdown()
