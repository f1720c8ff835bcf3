"""The gateway process: a Ray Serve deployment, one replica a node."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from ray import serve

from cluster.ray_api import this_node
from serving.config import AdminConfig, GatewayConfig, LimitsConfig, TenancyConfig
from serving.contracts.fleet import Fleet, GatewayDemand
from serving.contracts.models import ModelCard
from serving.contracts.start_failure import telling_start_failures
from serving.gateway.groups.loads import loads_of_this_process
from serving.gateway.groups.output_receiver import OutputReceiver
from serving.gateway.groups.serve_backend import Handle, ServeBackend
from serving.gateway.server import METHODS, GatewayServer, Ports
from serving.observability.gateway import GatewayWatch
from serving.observability.log import configure_logging
from serving.observability.tracing import open_tracing
from serving.tenants.client.accounts import TenantAccounts
from serving.tenants.client.link import ActorLink
from serving.text.tokenizer import Tokenizer, load_tokenizer


def _tokenizer_of(card: ModelCard) -> Tokenizer:
    """What the chat format writes is control to the tokenizer."""
    literals = {} if card.chat is None else card.chat.literals
    return load_tokenizer(Path(card.source), markup="".join(literals.values()))


class Gateway:
    """A node's front end."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: GatewayConfig,
        limits: LimitsConfig,
        cards: Sequence[ModelCard],
        groups: Mapping[str, Handle],
        admin: AdminConfig,
        tenancy: TenancyConfig | None,
    ) -> None:
        configure_logging("gateway", error_messages=False)
        with telling_start_failures():
            await self._start(config, limits, cards, groups, admin, tenancy)

    async def _start(
        self,
        config: GatewayConfig,
        limits: LimitsConfig,
        cards: Sequence[ModelCard],
        groups: Mapping[str, Handle],
        admin: AdminConfig,
        tenancy: TenancyConfig | None,
    ) -> None:
        tokenizers = {card.name: _tokenizer_of(card) for card in cards}
        self._receiver = OutputReceiver(loads_of_this_process())
        await self._receiver.start(this_node()[1])
        self._id = serve.get_replica_context().replica_id.unique_id
        self._backend = backend = ServeBackend(cards, groups, self._receiver)
        self._watch = GatewayWatch(cards, METHODS, open_tracing())
        self._accounts: TenantAccounts | None = None
        if tenancy is not None:
            accounts = self._accounts = TenantAccounts(ActorLink(), refresh_s=tenancy.refresh_s)
            self._watch.metrics.watch_pending_records(lambda: accounts.num_unrecorded)
            await accounts.start()
        observe = self._watch.telemetry.observe
        self._server = GatewayServer(config, limits, backend, tokenizers, self._accounts, observe=observe)
        self._ports = await self._server.start()
        self._metrics_port = self._watch.start(
            admin, backend.reports, backend.step_reports, lambda: self._server.is_serving
        )

    async def ready(self) -> Ports:
        """Where the gateway listens; its health tells by now what the groups are."""
        await self._server.refresh_health()
        return self._ports

    async def metrics_port(self) -> int | None:
        """Port of /metrics; None when it is turned off."""
        return self._metrics_port

    async def take_fleet(self, encoded: bytes) -> bytes:
        """Fleet (msgpack) from the autoscaler; returns GatewayDemand (msgpack)."""
        fleet = msgspec.msgpack.decode(encoded, type=Fleet)
        for model, seen in fleet.models.items():
            self._backend.set_groups(model, seen.num_running, is_asleep=seen.is_asleep)
        self._watch.take_fleet(fleet, is_shown=fleet.shown_by == self._id)
        demand = {
            model: msgspec.structs.replace(total, num_held=held.num_sequences, num_held_tokens=held.num_prompt_tokens)
            for model, total in self._server.demand.items()
            for held in (self._backend.held(model),)
        }
        return msgspec.msgpack.encode(GatewayDemand(gateway=self._id, models=demand))

    async def drain(self) -> None:
        """Refuse new requests, let running ones finish up to gateway.drain_timeout_s, deliver their usage records."""
        await self._server.drain()
        if self._accounts is not None:
            await self._accounts.stop()

    def check_health(self) -> None:
        """Called by Serve; raising makes it replace this replica."""
        if self._accounts is not None:
            self._accounts.check_health()

    async def __del__(self) -> None:
        """Called by Serve when the replica ends in good order."""
        await self.drain()
        await self._server.stop()
        await self._receiver.stop()
        await self._watch.stop()
