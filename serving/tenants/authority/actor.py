"""The quota authority as a Ray actor: one for each cluster, found by its name, restarted by Ray for as long as it is wanted."""

import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.placement import DRIVER_RESOURCE
from cluster.ray_api import has_actor, has_resource, this_node
from model_parallel.errors import ConfigError
from serving.contracts.errors import StoreUnavailableError
from serving.observability.log import configure_logging
from serving.tenants.authority.ledger import SupersededError
from serving.tenants.authority.service import AuthorityService
from serving.tenants.client.link import NAME, NAMESPACE
from serving.tenants.records import iso_time
from serving.tenants.store.owner import InUseError

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
RETRY_S = 0.5


class AuthorityActor:
    """AuthorityService behind Ray."""

    def __init__(self, url: str, refresh_s: float, owner: str) -> None:
        """Must not fail: Ray gives up an actor that cannot be made. So the database is opened by the first call."""
        configure_logging("quota authority")
        self._settings = (url, refresh_s)
        self._service = AuthorityService(url, owner=owner, refresh_s=refresh_s)

    async def open(self) -> str:
        """Why it cannot have the database; "" when it has it, or will have it when that can be reached."""
        try:
            await self._service.open()
        except InUseError as error:
            return str(error)
        except StoreUnavailableError as error:
            logger.warning("%s", error)
        return ""

    async def exchange(self, data: bytes) -> bytes:
        with _ending_when_superseded():
            return await self._service.exchange(data)

    async def sync(self, data: bytes) -> bytes:
        with _ending_when_superseded():
            return await self._service.sync(data)

    async def close(self) -> None:
        """Before it is ended in good order."""
        await self._service.close()

    async def settings(self) -> tuple[str, float]:
        """The arguments that it was made with."""
        return self._settings

    async def pid(self) -> int:
        return os.getpid()


@contextmanager
def _ending_when_superseded() -> Iterator[None]:
    """Two of this server were alive for a moment: if this is the one that gateways reach, Ray starts it again, and it takes over.
    If another server has the database, it waits until that one has ended."""
    try:
        yield
    except SupersededError:
        logger.exception("ending")
        os._exit(1)


def start_authority(url: str, *, refresh_s: float) -> None:
    """Have it run on this node, which alone has a database file; detached, so that it outlives the process that started it. Where
    nodes of drivers are marked, it is on such a node, and follows the driver to the next one with its volume.
    Raises ConfigError when one with other settings runs in this cluster already, or another server uses the database, and
    TimeoutError."""
    is_file = url.startswith("sqlite")
    remote: Any = ray.remote(AuthorityActor)
    where: dict[str, Any]
    if has_resource(DRIVER_RESOURCE):
        where = {"resources": {DRIVER_RESOURCE: 0.001}}
    else:
        node_id, _ = this_node()
        where = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=not is_file)}
    is_new = not has_actor(NAME, NAMESPACE)
    owner = f"{socket.gethostname()} since {iso_time(time.time())} ({uuid.uuid4().hex[:8]})"
    actor = remote.options(
        name=NAME,
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,  # gateways repeat what was not answered
        max_concurrency=1000,
        **where,
    ).remote(url, refresh_s, owner)
    if _settings(actor) != (url, refresh_s):
        raise ConfigError(
            "tenancy: this cluster has a quota authority with other settings already; stop its server first"
        )
    if problem := ray.get(actor.open.remote(), timeout=START_TIMEOUT_S):
        if is_new:
            ray.kill(actor)
        raise ConfigError(f"tenancy.database: {problem}")


def _settings(actor: Any) -> tuple[str, float]:
    """Of the running authority. One that is being restarted is waited for. Raises TimeoutError, RayError."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            settings: tuple[str, float] = ray.get(actor.settings.remote(), timeout=deadline_s - time.monotonic())
            return settings
        except ActorUnavailableError:
            if time.monotonic() > deadline_s - RETRY_S:
                raise
            time.sleep(RETRY_S)


def stop_authority(timeout_s: float) -> None:
    """Nothing happens where there is none."""
    with suppress(ValueError, RayError):  # no actor of that name; no cluster any more
        actor = ray.get_actor(NAME, NAMESPACE)
        with suppress(RayError):
            ray.get(actor.close.remote(), timeout=timeout_s)
        ray.kill(actor)
