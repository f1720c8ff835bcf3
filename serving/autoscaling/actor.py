"""The autoscaler as a Ray actor: one for each cluster, found by its name, restarted by Ray for as long as it is wanted."""

import logging
import os
import threading
import time
from contextlib import suppress
from typing import Any

import msgspec
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.autoscaler import Autoscaler, ScalingError
from cluster.autoscaler_store import RayRecords, RecordStore
from cluster.placement import DRIVER_RESOURCE
from cluster.ray_api import has_actor, has_resource, this_node
from serving.autoscaling.fleet import ServeFleet
from serving.autoscaling.retirement import Control
from serving.autoscaling.serve_control import ServeControl
from serving.autoscaling.settings import AutoscalerSettings
from serving.observability.log import configure_logging

logger = logging.getLogger(__name__)

NAME = "packtrain-autoscaler"
NAMESPACE = "packtrain"
RETRY_S = 0.1


class AutoscalerActor:
    """cluster.autoscaler behind Ray, in a thread of its own."""

    def __init__(self, settings: bytes) -> None:
        """`settings` are AutoscalerSettings (msgpack). Must not fail: Ray gives up an actor that cannot be made."""
        configure_logging("autoscaler")
        self._settings = msgspec.msgpack.decode(settings, type=AutoscalerSettings)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="autoscaler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Order nothing any more; returns when the last order has been given."""
        self._stop.set()
        self._thread.join()

    def pid(self) -> int:
        return os.getpid()

    def _clock(self) -> float:
        """Wall clock."""
        return time.time()

    def _control(self) -> Control:
        return ServeControl(self._settings.apps)

    def _run(self) -> None:
        try:
            fleet = ServeFleet(self._settings, self._control(), self._clock)
            while not self._stop.is_set():
                try:
                    autoscaler = self._opened(fleet)
                except ScalingError as error:
                    logger.warning("the autoscaler cannot begin: %s", error)
                    self._stop.wait(self._settings.period_s)
                    continue
                fleet.show_decisions(autoscaler.log)
                autoscaler.run(self._stop, self._settings.period_s)
                return
        except BaseException:  # a bug: what is known is written down, and Ray starts the next one
            logger.exception("ending")
            os._exit(1)

    def _opened(self, fleet: ServeFleet) -> Autoscaler:
        return Autoscaler(
            {name: model.scaled for name, model in self._settings.models.items()},
            fleet,
            fleet,
            RecordStore(RayRecords()),
            clock=self._clock,
            on_change=fleet.count,
        )


def start_autoscaler(
    settings: AutoscalerSettings, timeout_s: float, actor_class: type[AutoscalerActor] = AutoscalerActor
) -> None:
    """Detached, so that it outlives the process that started it. It goes on with what the last one has learned, and nobody waits
    until it does. Where nodes of drivers are marked, it is on such a node: Ray does not end a node with an actor, so that on a
    group's node it would keep that. Raises RayError."""
    stop_autoscaler(timeout_s)
    deadline_s = time.monotonic() + timeout_s
    where: dict[str, Any]
    if has_resource(DRIVER_RESOURCE):
        where = {"resources": {DRIVER_RESOURCE: 0.001}}
    else:
        node_id, _ = this_node()
        where = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=True)}
    remote: Any = ray.remote(actor_class)
    options = remote.options(
        name=NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=4,  # `close` waits
        **where,
    )
    while True:
        try:
            options.remote(msgspec.msgpack.encode(settings))
            return
        except ValueError:  # the name is still taken by the one that was ended just now
            if time.monotonic() > deadline_s:
                raise
            time.sleep(RETRY_S)


def has_autoscaler() -> bool:
    """Whether there is one, or Ray will start it. Raises RayError."""
    return has_actor(NAME, NAMESPACE)


def stop_autoscaler(timeout_s: float) -> None:
    """Nothing happens where there is none."""
    with suppress(ValueError):  # no actor of that name
        actor = ray.get_actor(NAME, NAMESPACE)
        with suppress(RayError):
            ray.get(actor.close.remote(), timeout=timeout_s)
        ray.kill(actor)
