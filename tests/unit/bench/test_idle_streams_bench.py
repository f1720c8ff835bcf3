"""The arithmetic of `bench.idle_streams`."""

from collections import Counter
from typing import Any

from bench.idle_streams import decision, per_stream

KIB = 1024


def result(**changes: Any) -> dict[str, Any]:
    costs = {"grpc": {"gateway 0": 40.0 * KIB, "leader": 90.0 * KIB}, "http": {"gateway 0": 64.0 * KIB, "leader": 0.0}}
    found = {
        "num_streams": 10,
        "bytes_per_stream": costs,
        "ends": Counter({"open": 25, "OK": 1}),
        "active": {"codes": Counter({"OK": 3})},
    }
    return found | changes


def test_growth_is_divided_among_the_streams() -> None:
    assert per_stream({"gateway 0": 1000, "leader": 50}, {"gateway 0": 3000, "leader": 50}, 10) == {
        "gateway 0": 200.0,
        "leader": 0.0,
    }


def test_the_gateway_alone_is_bounded() -> None:
    assert decision(result())
    heavy = {"grpc": {"gateway 0": 65.0 * KIB, "leader": 0.0}, "http": {"gateway 0": 1.0, "leader": 0.0}}
    assert not decision(result(bytes_per_stream=heavy))


def test_nothing_may_be_lost_or_refused() -> None:
    assert not decision(result(ends=Counter({"open": 25, "UNAVAILABLE": 1})))
    assert not decision(result(ends=Counter({"open": 19, "OK": 6})))
    assert not decision(result(active={"codes": Counter({"OK": 3, "RESOURCE_EXHAUSTED": 1})}))
