"""What the autoscaler sees through Ray Serve, and what it tells the gateways."""

from collections.abc import Callable, Mapping

import msgspec
import pytest

from cluster.autoscaler import LoggedDecision, Mode, ScalingError
from cluster.policy import Cause, GroupLoad, ModelDecision, ModelObservation, Phase
from serving.autoscaling.fleet import MAX_TOLD, ServeFleet
from serving.autoscaling.retirement import Deployed, Replica
from serving.autoscaling.settings import AutoscalerSettings, settings_of
from serving.config import parse_config
from serving.contracts.fleet import Departure, Fleet, FleetGroup, FleetModel, GatewayDemand, ModelDemand
from tests.support.policy_worlds import group_load

START_S = 100.0


def settings(**model: object) -> AutoscalerSettings:
    entry = {"name": "m", "source": "s", "tensor_parallel_size": 2, "autoscaling": {"max_groups": 3, **model}}
    config = parse_config({"models": [entry], "autoscaler": {"max_ranks": 6}}, origin="test")
    found = settings_of(config.models, config.autoscaler, "Gateway")
    assert found is not None
    return found


class Serve:
    """Ray Serve: what is deployed, and what answers."""

    def __init__(self) -> None:
        self.gateways: dict[str, GatewayDemand | None] = {}
        self.groups: dict[str, tuple[str, GroupLoad | None]] = {}
        """(state, load) by id."""
        self.target = 1
        self.told: list[Fleet] = []
        self.orders: list[tuple[str, int]] = []
        self.departures: dict[str, Departure] = {}
        self.nodes: dict[str, str] = {}
        self.is_down = False

    def deployed(self) -> Mapping[str, Deployed]:
        if self.is_down:
            raise ScalingError("the controller does not answer")
        return {
            "Gateway": Deployed(
                target=1, replicas=tuple(Replica(id=name, state="RUNNING", started_s=1.0) for name in self.gateways)
            ),
            "ReplicaGroup-m": Deployed(
                target=self.target,
                replicas=tuple(
                    Replica(id=name, state=state, started_s=START_S, node_id=self.nodes.get(name, ""))
                    for name, (state, _) in self.groups.items()
                ),
            ),
        }

    def ask_all(self, deployment: str, method: str, *arguments: bytes) -> list[bytes]:
        if deployment == "Gateway":
            self.told.append(msgspec.msgpack.decode(arguments[0], type=Fleet))
            return [msgspec.msgpack.encode(demand) for demand in self.gateways.values() if demand is not None]
        assert (deployment, method) == ("ReplicaGroup-m", "load")
        return [
            msgspec.msgpack.encode((name, load, self.departures.get(name, Departure.NONE)))
            for name, (state, load) in self.groups.items()
            if state == "RUNNING" and load is not None
        ]

    def set_target(self, deployment: str, num_replicas: int) -> None:
        self.orders.append((deployment, num_replicas))

    def kill(self, replica: Replica) -> None:
        raise AssertionError("nothing starts here")


class Clock:
    """A wall clock and another one, which goes on when that is set."""

    now_s = 1000.0
    set_by_s = 0.0

    def __call__(self) -> float:
        return self.now_s + self.set_by_s

    def steady(self) -> float:
        return self.now_s


@pytest.fixture
def serve() -> Serve:
    return Serve()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def observe(serve: Serve, clock: Clock) -> Callable[[], ModelObservation]:
    fleet = ServeFleet(settings(), serve, clock, clock.steady)
    return lambda: fleet.observe().models["m"]


def demand(name: str, num_sequences: int, num_tokens: int) -> GatewayDemand:
    return GatewayDemand(gateway=name, models={"m": ModelDemand(num_sequences, num_tokens)})


