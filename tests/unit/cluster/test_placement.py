"""Placement as tables: (nodes, groups) → bundles and strategy, or a refusal with both numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import GroupRequest, NodeResources, RankLocation, order_ranks, plan_groups
from model_parallel.errors import ConfigError


def cluster(*sizes: tuple[float, float]) -> list[NodeResources]:
    """Nodes of (CPUs, GPUs)."""
    return [
        NodeResources(node_id=f"node{i}", ip=f"10.0.0.{i}", num_cpus=cpus, num_gpus=gpus)
        for i, (cpus, gpus) in enumerate(sizes)
    ]


def request(tp_size: int, device: str = "cuda", cpus_per_rank: float = 1.0, name: str = "llama") -> GroupRequest:
    return GroupRequest(name=name, tp_size=tp_size, device=device, cpus_per_rank=cpus_per_rank)


@pytest.mark.parametrize(
    ("nodes", "group", "bundle", "strategy"),
    [
        (cluster((64, 8)), request(8), {"CPU": 1.0, "GPU": 1.0}, "STRICT_PACK"),
        (cluster((64, 8), (64, 8)), request(8), {"CPU": 1.0, "GPU": 1.0}, "STRICT_PACK"),
        (cluster((64, 8), (64, 8)), request(16), {"CPU": 1.0, "GPU": 1.0}, "PACK"),
        (cluster((64, 8), (64, 4)), request(12), {"CPU": 1.0, "GPU": 1.0}, "PACK"),
        (cluster((64, 8)), request(2, cpus_per_rank=0), {"GPU": 1.0}, "STRICT_PACK"),
        (cluster((4, 8), (4, 8)), request(8), {"CPU": 1.0, "GPU": 1.0}, "PACK"),  # CPUs are what a node lacks
        (cluster((2, 0)), request(2, "cpu"), {"CPU": 1.0}, "STRICT_PACK"),
        (cluster((1, 0), (1, 0)), request(2, "cpu"), {"CPU": 1.0}, "PACK"),
        (cluster((2, 0)), request(4, "cpu", 0.5), {"CPU": 0.5}, "STRICT_PACK"),
        (cluster((1, 0)), request(10, "cpu", 0.1), {"CPU": 0.1}, "STRICT_PACK"),
        (cluster((0, 0), (8, 0)), request(8, "cpu"), {"CPU": 1.0}, "STRICT_PACK"),
    ],
)
def test_group_that_fits(
    nodes: list[NodeResources], group: GroupRequest, bundle: dict[str, float], strategy: str
) -> None:
    (placement,) = plan_groups([group], nodes)
    assert placement.bundles == (bundle,) * group.tp_size
    assert placement.strategy == strategy


@pytest.mark.parametrize(
    ("nodes", "groups", "message"),
    [
        (cluster((64, 8)), [request(16)], r"llama: 16 ranks need .*16 GPUs; .*8 GPUs \(at most 8 a node\)"),
        (cluster((64, 4), (64, 2)), [request(8)], r"8 GPUs; .*6 GPUs \(at most 4 a node\), which is room for 6 ranks"),
        (cluster((2, 8)), [request(4)], r"4 CPUs and 4 GPUs; .*2 CPUs \(at most 2 a node\) .*room for 2 ranks"),
        (cluster((2, 0)), [request(3, "cpu")], r"need 3 CPUs; the cluster has 2 CPUs"),
        (cluster((2, 0)), [request(1)], "has 2 CPUs .* and 0 GPUs"),
        (cluster(), [request(1)], "0 GPUs"),
        (cluster((1.5, 0), (1.5, 0)), [request(3, "cpu")], "room for 2 ranks"),
        (cluster((2, 0)), [request(2, "cpu", 0)], "cpus_per_rank is 0"),
        (cluster((2, 0)), [request(2, "cpu"), request(1, "cpu", name="other")], "need 3 CPUs .* has 2 in total"),
        (cluster((64, 8), (64, 8)), [request(5)] * 3, "3 groups of 5 ranks, each on one node, .* has room for 2"),
        (cluster((64, 3), (64, 3)), [request(2)] * 3, "3 groups of 2 ranks, each on one node, .* has room for 2"),
        (cluster((64, 8)), [request(4), request(4), request(1, name="b")], "need 9 GPUs .* has 8"),
    ],
)
def test_group_that_can_never_fit_is_refused_with_both_numbers(
    nodes: list[NodeResources], groups: list[GroupRequest], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_groups(groups, nodes)


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["cpu", "cuda"])), min_size=1, max_size=3),
)
def test_nothing_that_fits_is_refused(sizes: list[tuple[int, int]], wanted: list[tuple[int, str]]) -> None:
    """Against a search of every assignment: ranks of packed groups together on one node, others anywhere."""
    nodes, groups = cluster(*sizes), [request(tp, device) for tp, device in wanted]
    if _can_be_placed(sizes, wanted):
        assert len(plan_groups(groups, nodes)) == len(groups)


def _can_be_placed(sizes: list[tuple[int, int]], wanted: list[tuple[int, str]]) -> bool:
    def capacity(size: tuple[int, int], device: str) -> int:
        return min(size) if device == "cuda" else size[0]

    def place(free: list[tuple[int, int]], index: int) -> bool:
        if index == len(wanted):
            return True
        tp, device = wanted[index]
        one_node = tp <= max(capacity(size, device) for size in sizes)
        return any(place(left, index + 1) for left in splits(free, tp, device, one_node))

    def splits(free: list[tuple[int, int]], tp: int, device: str, one_node: bool) -> list[list[tuple[int, int]]]:
        if not free:
            return [[]] if tp == 0 else []
        found = []
        choices = {0, tp} if one_node else set(range(tp + 1))
        for here in choices:
            if here <= capacity(free[0], device) and here <= tp:
                left = (free[0][0] - here, free[0][1] - (here if device == "cuda" else 0))
                found += [[left, *rest] for rest in splits(free[1:], tp - here, device, one_node)]
        return found

    return place(list(sizes), 0)


def at(bundle: int, node_id: str, *gpu_ids: int) -> RankLocation:
    return RankLocation(bundle=bundle, node_id=node_id, ip="", pid=bundle, gpu_ids=gpu_ids)


@pytest.mark.parametrize(
    ("locations", "leader", "bundles_by_rank"),
    [
        ([at(0, "a", 3), at(1, "a", 1), at(2, "a", 2)], "a", [1, 2, 0]),
        ([at(0, "a", 0), at(1, "b", 0), at(2, "a", 1), at(3, "b", 1)], "b", [1, 3, 0, 2]),
        ([at(0, "c", 10), at(1, "b", 2), at(2, "a", 0), at(3, "c", 9)], "c", [3, 0, 2, 1]),
        ([at(0, "a"), at(1, "b"), at(2, "a")], "a", [0, 2, 1]),  # no devices: in the order of bundles
    ],
)
def test_ranks_go_by_node_then_device_from_the_leaders_node(
    locations: list[RankLocation], leader: str, bundles_by_rank: list[int]
) -> None:
    assert [location.bundle for location in order_ranks(locations, leader)] == bundles_by_rank
