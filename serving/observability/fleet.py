"""What the autoscaler tells a gateway of the groups, as metrics."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.contracts.fleet import Fleet

STATES = ("starting", "running", "draining")


class FleetCollector(Collector):
    """Of the last that was told. Nothing where no autoscaler runs, or where another gateway shows it."""

    def __init__(self) -> None:
        self._fleet = Fleet(at_s=0.0)

    def take(self, fleet: Fleet | None) -> None:
        """Show this from now on."""
        self._fleet = fleet or Fleet(at_s=0.0)

    def collect(self) -> Iterator[Metric]:
        """Called from another thread."""
        models = self._fleet.models
        groups = GaugeMetricFamily("packtrain_groups", "Replica groups by state.", labels=("model_name", "state"))
        decisions = CounterMetricFamily(
            "packtrain_autoscaler_decisions",
            "Changes of the number of groups that were decided.",
            labels=("model_name", "cause"),
        )
        for model, seen in models.items():
            states = Counter(group.state for group in seen.groups)
            for state in STATES:
                groups.add_metric((model, state), states[state])
            for cause, number in seen.num_decisions.items():
                decisions.add_metric((model, cause), number)
        yield groups
        yield decisions
