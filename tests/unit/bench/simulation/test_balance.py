"""The index of loads picks what the rule of routing puts first."""

import random

from hypothesis import given
from hypothesis import strategies as st

from bench.simulation.balance import Balance
from serving.gateway.groups.loads import AVOIDED_S, GroupLoads, preference

ENGINES = [f"group-{number}" for number in range(6)]
actions = st.lists(
    st.tuples(
        st.sampled_from(["begin", "end", "prompt", "tell", "refuse", "send", "arrive", "remove", "add", "wait"]),
        st.sampled_from(ENGINES),
        st.integers(0, 5),
    ),
    max_size=60,
)


@given(actions, st.integers(0, 1000))
def test_it_chooses_by_the_rule(actions: list[tuple[str, str, int]], seed: int) -> None:
    now_s = 0.0
    loads = GroupLoads(lambda: now_s)
    balance = Balance(loads, random.Random(seed))
    on_their_way, prompts = dict.fromkeys(ENGINES, 0), dict.fromkeys(ENGINES, 0)
    serving = set(ENGINES[:4])
    for engine in serving:
        balance.add(engine)
    for action, engine, number in actions:
        match action:
            case "begin":
                loads.begin(engine, 1)
            case "end" if loads.of(engine) and engine in loads._own:
                loads.end(engine, 1)
            case "prompt":  # another one than before is to be computed
                loads.prompt_ends(engine, prompts[engine])
                prompts[engine] = number
                loads.prompt_begins(engine, number)
            case "tell":
                loads.tell(engine, number)
            case "refuse":
                loads.refused(engine)
            case "send":
                on_their_way[engine] += 1
            case "arrive" if on_their_way[engine]:
                on_their_way[engine] -= 1
            case "remove":
                balance.remove(engine)
                serving.discard(engine)
            case "add" if engine not in serving:
                balance.add(engine)
                serving.add(engine)
            case "wait":
                now_s += number * AVOIDED_S / 3
        balance.refresh(engine, on_their_way[engine])
        assert len(balance) == len(serving)
        chosen = balance.choose()
        if not serving:
            assert chosen is None
            continue
        assert chosen in serving
        first = min(preference(loads, name, on_their_way[name], 0.0) for name in serving)
        assert preference(loads, chosen, on_their_way[chosen], 0.0) == first


def test_ties_are_broken_at_random() -> None:
    balance = Balance(GroupLoads(lambda: 0.0), random.Random(1))
    for engine in ENGINES:
        balance.add(engine)
    assert {balance.choose() for _ in range(200)} == set(ENGINES)
