"""What a gateway counts for each group, and the order in which its router tries them."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.request_router import ReplicaID

from serving.gateway.groups import router as routing
from serving.gateway.groups.loads import AVOIDED_S, PROMPT_TOKENS_A_SEQUENCE, GroupLoads, prompt_load
from serving.gateway.groups.router import LeastLoadedRouter


def _group(name: str) -> Any:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))


def _router(on_their_way: dict[str, int]) -> LeastLoadedRouter:
    class Router(LeastLoadedRouter):
        def __init__(self) -> None:
            """Without Serve's own state."""

        @property
        def replica_queue_len_cache(self) -> Any:
            def get(replica_id: ReplicaID) -> int | None:
                return on_their_way.get(replica_id.unique_id)

            return SimpleNamespace(get=get)

    return Router()


async def _order(router: LeastLoadedRouter, *names: str) -> list[str]:
    ranks = await router.choose_replicas([_group(name) for name in names])
    assert all(len(rank) == 1 for rank in ranks)
    return [rank[0].replica_id.unique_id for rank in ranks]


async def test_the_least_loaded_comes_first_and_all_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = GroupLoads()
    monkeypatch.setattr(routing, "loads_of_this_process", lambda: loads)
    router = _router({"a": 1, "c": 2})
    loads.begin("a", 3)
    loads.tell("b", 9)
    loads.tell("c", 1)
    assert await _order(router, "a", "b", "c", "new") == ["new", "c", "a", "b"]
    loads.end("a", 3)
    assert await _order(router, "b", "c", "a") == ["a", "c", "b"]
    loads.forget("b")
    assert await _order(router, "c", "a", "b") == ["b", "a", "c"]


async def test_prompts_that_are_not_computed_yet_count_by_their_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group with a long prompt to compute comes after one with more sequences that decode."""
    loads = GroupLoads()
    monkeypatch.setattr(routing, "loads_of_this_process", lambda: loads)
    loads.begin("a", 1)
    loads.begin("b", 4)
    assert await _order(_router({}), "a", "b") == ["a", "b"]
    long = prompt_load(4 * PROMPT_TOKENS_A_SEQUENCE)
    loads.prompt_begins("a", long)
    assert (loads.of("a"), loads.load("a")) == (1, 5)
    assert await _order(_router({}), "a", "b") == ["b", "a"]
    loads.prompt_ends("a", long)
    assert await _order(_router({}), "a", "b") == ["a", "b"]
    assert prompt_load(PROMPT_TOKENS_A_SEQUENCE - 1) == 0
    assert not loads._prompts


async def test_who_has_just_refused_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    loads = GroupLoads(lambda: now_s)
    monkeypatch.setattr(routing, "loads_of_this_process", lambda: loads)
    loads.begin("b", 5)
    loads.begin("c", 3)
    loads.refused("a")
    assert await _order(_router({}), "a", "b", "c") == ["c", "b", "a"]
    now_s += AVOIDED_S / 2
    loads.refused("c")
    assert await _order(_router({}), "a", "b", "c") == ["b", "a", "c"]
    now_s += AVOIDED_S / 2
    assert await _order(_router({}), "a", "b", "c") == ["a", "b", "c"]
    now_s += AVOIDED_S
    loads.refused("d")
    assert list(loads._avoided_until_s) == ["d"], "what is long ago is forgotten"


async def test_equals_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "loads_of_this_process", GroupLoads)
    first = Counter([(await _order(_router({}), "a", "b"))[0] for _ in range(200)])
    assert min(first["a"], first["b"]) > 50


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 9)), max_size=20), st.data())
def test_what_has_ended_is_counted_no_more(begun: list[tuple[str, int]], data: st.DataObject) -> None:
    loads = GroupLoads()
    for engine, num_sequences in begun:
        loads.begin(engine, num_sequences)
    for index, (engine, num_sequences) in enumerate(order := data.draw(st.permutations(begun))):
        assert loads.of(engine) == sum(count for name, count in order[index:] if name == engine)
        loads.end(engine, num_sequences)
    assert (loads.of("a"), loads.of("b"), len(loads._own)) == (0, 0, 0)
