"""How a gateway reaches the quota authority's actor. Knows nothing of what is behind it, and no database."""

import asyncio
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from serving.tenants.client.accounts import AuthorityUnreachableError

NAME = "packtrain-quota-authority"
NAMESPACE = "packtrain"


class ActorLink:
    """Implements serving.tenants.client.accounts.AuthorityLink."""

    _actor: ActorHandle[Any] | None = None

    async def exchange(self, data: bytes) -> bytes:
        return await self._call("exchange", data)

    async def sync(self, data: bytes) -> bytes:
        return await self._call("sync", data)

    async def _call(self, method: str, data: bytes) -> bytes:
        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(ray.get_actor, NAME, NAMESPACE)
            answer: bytes = await getattr(self._actor, method).remote(data)
        except (RayError, ValueError) as error:
            self._actor = None
            raise AuthorityUnreachableError(f"{type(error).__name__}: {error}") from error
        return answer