def test_groups_are_seen_with_their_states_and_loads(serve: Serve, observe: Callable[[], ModelObservation]) -> None:
    serve.groups = {
        "g1": ("RUNNING", group_load(5.0, num_running=3)),
        "g2": ("STARTING", None),
        "g3": ("STOPPING", group_load(5.0)),
        "g4": ("RECOVERING", None),
    }
    serve.target = 2
    seen = observe()
    assert seen.target == 2
    assert [(group.group, group.phase) for group in seen.groups] == [
        ("g1", Phase.RUNNING), ("g2", Phase.STARTING), ("g3", Phase.DRAINING), ("g4", Phase.RUNNING),
    ]  # fmt: skip
    loads = [group.load for group in seen.groups]
    assert loads[0] == group_load(1000.0, num_running=3)  # measured now, whatever the clock of its node shows
    assert loads[1:] == [None, None, None]


def test_a_group_that_retires_drains_and_is_not_one_of_those_that_there_should_be(
    serve: Serve, observe: Callable[[], ModelObservation]
) -> None:
    serve.groups = {name: ("RUNNING", group_load(5.0)) for name in ("g1", "g2", "g3")}
    serve.target = 3
    serve.departures = {"g1": Departure.RETIRING, "g2": Departure.RETIRED}
    seen = observe()
    assert seen.target == 1
    assert [group.phase for group in seen.groups] == [Phase.DRAINING, Phase.DRAINING, Phase.RUNNING]
    serve.groups["g1"] = ("RUNNING", None)  # silent for once
    assert observe().target == 1
    serve.groups["g2"] = ("STOPPING", None)  # Serve counts it no more
    serve.target = 2
    assert observe().target == 1


def test_how_many_groups_share_a_node_is_seen(serve: Serve, observe: Callable[[], ModelObservation]) -> None:
    serve.nodes = {"g1": "n1", "g2": "n1", "g3": "n2", "g4": "n2"}
    serve.groups = {name: ("RUNNING", None) for name in ("g1", "g2", "g3")} | {
        "g4": ("STOPPING", None),
        "g5": ("STARTING", None),
    }
    assert [group.num_beside for group in observe().groups] == [1, 1, 0, 1, 0]


def test_how_long_a_start_took_is_measured(serve: Serve, clock: Clock, observe: Callable[[], ModelObservation]) -> None:
    serve.groups = {"g1": ("STARTING", None)}
    (group,) = observe().groups
    assert (group.since_s, group.start_s) == (START_S, None)
    clock.now_s = 130.0
    serve.groups = {"g1": ("RUNNING", group_load(0.0))}
    for _ in range(2):
        (group,) = observe().groups
        assert (group.since_s, group.start_s) == (130.0, 30.0)
        clock.now_s += 5.0


@pytest.mark.parametrize("set_by_s", [0.0, 3600.0, -3600.0])
def test_a_clock_that_is_set_during_a_start_does_not_make_it_longer(
    serve: Serve, clock: Clock, observe: Callable[[], ModelObservation], set_by_s: float
) -> None:
    observe()
    clock.now_s += 5.0
    serve.groups = {"g1": ("STARTING", None)}  # Serve says 100.0, but it was not there at the last look
    (group,) = observe().groups
    assert group.since_s == 1000.0
    clock.now_s, clock.set_by_s = 1030.0, set_by_s
    serve.groups = {"g1": ("RUNNING", group_load(0.0))}
    (group,) = observe().groups
    assert (group.since_s, group.start_s) == (1030.0 + set_by_s, 30.0)


def test_a_start_that_nobody_saw_has_no_length(serve: Serve, observe: Callable[[], ModelObservation]) -> None:
    """As after a restart of the autoscaler, or of Serve's controller, which finds replicas again."""
    serve.groups = {"g1": ("RUNNING", group_load(0.0))}
    assert observe().groups[0].start_s is None


def test_silent_gateways_are_told_from_missing_ones(serve: Serve, observe: Callable[[], ModelObservation]) -> None:
    serve.gateways = {"one": demand("one", 5, 70), "two": None}
    gateways = {gateway.gateway: gateway.load for gateway in observe().gateways}
    assert gateways["two"] is None
    assert gateways["one"] is not None
    assert (gateways["one"].num_sequences, gateways["one"].num_prompt_tokens) == (5, 70)


