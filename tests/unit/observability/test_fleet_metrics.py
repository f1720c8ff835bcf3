"""What the autoscaler tells a gateway, as metrics and as a page."""

import asyncio
from urllib.request import urlopen

import msgspec

from bench.support.fake_backend import card
from serving.config import AdminConfig
from serving.contracts.fleet import Fleet, FleetGroup, FleetModel
from serving.contracts.group_report import GroupReport
from serving.gateway.server import METHODS
from serving.observability.gateway import GatewayWatch
from serving.observability.groups import FORGET_AFTER_S
from serving.observability.tracing import Tracing
from tests.support.waiting import PATIENCE_S
from tests.unit.observability.test_group_metrics import report

TOLD = Fleet(
    at_s=1.0,
    models={
        "tiny": FleetModel(
            mode="on",
            target=3,
            min_groups=1,
            max_groups=4,
            groups=(FleetGroup(group="g1", state="running"), FleetGroup(group="g2", state="starting")),
            num_decisions={"demand": 2},
        )
    },
)


def watch() -> GatewayWatch:
    return GatewayWatch([card(num_groups=1)], METHODS, Tracing())


def value(watched: GatewayWatch, name: str, **labels: str) -> float | None:
    return watched.metrics.registry.get_sample_value(name, {"model_name": "tiny", **labels})


def test_groups_are_counted_by_state() -> None:
    watched = watch()
    watched.take_fleet(TOLD, is_shown=True)
    states = {state: value(watched, "packtrain_groups", state=state) for state in ("starting", "running", "draining")}
    assert states == {"starting": 1, "running": 1, "draining": 0}
    assert value(watched, "packtrain_autoscaler_decisions_total", cause="demand") == 2


def test_one_gateway_shows_them() -> None:
    watched = watch()
    watched.take_fleet(TOLD, is_shown=True)
    watched.take_fleet(TOLD, is_shown=False)
    assert value(watched, "packtrain_groups", state="running") is None
    assert value(watched, "packtrain_groups_configured") == 3


async def test_the_page_is_what_was_told_and_before_that_what_groups_report() -> None:
    reports = {"tiny": [report("g1"), report("g2", is_healthy=False, stats={})]}
    asked = asyncio.Event()

    async def ask(reader: str) -> dict[str, list[GroupReport]]:
        asked.set()
        return reports

    watched = watch()
    port = watched.start(AdminConfig(port=None, metrics_port=0), ask)

    def page() -> Fleet:
        with urlopen(f"http://127.0.0.1:{port}/fleet", timeout=PATIENCE_S) as answer:
            return msgspec.json.decode(answer.read(), type=Fleet)

    try:
        await asyncio.wait_for(asked.wait(), PATIENCE_S)
        await asyncio.sleep(0)
        reported = (await asyncio.to_thread(page)).models["tiny"]
        assert (reported.mode, reported.target) == ("off", 1)
        assert [(group.group, group.state, group.num_running) for group in reported.groups] == [
            ("g1", "running", 3),
            ("g2", "lost", None),
        ]
        watched.take_fleet(TOLD, is_shown=True)
        assert (await asyncio.to_thread(page)).models == TOLD.models
    finally:
        await watched.stop()


def test_what_was_told_long_ago_is_not_shown() -> None:
    """Where the autoscaler has ended, with the last model that it looked after or for good."""
    now_s = 0.0
    watched = GatewayWatch([card(num_groups=1)], METHODS, Tracing(), lambda: now_s)
    watched.take_fleet(TOLD, is_shown=True)
    now_s = FORGET_AFTER_S
    watched._show_fleet()
    assert value(watched, "packtrain_groups", state="running") is None
    assert value(watched, "packtrain_autoscaler_decisions_total", cause="demand") is None


def test_a_model_that_is_not_scaled_any_more_is_not_shown() -> None:
    watched = watch()
    watched.take_fleet(TOLD, is_shown=True)
    watched.set_models([card(num_groups=1)], {"tiny": "serving"}, scaled=())
    assert value(watched, "packtrain_groups", state="running") is None
    assert value(watched, "packtrain_groups_configured") == 1
