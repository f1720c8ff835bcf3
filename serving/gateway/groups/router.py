"""Which group of a model a request goes to: the one with the fewest open sequences and prompts to compute, of those that
have not just refused.
"""

import random

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from serving.gateway.groups.loads import loads_of_this_process, preference


class LeastLoadedRouter(FIFOMixin, RequestRouter):
    """Serve's router for the groups of a model."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All groups, the least loaded first; Serve takes the next when one does not answer."""
        loads = loads_of_this_process()

        def load(replica: RunningReplica) -> tuple[bool, int, float]:
            engine, on_their_way = replica.replica_id.unique_id, self.replica_queue_len_cache.get(replica.replica_id)
            return preference(loads, engine, on_their_way or 0, random.random())

        return [[replica] for replica in sorted(candidate_replicas, key=load)]
