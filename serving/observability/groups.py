"""What the leader of a replica group tells the gateways, and how a gateway shows it to Prometheus.

Every gateway asks every group. A group counts in the metrics of one gateway at a time, so that sums over gateways are true.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from serving.contracts.fleet import FleetGroup, FleetModel
from serving.contracts.group_report import ITERATION_TOKENS_BUCKETS, GroupReport

FORGET_AFTER_S = 60.0
"""How long the series of a group that has gone are still shown, so that a scrape sees how they ended."""

_LABELS = ("model_name", "engine")


@dataclass(frozen=True, slots=True)
class _Family:
    name: str
    help: str
    stat: str
    is_total: bool = False


_FAMILIES = (
    _Family("vllm:num_requests_running", "Sequences that run.", "num_running"),
    _Family("vllm:num_requests_waiting", "Sequences that wait, preempted ones included.", "num_waiting"),
    _Family("packtrain_requests_paused", "Sequences whose readers do not keep up.", "num_paused"),
    _Family("packtrain_grammars", "Grammars that the ranks keep compiled, or compile now.", "num_grammars"),
    _Family(
        "packtrain_grammars_compiled", "Grammars compiled by the ranks.", "num_compiled_grammars", is_total=True
    ),
    _Family("vllm:kv_cache_usage_perc", "Share of the KV cache that sequences hold, 0 to 1.", "kv_usage"),
    _Family("packtrain_waiting_tokens", "Prompt tokens of waiting sequences.", "num_waiting_tokens"),
    _Family("packtrain_estimated_wait_seconds", "Until all that waits now is admitted.", "estimated_wait_s"),
    _Family("vllm:prompt_tokens", "Prompt tokens of admitted sequences.", "num_prompt_tokens", is_total=True),
    _Family("vllm:generation_tokens", "Tokens generated.", "num_generation_tokens", is_total=True),
    _Family("vllm:num_preemptions", "Sequences preempted.", "num_preemptions", is_total=True),
    _Family("packtrain_pauses", "Times that a sequence was paused.", "num_pauses", is_total=True),
    _Family("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", "num_prefix_query_tokens", is_total=True),
    _Family("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", "num_prefix_hit_tokens", is_total=True),
    _Family("vllm:spec_decode_num_draft_tokens", "Tokens computed in case they come next.", "num_draft_tokens", is_total=True),
    _Family("vllm:spec_decode_num_accepted_tokens", "Of those, what did come next.", "num_accepted_tokens", is_total=True),
    _Family("vllm:corrupted_requests", "Sequences ended by numbers that are not finite.", "num_corrupted", is_total=True),
)  # fmt: skip


class GroupCollector(Collector):
    """Turns the latest reports into metric families when Prometheus asks."""

    def __init__(self, num_configured: Mapping[str, int], on_gone: Callable[[str, str], None]) -> None:
        """`num_configured` groups by model; `on_gone(model, engine)` is told of a group that is there no more."""
        self._num_configured = num_configured
        self._on_gone = on_gone
        self._reports: Mapping[str, Sequence[GroupReport]] = {}
        self._heard_of: set[tuple[str, str]] = set()
        self._last_seen: dict[tuple[str, str], tuple[float, bool]] = {}
        """When each group answered last, and whether it counted with this gateway then."""
        self._num_ended = dict.fromkeys(num_configured, 0)

    def heard_of(self, model: str, engine: str) -> None:
        """Series with this group's name are made, perhaps after it has gone: they go like those of one that has reported."""
        self._heard_of.add((model, engine))

    def take(self, reports: Mapping[str, Sequence[GroupReport]], now_s: float) -> None:
        """Show these reports from now on."""
        self._reports = reports
        for model, listed in reports.items():
            self._last_seen.update({(model, report.engine): (now_s, bool(report.stats)) for report in listed})
        self._last_seen = {group: (now_s, False) for group in self._heard_of} | self._last_seen
        self._heard_of.clear()
        for (model, engine), (seen_s, counted_here) in list(self._last_seen.items()):
            if now_s - seen_s > FORGET_AFTER_S:
                del self._last_seen[model, engine]
                if counted_here:
                    self._num_ended[model] += 1
                self._on_gone(model, engine)

    def fleet_models(self) -> dict[str, FleetModel]:
        """The models as their groups report them. Those that count with another gateway tell no numbers here."""
        return {
            model: FleetModel(
                mode="off",
                target=number,
                min_groups=number,
                max_groups=number,
                groups=tuple(_fleet_group(report) for report in self._reports.get(model, ())),
            )
            for model, number in self._num_configured.items()
        }

    def set_models(self, num_configured: Mapping[str, int]) -> None:
        """These models there are from now on, with so many groups each."""
        self._num_configured = dict(num_configured)
        self._num_ended = {**dict.fromkeys(num_configured, 0), **self._num_ended}

    def set_configured(self, num_groups: Mapping[str, int]) -> None:
        """So many groups there should be of these models from now on."""
        known = {model: number for model, number in num_groups.items() if model in self._num_configured}
        self._num_configured = {**self._num_configured, **known}

    def collect(self) -> Iterator[Metric]:
        """All families, also those that have no samples yet. Called from another thread."""
        counted = [(model, r) for model, listed in self._reports.items() for r in listed if r.stats]
        for family in _FAMILIES:
            kind = CounterMetricFamily if family.is_total else GaugeMetricFamily
            metric = kind(family.name, family.help, labels=_LABELS)
            for model, report in counted:
                metric.add_metric((model, report.engine), report.stats[family.stat])
            yield metric
        yield _iterations(counted)
        yield _cache_configs(counted)
        up = GaugeMetricFamily(
            "packtrain_group_up", "1 for a replica group that is well, 0 for a lost one.", labels=_LABELS
        )
        for model, report in counted:
            up.add_metric((model, report.engine), float(report.is_healthy))
        yield up
        configured = GaugeMetricFamily(
            "packtrain_groups_configured", "Replica groups that there should be.", labels=("model_name",)
        )
        ended = CounterMetricFamily(
            "packtrain_groups_ended",
            "Replica groups that have gone: lost, replaced or stopped.",
            labels=("model_name",),
        )
        for model, number in self._num_configured.items():
            configured.add_metric((model,), number)
        for model, number in self._num_ended.items():
            ended.add_metric((model,), number)
        yield configured
        yield ended


