"""Processes of a served stack of two groups are killed and stopped at random while 16 streams run.

Each stream must bring what it brings alone, and every fault that was planned must have happened.
"""

import time

import pytest

from bench.chaos.campaign import Campaign, Plan
from bench.chaos.processes import LocalStack
from bench.chaos.proxy import Proxy
from bench.recovery import percentiles
from tests.support.stack import running_stack, stack_config

pytestmark = pytest.mark.timeout(7200)

NUM_GROUPS = 2
NUM_FAULTS = 20


@pytest.mark.nightly
@pytest.mark.parametrize("fault", ["kill", "stop", "short-stop", "slow", "partition"])
def test_no_token_is_lost_or_repeated(fault: str) -> None:
    def report(line: str) -> None:
        print(time.strftime("%H:%M:%S"), line, flush=True)

    plan = Plan(faults=(fault,), num_turns=NUM_FAULTS)
    with running_stack(stack_config(num_groups=NUM_GROUPS)) as app, Proxy("127.0.0.1", app.port) as proxy:
        outcome = Campaign(plan, LocalStack(app.port), proxy, report).run()
    print(f"pauses: {percentiles(outcome.pauses_s[fault])}")
    assert outcome.found == []
