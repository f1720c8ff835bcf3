"""The measurements of `bench` on the served stack, shorter, with the same decisions."""

import pytest

from bench import fairness, idle_streams, overload
from tests.support.stack import running_stack

pytestmark = pytest.mark.timeout(600)


def report(line: str) -> None:
    print(line)  # pytest shows it with a failure


@pytest.mark.nightly
def test_ten_times_too_much() -> None:
    with running_stack(overload.configuration(tp_size=1)) as app:
        result = overload.measure(app.address, seconds=20, times=10, report=report)
    result["holds"] = overload.decisions(result)
    assert all(result["holds"].values()), "\n".join(overload.describe(result))


@pytest.mark.nightly
def test_a_small_tenant_beside_a_large_one() -> None:
    """As long as by hand: with fewer requests the p99 is the slowest of all."""
    with (
        fairness.tenants_database() as (url, credentials),
        running_stack(fairness.configuration(url, tp_size=1)) as app,
    ):
        result = fairness.measure(app.address, credentials, rate=2, times=100, seconds=150, report=report)
    assert result["holds"], "\n".join(fairness.describe(result))


@pytest.mark.nightly
def test_idle_streams_are_held() -> None:
    num_streams = 500
    with (
        fairness.tenants_database() as (url, credentials),
        running_stack(idle_streams.configuration(url, 2 * (num_streams + idle_streams.NUM_FIRST))) as app,
    ):
        addresses = {"grpc": app.address, "http": f"{app.host}:{app.http_port}"}
        result = idle_streams.measure(addresses, credentials, num_streams, report)
    assert idle_streams.decision(result), result
