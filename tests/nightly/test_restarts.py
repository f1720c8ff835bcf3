"""Groups are replaced again and again under load, with faults in between: no request notices."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from serving.client.client import Client
from serving.config import parse_config
from serving.contracts.errors import ChangeError
from serving.contracts.operations import Progress
from serving.driver.app import RunningApp
from tests.support.operations import Load, ask, entry, groups, names
from tests.support.small_llama import save_small_llama
from tests.support.stack import group_handle, running_stack
from tests.support.waiting import PATIENCE_S

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(7200)]

MODEL = "m"
NUM_RESTARTS = 50
NUM_CLIENTS = 4


@pytest.fixture
def app(tmp_path: Path) -> Iterator[RunningApp]:
    """Groups that drain have half a second, so that many answers move."""
    data = {
        "models": [entry(MODEL, save_small_llama(tmp_path / "tiny"), num_groups=2)],
        "gateway": {"port": 0, "http_port": 0, "drain_timeout_s": 0.5},
        "admin": {"metrics_port": 0, "port": 0},
    }
    with running_stack(parse_config(data, origin="test")) as app:
        yield app


def ignore(progress: Progress) -> None: ...


def test_restarts_under_load_lose_no_request(app: RunningApp) -> None:
    with Client(app.address) as client:
        alone = {seed: ask(client, MODEL, seed) for seed in range(NUM_CLIENTS)}
    load = Load(app.address, MODEL, NUM_CLIENTS)
    try:
        for _ in range(NUM_RESTARTS):
            before = groups(MODEL)
            app.operations.restart(MODEL, 1, ignore)
            assert len(groups(MODEL)) == 2
            assert not set(groups(MODEL)) & set(before)
    finally:
        load.end()
    print(f"{NUM_RESTARTS} restarts of 2 groups, {load.num_answers} answers, none failed")
    assert load.answers == {seed: {tokens} for seed, tokens in alone.items()}


def test_a_controller_and_a_leader_that_are_killed_in_the_middle(app: RunningApp) -> None:
    with Client(app.address) as client:
        alone = {seed: ask(client, MODEL, seed) for seed in range(NUM_CLIENTS)}
    load = Load(app.address, MODEL, NUM_CLIENTS)
    begun = 0

    def kill(progress: Progress) -> None:
        """The controller at the first group that is replaced, a leader at the second change."""
        nonlocal begun
        if progress.stage != "replacing" or progress.num_done != 1:
            return
        begun += 1
        if begun == 1:
            controller = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
            os.kill(int(ray.get(controller.get_pid.remote(), timeout=PATIENCE_S)), signal.SIGKILL)

    try:
        app.operations.restart(MODEL, 1, kill)
        assert begun
        assert len(groups(MODEL)) == 2
        pids = group_handle(MODEL).broadcast("pids").results(timeout_s=PATIENCE_S)  # type: ignore[attr-defined]
        os.kill(pids[0][0], signal.SIGKILL)
        try:
            app.operations.restart(MODEL, 1, ignore)
        except ChangeError as error:  # the group that was killed may count as one of the new ones that did not start
            print(error)
            app.operations.restart(MODEL, 1, ignore)
        assert len(groups(MODEL)) == 2
    finally:
        load.end()
    assert load.answers == {seed: {tokens} for seed, tokens in alone.items()}


def test_a_change_that_passes_the_checks_and_does_not_start_is_taken_back(app: RunningApp, tmp_path: Path) -> None:
    with Client(app.address) as client:
        alone = {seed: ask(client, MODEL, seed) for seed in range(NUM_CLIENTS)}
    load = Load(app.address, MODEL, NUM_CLIENTS)
    try:
        before = groups(MODEL)
        bad = json.dumps(entry(MODEL, tmp_path, num_groups=2, start_timeout_s=0.01))
        with pytest.raises(ChangeError, match="served as before"):
            app.operations.deploy(bad, 1, ignore, only_check=False)
        assert len(groups(MODEL)) == 2
        assert set(groups(MODEL)) & set(before), "the group that was left has stayed"
        (status,) = app.operations.status()
        assert (status.state, "start_timeout_s" in status.config) == ("serving", False)
        with pytest.raises(ChangeError, match="was not deployed"):
            app.operations.deploy(
                json.dumps(entry("other", tmp_path, start_timeout_s=0.01)), 1, ignore, only_check=False
            )
        assert names(app)[0] == [MODEL]
        app.operations.restart(MODEL, 1, ignore)
    finally:
        load.end()
    assert load.answers == {seed: {tokens} for seed, tokens in alone.items()}