def _fleet_group(report: GroupReport) -> FleetGroup:
    stats = report.stats
    return FleetGroup(
        group=report.engine,
        state="running" if report.is_healthy else "lost",
        num_running=int(stats["num_running"]) if stats else None,
        num_waiting=int(stats["num_waiting"]) if stats else None,
        kv_usage=stats["kv_usage"] if stats else None,
    )


def _iterations(counted: Sequence[tuple[str, GroupReport]]) -> Metric:
    metric = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens of a step.", labels=_LABELS)
    bounds = [*map(floatToGoString, ITERATION_TOKENS_BUCKETS), "+Inf"]
    for model, report in counted:
        total = 0
        buckets = []
        for bound, count in zip(bounds, report.iteration_counts, strict=True):
            total += count
            buckets.append((bound, total))
        metric.add_metric((model, report.engine), buckets, report.num_iteration_tokens)
    return metric


def _cache_configs(counted: Sequence[tuple[str, GroupReport]]) -> Metric:
    names = ("block_size", "num_gpu_blocks", "enable_prefix_caching")  # vLLM's, whatever the device
    metric = GaugeMetricFamily("vllm:cache_config_info", "Layout of the KV cache.", labels=(*_LABELS, *names))
    for model, report in counted:
        metric.add_metric((model, report.engine, *(report.cache_config[name] for name in names)), 1)
    return metric
