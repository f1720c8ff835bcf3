"""Which groups end when there are to be fewer."""

import msgspec

from cluster.policy import GroupObservation
from cluster.policy.victims import choose_victims
from tests.support.policy_worlds import draining, running, starting

NOW_S = 1000.0


def order(*groups: GroupObservation) -> str:
    """Names, the first one to end before others."""
    return "".join(choose_victims(groups, len(groups)))


def on_node_with(group: GroupObservation, num_beside: int) -> GroupObservation:
    return msgspec.structs.replace(group, num_beside=num_beside)


def test_an_idle_group_goes_before_the_only_one_with_a_stream() -> None:
    stream = running("a", NOW_S, num_running=1, kv_usage=0.01)
    assert order(stream, running("b", NOW_S)) == "ba"
    # What an idle group's cache holds is nobody's.
    assert order(stream, running("b", NOW_S, kv_usage=0.9)) == "ba"


def test_that_with_the_fewest_tokens_to_compute_again_goes_first() -> None:
    long_one = running("a", NOW_S, num_running=1, kv_usage=0.5)
    short_ones = running("b", NOW_S, num_running=8, kv_usage=0.1)
    prompts_wait = running("c", NOW_S, num_running=1, num_waiting=1, kv_usage=0.1, num_waiting_tokens=4000)
    assert order(long_one, short_ones, prompts_wait) == "bca"


def test_who_starts_goes_first_and_who_is_silent_last() -> None:
    silent = msgspec.structs.replace(running("s", NOW_S), load=None)
    groups = (silent, running("r", NOW_S), starting("o", 900.0), starting("y", 990.0), draining("d", 980.0))
    assert order(*groups) == "yors"


def test_of_equals_the_one_that_frees_a_node_goes() -> None:
    groups = [on_node_with(running(name, NOW_S), beside) for name, beside in (("a", 2), ("b", 0), ("c", 1))]
    assert order(*groups) == "bca"


def test_none_when_none_is_too_many() -> None:
    assert choose_victims([running("a", NOW_S)], 0) == choose_victims([running("a", NOW_S)], -1) == ()
