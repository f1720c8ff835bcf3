"""Everything that watches one gateway, from start to stop."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from uuid import uuid4

import msgspec

from serving.config import AdminConfig
from serving.contracts.fleet import Fleet
from serving.contracts.group_report import PERIOD_S, GroupReport
from serving.contracts.models import ModelCard
from serving.contracts.step_report import StepReport, to_lines
from serving.observability.endpoint import MetricsEndpoint
from serving.observability.groups import FORGET_AFTER_S
from serving.observability.metrics import GatewayMetrics
from serving.observability.requests import Telemetry
from serving.observability.tracing import Tracing

logger = logging.getLogger(__name__)

AskGroups = Callable[[str], Awaitable[Mapping[str, Sequence[GroupReport]]]]
"""Reports of all groups by model, for the gateway of this id."""

AskSteps = Callable[[], Awaitable[Sequence[StepReport]]]
"""The last steps of all groups."""

_LAG_PERIOD_S = 0.5
_STEPS_TIMEOUT_S = 10.0


class GatewayWatch:
    """Metrics, traces and access log of one gateway. Hand `telemetry.observe` to its front ends."""

    def __init__(
        self,
        cards: Iterable[ModelCard],
        methods: Iterable[str],
        tracing: Tracing,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`methods` are those of all front ends, by the names that these give them."""
        cards = list(cards)
        self.metrics = GatewayMetrics(
            models={card.name: card.max_model_len for card in cards},
            num_groups={card.name: card.num_groups for card in cards},
            methods=methods,
        )
        self.telemetry = Telemetry(self.metrics, tracing)
        self._tracing, self._clock = tracing, clock
        self._endpoint: MetricsEndpoint | None = None
        self._fleet, self._told_s = Fleet(at_s=0.0), -math.inf
        """What the autoscaler told last, and when (monotonic)."""
        self._is_shown = False
        """Whether the metrics of this gateway have it."""
        self._states: Mapping[str, str] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(
        self,
        config: AdminConfig,
        ask_groups: AskGroups,
        ask_steps: AskSteps | None = None,
        is_ready: Callable[[], bool] = lambda: True,
    ) -> int | None:
        """Serve /metrics, /steps and what probes ask, unless they are turned off; returns the port. Raises ConfigError."""
        if config.metrics_port is None:
            return None
        self._endpoint = MetricsEndpoint(
            self.metrics.registry,
            config.host,
            config.metrics_port,
            None if ask_steps is None else _steps_page(ask_steps, asyncio.get_running_loop()),
            is_ready,
        )
        reader = uuid4().hex
        self._tasks = [
            asyncio.create_task(self._watch_groups(lambda: ask_groups(reader))),
            asyncio.create_task(self._watch_loop()),
        ]
        return self._endpoint.port

    def take_fleet(self, fleet: Fleet, *, is_shown: bool) -> None:
        """What the autoscaler has told: for the page /fleet, and for the metrics of the one gateway that shows it."""
        self._fleet, self._told_s, self._is_shown = fleet, self._clock(), is_shown
        self.metrics.groups.set_configured({model: seen.target for model, seen in fleet.models.items()})
        self._show_fleet()

    def set_models(self, cards: Iterable[ModelCard], states: Mapping[str, str], scaled: Container[str]) -> None:
        """These are served from now on. `states` by name, for the page /fleet; of those that are not `scaled` any more nothing
        counts that the autoscaler has told."""
        self.metrics.set_models({card.name: card.num_groups for card in cards})
        self._states = states
        told = {model: seen for model, seen in self._fleet.models.items() if model in scaled}
        self._fleet = msgspec.structs.replace(self._fleet, models=told)
        self._show_fleet()

    async def stop(self) -> None:
        """Close the port and send what is left of the traces."""
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        self._tasks = []
        if self._endpoint is not None:
            await asyncio.to_thread(self._endpoint.close)
            self._endpoint = None
        await asyncio.to_thread(self._tracing.close)

    def _show_fleet(self) -> None:
        """The autoscaler's models as it told them, unless it has long told nothing; others as their groups report."""
        is_told = self._clock() - self._told_s < FORGET_AFTER_S
        told = self._fleet if is_told else Fleet(at_s=time.time())
        self.metrics.fleet.take(told if self._is_shown else None)
        if self._endpoint is not None:
            shown = self.metrics.groups.fleet_models()
            shown |= {model: seen for model, seen in told.models.items() if model in shown}
            models = {
                model: msgspec.structs.replace(seen, state=self._states.get(model, seen.state))
                for model, seen in shown.items()
            }
            self._endpoint.fleet_page = msgspec.json.encode(msgspec.structs.replace(told, models=models))

    async def _watch_groups(self, ask: Callable[[], Awaitable[Mapping[str, Sequence[GroupReport]]]]) -> None:
        while True:
            try:
                self.metrics.groups.take(await ask(), time.monotonic())
                self._show_fleet()
            except Exception:  # metrics must outlive whatever the asking does
                logger.exception("the replica groups cannot be asked for their metrics")
            await asyncio.sleep(PERIOD_S)

    async def _watch_loop(self) -> None:
        while True:
            due_s = time.monotonic() + _LAG_PERIOD_S
            await asyncio.sleep(_LAG_PERIOD_S)
            self.metrics.loop_lag.observe(max(0.0, time.monotonic() - due_s))


def _steps_page(ask: AskSteps, loop: asyncio.AbstractEventLoop) -> Callable[[], bytes]:
    """Asks in the gateway's loop for whichever thread makes up the page. Raises TimeoutError."""

    async def answer() -> Sequence[StepReport]:
        return await ask()

    def page() -> bytes:
        return to_lines(asyncio.run_coroutine_threadsafe(answer(), loop).result(_STEPS_TIMEOUT_S))

    return page
