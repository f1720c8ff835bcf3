"""Tenants never meet in the prefix cache: requests are told apart by their salts, whatever their tokens."""

from hypothesis import given
from hypothesis import strategies as st

from model_parallel.engine.request import EngineOutput
from tests.support.engine import Harness, make_request

Prompts = list[list[int]]
STEM = [n % 7 for n in range(40)]
PROMPTS = st.lists(
    st.builds(lambda length, tail: STEM[:length] + tail, st.integers(0, 40), st.lists(st.integers(0, 9), max_size=9)),
    min_size=1,
    max_size=5,
).map(lambda prompts: [prompt or [1] for prompt in prompts])


def run_all(harness: Harness, tenant: str, prompts: Prompts) -> list[list[EngineOutput]]:
    """One request after the other. The seeds are equal, so that the model gives equal prompts equal answers."""
    outputs = []
    for number, prompt in enumerate(prompts):
        request_id = f"{tenant}-{number}"
        harness.add(make_request(request_id, prompt, seed=1, tenant=tenant, salt=tenant.encode()))
        harness.run()
        outputs.append(harness.outputs.pop(request_id))
    return outputs


def without_names(outputs: list[list[EngineOutput]]) -> list[list[tuple[object, ...]]]:
    return [
        [(o.token_ids, o.finish_reason, o.num_cached_tokens, o.timings) for o in request_outputs]
        for request_outputs in outputs
    ]


@given(PROMPTS, PROMPTS)
def test_what_another_tenant_has_cached_changes_nothing_that_a_probe_can_see(secrets: Prompts, probes: Prompts) -> None:
    """Neither the answers, nor the hits reported, nor how much is computed for them, which is what can be timed."""
    alone, beside = Harness(num_blocks=256), Harness(num_blocks=256)
    run_all(beside, "victim", secrets)
    num_steps, before = len(beside.executor.plans), beside.engine.stats
    seen_alone, seen_beside = run_all(alone, "prober", probes), run_all(beside, "prober", probes)
    assert without_names(seen_alone) == without_names(seen_beside)
    work_alone = [[(row.start, row.num_tokens) for row in plan.rows] for plan in alone.executor.plans]
    work_beside = [[(row.start, row.num_tokens) for row in plan.rows] for plan in beside.executor.plans[num_steps:]]
    assert work_alone == work_beside
    hits = beside.engine.stats.num_prefix_hit_tokens - before.num_prefix_hit_tokens
    assert hits == alone.engine.stats.num_prefix_hit_tokens


def test_a_tenant_still_finds_its_own() -> None:
    harness = Harness(num_blocks=256)
    for tenant in ("one", "two"):
        outputs = run_all(harness, tenant, [STEM, STEM, STEM[:21]])
        assert [request_outputs[-1].num_cached_tokens for request_outputs in outputs] == [0, 36, 20]


def test_a_request_reports_its_own_hits_beside_others() -> None:
    """Both are admitted in the same step; one finds its prefix and the other has none to find."""
    harness = Harness(num_blocks=256)
    run_all(harness, "one", [STEM])
    for request_id, tenant in [("a1", "one"), ("b2", "two")]:
        harness.add(make_request(request_id, STEM, tenant=tenant, salt=tenant.encode()))
    harness.run()
    assert [harness.last(request_id).num_cached_tokens for request_id in ("a1", "b2")] == [36, 0]
