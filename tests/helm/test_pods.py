"""What the chart renders for CPUs, really started: see tests/support/pod_scenario.py for what happens, and in which order."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.support.helm import CI_VALUES, ROOT, missing
from tests.support.pods import Facts

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]  # four Ray nodes on two cores take minutes

MINIMAL = next(path for path in CI_VALUES if path.name.startswith("minimal"))
POD_GRACE_S = 90
ALL_PODS = {"head", "gateways-0", "workers-0", "driver"}
_SANDBOX = ("unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """What the scenario saw. Needs root and Linux' namespaces: pods get networks, mounts and users of their own."""
    tools = ("unshare", "nsenter", "setpriv", "ip")
    if os.geteuid() != 0 or any(shutil.which(tool) is None for tool in tools):
        missing(f"pods are started as root with {', '.join(tools)}")
    if subprocess.run([*_SANDBOX, "true"], capture_output=True, timeout=60, check=False).returncode:
        missing("this machine's kernel allows no namespaces")
    result = tmp_path_factory.mktemp("pods") / "facts.json"
    command = [*_SANDBOX, sys.executable, "-m", "tests.support.pod_scenario", str(MINIMAL), str(result)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1700, check=False)
    found: Facts = json.loads(result.read_text()) if result.exists() else {"failed": done.stderr[-3000:]}
    if "failed" in found:
        pytest.fail(f"{found.pop('failed')}\n{json.dumps(found, indent=1)}")
    return found


def test_a_gateway_is_alive_before_it_is_ready(facts: Facts) -> None:
    assert facts["early"] == {
        "ray-worker/startupProbe": True,
        "ray-worker/livenessProbe": True,
        "ray-worker/readinessProbe": False,
    }


def test_every_probe_answers_when_it_serves(facts: Facts) -> None:
    assert set(facts["ready"]) == ALL_PODS
    assert [
        f"{pod}: {probe}" for pod, probes in facts["ready"].items() for probe, well in probes.items() if not well
    ] == []
    assert all(facts["ready"].values())


def test_requests_need_a_key(facts: Facts) -> None:
    assert facts["key"] is True
    assert (facts["with key"], facts["without key"]) == ("OK", "UNAUTHENTICATED")


def test_gateways_and_groups_lie_where_they_belong(facts: Facts) -> None:
    assert facts["where replicas are"] == {"head": 0, "gateways-0": 1, "workers-0": 1, "driver": 0}


def test_containers_have_no_rights(facts: Facts) -> None:
    assert facts["users"] == ["10001", "CapBnd:", "0000000000000000", "NoNewPrivs:", "1"]
    assert facts["read-only"] != 0


def test_ray_is_closed(facts: Facts) -> None:
    assert facts["dashboard from elsewhere"] != 0
    assert facts["the right token"] == 0
    assert facts["a wrong token"] != 0


def test_a_drivers_restart_is_not_noticed(facts: Facts) -> None:
    assert facts["left of the driver"] == []
    assert facts["driver ended after"] < POD_GRACE_S
    assert facts["stream beside a driver's restart"] == "OK"
    assert facts["replicas stayed"]
    assert "taking over what is deployed already" in facts["driver's log"]


def test_the_head_may_be_lost(facts: Facts) -> None:
    assert facts["without a head"] == "OK"
    assert facts["stream beside the head's loss"] == "OK"
    assert facts["replicas outlived the head"]
    assert facts["after the head's loss"] == "OK"


def test_pods_drain_within_their_grace_and_leave_nothing(facts: Facts) -> None:
    assert facts["a stream was open then"]
    assert facts["stream while ending"] == "OK"
    assert facts["new request while ending"] == "UNAVAILABLE"
    assert all(seconds < POD_GRACE_S for seconds in facts["seconds to end"].values())
    assert facts["left"] == {}