def test_a_gateway_that_does_not_serve_the_model_yet_is_not_silent(
    serve: Serve, observe: Callable[[], ModelObservation]
) -> None:
    """Our own: a model that was deployed later was without metrics until each gateway had had a request for it."""
    serve.gateways = {
        "one": demand("one", 0, 0),
        "two": GatewayDemand(gateway="two", models={"other": ModelDemand(3, 4)}),
    }
    (gateway,) = observe().gateways
    assert gateway.gateway == "one" and gateway.load is not None
    assert gateway.load.num_sequences == 0


def test_gateways_are_told_what_was_seen_and_decided(serve: Serve) -> None:
    fleet = ServeFleet(settings(), serve, Clock())
    made = ModelDecision(target=2, before=1, cause=Cause.DEMAND, reason="1 → 2: much", warnings=("w",))
    logged = LoggedDecision(first_s=1.0, last_s=2.0, model="m", mode=Mode.ON, decision=made, error="no")
    fleet.show_decisions(lambda since_s: [logged] * (MAX_TOLD + 1))
    fleet.count("m", Mode.ON, made)
    serve.gateways = {"b": demand("b", 0, 0), "a": demand("a", 0, 0)}
    serve.groups = {"g1": ("RUNNING", group_load(5.0, num_running=3))}
    fleet.observe()
    fleet.observe()
    told = serve.told[-1]
    assert told.shown_by == "a"
    seen = told.models["m"]
    assert (seen.mode, seen.target, seen.min_groups, seen.max_groups) == ("on", 1, 1, 3)
    assert [(group.group, group.state, group.num_running) for group in seen.groups] == [("g1", "running", 3)]
    assert seen.num_decisions == {"demand": 1}
    assert len(told.decisions) == MAX_TOLD
    assert (told.decisions[0].reason, told.decisions[0].error) == ("1 → 2: much", "no")


def test_orders_go_to_the_deployment_of_the_model(serve: Serve) -> None:
    ServeFleet(settings(), serve, Clock()).scale("m", 2, ())
    assert serve.orders == [("ReplicaGroup-m", 2)]


def test_nothing_is_seen_without_the_controller(serve: Serve, observe: Callable[[], ModelObservation]) -> None:
    serve.is_down = True
    with pytest.raises(ScalingError):
        observe()


def test_ranks_are_what_models_share(serve: Serve) -> None:
    assert ServeFleet(settings(), serve, Clock()).observe().num_accelerators == 6
    assert settings().models["m"].scaled.policy.accelerators_per_group == 2


def test_nothing_is_started_where_no_model_is_to_be_scaled() -> None:
    for autoscaling in (None, {"mode": "off", "max_groups": 2}):
        config = parse_config({"models": [{"name": "m", "source": "s", "autoscaling": autoscaling}]}, origin="test")
        assert settings_of(config.models, config.autoscaler, "Gateway") is None


def test_advice_is_asked_for_by_its_mode() -> None:
    assert settings(mode="advise").models["m"].scaled.mode is Mode.ADVISE


def test_what_waits_for_a_first_group_is_seen(serve: Serve, observe: Callable[[], ModelObservation]) -> None:
    held = GatewayDemand(gateway="one", models={"m": ModelDemand(5, 70, num_held=2, num_held_tokens=30)})
    serve.gateways, serve.target = {"one": held}, 0
    (gateway,) = observe().gateways
    assert gateway.load is not None
    assert (gateway.load.num_held, gateway.load.num_held_tokens) == (2, 30)


@pytest.mark.parametrize(
    ("mode", "least", "states", "expected"),
    [
        ("on", 0, [], True),
        ("on", 0, ["starting", "draining"], True),
        ("on", 0, ["running"], False),
        ("on", 1, ["starting"], False),  # its groups are lost, and nobody knows for how long
        ("advise", 0, [], False),  # nobody would start one
    ],
)
def test_a_model_is_asleep_while_it_has_no_group_and_would_get_one(
    mode: str, least: int, states: list[str], expected: bool
) -> None:
    groups = tuple(FleetGroup(group=f"g{place}", state=state) for place, state in enumerate(states))
    seen = FleetModel(mode=mode, target=0, min_groups=least, max_groups=2, groups=groups)
    assert seen.is_asleep is expected
