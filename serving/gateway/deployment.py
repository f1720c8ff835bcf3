"""The gateway process: a Ray Serve deployment, one replica a node."""

import asyncio
import logging
from contextlib import suppress
from pathlib import Path

import msgspec
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.ray_api import RayError, keep_serve_to_this_node, read_record, this_node
from serving.config import AdminConfig, GatewayConfig, LimitsConfig, ModelEntry, TenancyConfig
from serving.contracts.fleet import Fleet, GatewayDemand
from serving.contracts.models import ModelCard
from serving.contracts.served import RECORD_KEY, GatewayModels, Served, app_name, deployment_name
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

logger = logging.getLogger(__name__)

LOOK_PERIOD_S = 2.0
"""How often a gateway looks whether other models are to be served. It is also told, and sooner."""


def _tokenizer_of(card: ModelCard) -> Tokenizer:
    """What the chat format writes is control to the tokenizer."""
    literals = {} if card.chat is None else card.chat.literals
    return load_tokenizer(Path(card.source), markup="".join(literals.values()))


def _read_served() -> Served | None:
    """Raises RayError."""
    encoded = read_record(RECORD_KEY)
    return None if encoded is None else msgspec.msgpack.decode(encoded, type=Served)


def _handle(model: str) -> Handle:
    return DeploymentHandle(deployment_name(model), app_name(model))


def _scaled(served: Served) -> frozenset[str]:
    """Models that the autoscaler looks after."""
    shown = served.shown.items()
    return frozenset(name for name, model in shown if ModelEntry.model_validate_json(model.settled.chosen).is_scaled)


def _is_read_anew(before: ModelCard, after: ModelCard) -> bool:
    """Another number of groups is nothing that prompts depend on."""
    return msgspec.structs.replace(before, num_groups=after.num_groups) != after


class Gateway:
    """A node's front end. Which models it serves is written in Ray's control store (contracts/served.py)."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: GatewayConfig,
        limits: LimitsConfig,
        admin: AdminConfig,
        tenancy: TenancyConfig | None,
        resume_key: bytes,
    ) -> None:
        """`resume_key` is the same for all gateways of the deployment."""
        keep_serve_to_this_node()
        configure_logging("gateway", error_messages=False)
        with telling_start_failures():
            await self._start(config, limits, admin, tenancy, resume_key)

    async def _start(
        self,
        config: GatewayConfig,
        limits: LimitsConfig,
        admin: AdminConfig,
        tenancy: TenancyConfig | None,
        resume_key: bytes,
    ) -> None:
        served = _read_served()
        if served is None:
            raise RuntimeError("it is not written down which models are served")
        cards = [model.card for model in served.shown.values()]
        tokenizers = {card.name: _tokenizer_of(card) for card in cards}
        self._served = msgspec.structs.replace(served, models=served.shown)
        self._scaled = _scaled(served)
        """Models that the autoscaler looks after. What it tells of others comes late."""
        self._problems: dict[str, str] = {}
        """Models that this gateway cannot serve, and why."""
        self._looking = asyncio.Lock()
        self._receiver = OutputReceiver(loads_of_this_process())
        await self._receiver.start(this_node()[1])
        self._id = serve.get_replica_context().replica_id.unique_id
        self._backend = backend = ServeBackend(
            cards, {card.name: _handle(card.name) for card in cards}, self._receiver, adapters=self._served.adapters
        )
        self._watch = GatewayWatch(cards, METHODS, open_tracing())
        self._accounts: TenantAccounts | None = None
        if tenancy is not None:
            accounts = self._accounts = TenantAccounts(ActorLink(), refresh_s=tenancy.refresh_s)
            self._watch.metrics.watch_pending_records(lambda: accounts.num_unrecorded)
            await accounts.start()
        observe = self._watch.telemetry.observe
        self._server = GatewayServer(
            config, limits, backend, tokenizers, self._accounts, observe=observe, resume_key=resume_key
        )
        self._ports = await self._server.start()
        self._metrics_port = self._watch.start(
            admin, backend.reports, backend.step_reports, lambda: self._server.is_serving
        )
        for name, model in self._served.models.items():
            backend.set_model(model.card, _handle(name), is_held=model.state == "replacing")
        self._look_task = asyncio.create_task(self._look_again())

    async def ready(self) -> Ports:
        """Where the gateway listens; its health tells by now what the groups are."""
        await self._server.refresh_health()
        return self._ports

    async def metrics_port(self) -> int | None:
        """Port of /metrics; None when it is turned off."""
        return self._metrics_port

    async def take_fleet(self, encoded: bytes) -> bytes:
        """Fleet (msgpack) from the autoscaler; returns GatewayDemand (msgpack)."""
        told = msgspec.msgpack.decode(encoded, type=Fleet)
        models = {model: seen for model, seen in told.models.items() if model in self._scaled}
        fleet = msgspec.structs.replace(told, models=models)
        for model, seen in fleet.models.items():
            self._backend.set_groups(model, seen.num_running, is_asleep=seen.is_asleep)
        self._watch.take_fleet(fleet, is_shown=fleet.shown_by == self._id)
        demand = {
            model: msgspec.structs.replace(total, num_held=held.num_sequences, num_held_tokens=held.num_prompt_tokens)
            for model, total in self._server.demand.items()
            for held in (self._backend.held(model),)
        }
        return msgspec.msgpack.encode(GatewayDemand(gateway=self._id, models=demand))

    async def take_models(self) -> bytes:
        """Look now which models are to be served. Returns GatewayModels (msgpack)."""
        await self._look()
        answer = GatewayModels(
            gateway=self._id,
            generation=self._served.generation,
            num_open=self._backend.num_open,
            problems=self._problems,
        )
        return msgspec.msgpack.encode(answer)

    async def _look(self) -> None:
        """Serve what the record says. A record that cannot be read changes nothing."""
        async with self._looking:
            try:
                served = await asyncio.to_thread(_read_served)
            except (RayError, RuntimeError, msgspec.DecodeError) as error:
                logger.warning("the record of the served models cannot be read: %s", error)
                return
            if served is not None and served.generation != self._served.generation:
                await self._follow(served)

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_PERIOD_S)
            try:
                await self._look()
            except Exception:  # the loop must outlive whatever a model does; what was not done is done at the next look
                logger.exception("the gateway does not serve yet what the record says")

    async def _follow(self, served: Served) -> None:
        before, shown = self._served.models, served.shown
        for name in self._backend.models.bases.keys() - shown.keys():
            self._backend.forget_model(name)
            self._server.forget_model(name)
        self._backend.keep_waiting({name: model.card.weights for name, model in served.models.items()})
        problems, self._problems = self._problems, {}
        for name, model in shown.items():
            card = model.card
            try:
                if name not in before or name in problems or _is_read_anew(before[name].card, card):
                    await self._server.set_model(card, await asyncio.to_thread(_tokenizer_of, card))
            except Exception as error:  # whatever is wrong with its files here, the other models are served
                logger.exception("the model %s cannot be served", name)
                self._problems[name] = f"{type(error).__name__}: {error}"
                continue
            self._backend.set_model(card, _handle(name), is_held=model.state == "replacing")
        self._backend.set_adapters(served.adapters)
        self._scaled = _scaled(served)
        states = {name: model.state for name, model in shown.items()}
        self._watch.set_models([model.card for model in shown.values()], states, self._scaled)
        self._served = msgspec.structs.replace(served, models=shown)

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
        self._look_task.cancel()
        with suppress(asyncio.CancelledError):
            await self._look_task
        await self.drain()
        await self._server.stop()
        await self._receiver.stop()
        await self._watch.stop()
