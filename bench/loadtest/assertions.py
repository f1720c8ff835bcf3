"""What a run must keep, as written on the command line: `ttft_p99<500ms`, `small:tpot_median<=40ms`, `errors==0`."""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.loadtest.scenario import Scenario
from bench.loadtest.summary import MEASURES
from model_parallel.errors import ConfigError

_FORM = re.compile(
    r"\s*(?:(?P<tenant>[A-Za-z0-9][\w.-]*):)?(?P<name>[a-z]\w*(?:\.\d+)?)\s*(?P<operator><=|>=|==|<|>)\s*"
    r"(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)\s*(?P<unit>ms|s|%|)\s*"
)
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt
}  # fmt: skip
_LATENCY = re.compile(
    rf"(?P<measure>{'|'.join(MEASURES)})_(?P<what>mean|median|std|min|max|p(?P<percent>\d+(?:\.\d+)?))"
)
COUNTS = ("sent", "completed", "refused", "errors", "cancelled", "failed", "retries", "short_answers")
RATES = (
    "request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "duration", "goodput_share",
    "max_concurrent_requests",
)  # fmt: skip
SHARES = {"error_rate": "errors", "refusal_rate": "refused"}
OF_LOST = ("completed", "refused", "errors", "cancelled", "failed", *SHARES, "goodput_share")
"""What bounds the requests that are not answered."""
OF_SLO = ("request_goodput", "goodput_share")
STREAMED = ("ttft", "tpot", "itl")
OF_THE_RUN = ("jain_index", "max_service_gap")


@dataclass(frozen=True, kw_only=True, slots=True)
class Assertion:
    """One bound."""

    text: str
    tenant: str | None
    name: str
    key: str
    """Of the result."""
    measure: str | None
    """Of a latency."""
    percent: float | None
    """The percentile that must be there."""
    comparison: str
    bound: float
    """In the result's unit."""

    def check(self, result: Mapping[str, Any]) -> "Checked":
        """Of a run's summary, or that of several. What was not measured, be it in one of them, keeps no bound."""
        check_tenants([self], list(result["tenants"]))
        value = self._value(result)
        runs = result.get("runs", ())
        unmeasured = [number for number, run in enumerate(runs, 1) if self._value(run) is None]
        holds = value is not None and not unmeasured and _OPERATORS[self.comparison](value, self.bound)
        return Checked(assertion=self, value=value, unmeasured_runs=unmeasured, holds=holds)

    def _value(self, result: Mapping[str, Any]) -> float | None:
        found = result if self.tenant is None else result["tenants"][self.tenant]
        if self.measure is not None and not found[f"num_{self.measure}"]:
            return None
        if self.name in SHARES:
            return found[self.key] / found["sent"] if found["sent"] else None
        value = found[self.key]
        return None if value is None else float(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """How an assertion came out."""

    assertion: Assertion
    value: float | None
    unmeasured_runs: Sequence[int]
    """Of several runs the numbers of those that measured nothing of it."""
    holds: bool

    def __str__(self) -> str:
        measured = "nothing was measured" if self.value is None else f"it is {self.value:.6g}"
        if self.value is not None and self.unmeasured_runs:
            measured += f", and nothing was measured in run {', '.join(map(str, self.unmeasured_runs))}"
        return f"{self.assertion.text}: {'holds' if self.holds else 'does not hold'}, {measured}"


def parse_assertion(text: str, option: str = "--assert") -> Assertion:
    """Raises ConfigError that says what may stand where."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise ConfigError(f"{option} {text!r} must be like ttft_p99<500ms, small:tpot_median<=40ms or error_rate<1%")
    name, unit, number = match["name"], match["unit"], float(match["number"])
    latency = _LATENCY.fullmatch(name)
    if latency is None and match["tenant"] and name in OF_THE_RUN:
        raise ConfigError(f"{option} {text!r}: {name} is of the whole run, not of a tenant")
    known = (*COUNTS, *RATES, *SHARES, *OF_THE_RUN)
    if latency is None and name not in known:
        raise ConfigError(
            f"{option} {text!r}: {name!r} is not known; known are {', '.join(known)} and latencies such as ttft_p99, "
            "tpot_median, itl_mean, e2el_max"
        )
    allowed = ("", "ms", "s") if latency else ("", "%") if name in SHARES or name == "goodput_share" else ("", "s")
    if unit not in allowed or (unit == "s" and latency is None and name != "duration"):
        raise ConfigError(f"{option} {text!r}: {name} is not measured in {unit}")
    percent = float(latency["percent"]) if latency and latency["percent"] else None
    if percent is not None and not 0 < percent <= 100:
        raise ConfigError(f"{option} {text!r}: a percentile is above 0 and at most 100")
    what = f"p{percent:g}" if percent is not None else latency["what"] if latency else ""
    bound = number * {"s": 1e3 if latency else 1.0, "%": 0.01}.get(unit, 1.0)
    if not math.isfinite(bound):
        raise ConfigError(f"{option} {text!r}: the bound {match['number']} is too large to be a number")
    if "%" in allowed and bound > 1:
        meant = (
            "it must be at most 100%"
            if unit
            else f"{match['number']} is more than all; if it is per cent, write {match['number']}%"
        )
        raise ConfigError(f"{option} {text!r}: {name} is a share, at most 1; {meant}")
    return Assertion(
        text=text.strip(),
        tenant=match["tenant"],
        name=name,
        key=f"{what}_{latency['measure']}_ms" if latency else SHARES.get(name, name),
        measure=latency["measure"] if latency else None,
        percent=percent,
        comparison=match["operator"],
        bound=bound,
    )


def check_tenants(assertions: Sequence[Assertion], names: Sequence[str]) -> None:
    """Raises ConfigError where one is of a tenant that the run does not have."""
    for assertion in assertions:
        if assertion.tenant is not None and assertion.tenant not in names:
            known = ", ".join(names)
            raise ConfigError(f"{assertion.text!r}: there is no tenant {assertion.tenant!r}; there are {known}")


def check_measured(assertions: Sequence[Assertion], scenario: Scenario) -> None:
    """Raises ConfigError where no request of the scenario measures what one is about, so that it could never hold."""
    for assertion in assertions:
        tenants = [each for each in scenario.tenants if assertion.tenant in (None, each.name)]
        if assertion.measure in STREAMED and not any(tenant.is_streamed for tenant in tenants):
            raise ConfigError(
                f"{assertion.text!r}: {assertion.measure} is measured of streamed answers, and none is streamed"
            )
        if assertion.name in OF_SLO and not any(tenant.slo.bounds_s for tenant in tenants):
            raise ConfigError(f"{assertion.text!r}: there is no SLO; --goodput, or slo of a tenant, says what is good")
        if assertion.name == "max_service_gap" and len(tenants) < 2:
            raise ConfigError(f"{assertion.text!r}: it is between tenants, and there is one")


def percentiles_needed(assertions: Sequence[Assertion]) -> list[float]:
    return [assertion.percent for assertion in assertions if assertion.percent is not None]
