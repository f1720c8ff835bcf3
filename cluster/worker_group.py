"""A replica group whose ranks are Ray actors. Ray starts and ends them; steps go over the link."""

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from cluster import ray_api
from cluster.placement import RankLocation, order_ranks
from cluster.rank_actor import RankActor
from model_parallel.collectives.rendezvous import Rendezvous
from model_parallel.config import GroupConfig
from model_parallel.errors import ConfigError, GroupFailedError
from model_parallel.runtime.leader import (
    LOOPBACK,
    RANK_CLASS,
    STOP_TIMEOUT_S,
    OnProgress,
    SocketExecutor,
    local_rendezvous,
    store_file,
)
from model_parallel.runtime.rank_link import Launch

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 2.0
"""For Ray to end ranks that have been asked to stop; it takes a tenth of a second."""


class RayExecutor(SocketExecutor):
    """Executor over rank actors in the bundles of one placement group, which stays its owner's.

    Run it in the process that leads the group, on a node of the group.
    """

    def __init__(
        self,
        config: GroupConfig,
        *,
        placement_group: ray_api.PlacementGroup | None = None,
        rank_class: str = RANK_CLASS,
        on_progress: OnProgress | None = None,
        configure_logging: Callable[[str], None] | None = None,
    ) -> None:
        """Start and load all ranks; by default in the placement group that this actor was scheduled into. Each rank calls
        `configure_logging` with what it is ("rank 0").

        Raises ConfigError, CheckpointError, GroupFailedError; nothing that it began is left then.
        """
        super().__init__(config)
        self.locations: tuple[RankLocation, ...] = ()
        """By rank."""
        self._rank_class = rank_class
        self._node_id = ""
        """The leader's."""
        self._configure_logging = configure_logging
        self._actors: list[ray_api.ActorHandle[Any]] = []
        self._serving: list[Any] = []
        self._processes: list[int] = []
        """Descriptors (pidfd) of the ranks' processes on this node."""
        self._killing = threading.Lock()
        group = placement_group or ray_api.current_placement_group()
        tp_size = config.parallel.tp_size
        if group is None or group.bundle_count != tp_size:
            bundles = "no placement group" if group is None else f"a placement group of {group.bundle_count} bundles"
            raise ConfigError(f"tensor_parallel_size is {tp_size} and there is {bundles}; each rank needs one bundle")
        began_s = time.monotonic()
        deadline = began_s + config.parallel.start_timeout_s
        with store_file() as path:
            try:
                host, rendezvous = self._place(group, path, deadline)
            except (ray_api.RayError, TimeoutError) as error:
                self.shutdown()
                raise GroupFailedError(f"the actors of the group did not start: {error}") from error
            except BaseException:
                self.shutdown()
                raise
            placed_s = time.monotonic() - began_s
            self._start(host, rendezvous, on_progress, deadline)
        ready_s = time.monotonic() - began_s
        logger.info(
            "the actors of the group were there after %.2f s, and its ranks ready after %.2f s", placed_s, ready_s
        )

    def _place(self, group: ray_api.PlacementGroup, store_path: str, deadline: float) -> tuple[str, list[Rendezvous]]:
        """Create the actors and put them in the order of their ranks. Returns the leader's address, and the ranks'."""
        if not ray_api.wait_placed(group, deadline - time.monotonic()):
            raise TimeoutError(f"Ray has not reserved the {group.bundle_count} bundles of the group")
        # One by one, so that those that exist are known should the next one fail.
        for bundle in range(group.bundle_count):
            self._actors.append(ray_api.create_actor(RankActor, group, bundle))
        asked = [actor.describe.remote(bundle) for bundle, actor in enumerate(self._actors)]
        locations = ray_api.get(asked, deadline - time.monotonic())
        leader_node, leader_ip = ray_api.this_node()
        self._node_id = leader_node
        self.locations = tuple(order_ranks(locations, leader_node))
        self._actors = [self._actors[at.bundle] for at in self.locations]
        self._processes = [os.pidfd_open(at.pid) for at in self.locations if at.node_id == leader_node]
        if all(at.node_id == leader_node for at in self.locations):
            return LOOPBACK, [local_rendezvous(self.config.parallel, store_path)] * len(self._actors)
        store_host = self.locations[0].ip
        (store_port,) = ray_api.get([self._actors[0].open_store.remote(store_host)], deadline - time.monotonic())
        return leader_ip, [
            Rendezvous(bind_host=at.ip, store_host=store_host, store_port=store_port) for at in self.locations
        ]

    def _launch(self, host: str, port: int, secret: bytes) -> None:
        for rank, actor in enumerate(self._actors):
            is_here = self.locations[rank].node_id == self._node_id
            launch = Launch(
                host=host,
                port=port,
                secret=secret,
                epoch=self.config.epoch,
                rank=rank,
                rank_class=self._rank_class,
                life_path=self._life_path if is_here else "",
            )
            self._serving.append(actor.serve.remote(launch, self._configure_logging))

    def _check_launched(self) -> None:
        ended = ray_api.finished(self._serving)
        if ended:
            rank = self._serving.index(ended[0])
            try:
                ray_api.get(ended[:1], STOP_TIMEOUT_S)
            except Exception as error:  # whatever the actor raised, it is the reason
                raise GroupFailedError(f"rank {rank} ended before it connected: {error}") from error
            raise GroupFailedError(f"rank {rank} ended before it connected")

    @property
    def _pids_here(self) -> tuple[int, ...]:
        return tuple(at.pid for at in self.locations if at.node_id == self._node_id)

    def _kill_ranks(self) -> None:
        """Those of this node by a signal, which also ends a process that is stopped; Ray would first ask it, and wait."""
        with self._killing:
            for process in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
        for actor in self._actors:
            ray_api.kill(actor)

    def _wait_for_ends(self) -> None:
        """Of the processes on this node, bounded: Ray cannot end one that is stopped."""
        ending = select.poll()
        for process in self._processes:
            ending.register(process, select.POLLIN)
        num_left, deadline = len(self._processes), time.monotonic() + END_TIMEOUT_S
        while num_left and (ended := ending.poll(1000 * max(0.0, deadline - time.monotonic()))):
            for process, _ in ended:
                ending.unregister(process)
                num_left -= 1

    def _reap_ranks(self) -> None:
        """Ray ends the processes; wait, bounded, until it says that they have. A signal comes last: Ray tells
        all drivers of an unexpected error where a process ends by one."""
        for actor in self._actors:
            ray_api.kill(actor)
        self._wait_for_ends()
        self._kill_ranks()
        ray_api.finished(self._serving, STOP_TIMEOUT_S)
        with self._killing:
            while self._processes:
                os.close(self._processes.pop())
