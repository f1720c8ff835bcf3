"""The rules of the queue, on sequences that nobody runs. tests/unit/engine/test_fairness.py has them at work."""

from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.engine.fair_queue import MAX_IDLE_TENANTS, FairQueue
from model_parallel.engine.kv_blocks import BlockTable
from model_parallel.engine.request import EngineRequest, SamplingParams
from model_parallel.engine.sequence import Sequence


class Line:
    """A queue, and sequences named by their order."""

    def __init__(self, burst: float = 0.0) -> None:
        self.queue = FairQueue(burst)
        self._numbers = count(1)

    def add(self, tenant: str, num_tokens: int, *, weight: float = 1.0, priority: int = 0) -> Sequence:
        sequence = make_sequence(next(self._numbers), tenant, num_tokens, weight=weight, priority=priority)
        self.queue.add(sequence)
        return sequence

    def serve(self, num_output: int = 0) -> Sequence:
        """Admit the next one, give it its output, and let it end."""
        sequence = self.admit()
        for _ in range(num_output):
            self.queue.charge_output(sequence)
        self.queue.leave(sequence)
        return sequence

    def admit(self) -> Sequence:
        sequence = self.queue.first()
        assert sequence is not None
        self.queue.admit(sequence, sequence.num_prompt_tokens)
        return sequence

    def order(self) -> str:
        """Tenants of all that waits, as it is served."""
        return "".join(self.serve().request.tenant for _ in range(len(self.queue)))


def make_sequence(number: int, tenant: str, num_tokens: int, *, weight: float, priority: int) -> Sequence:
    request = EngineRequest(
        request_id=str(number),
        prompt_token_ids=(0,) * num_tokens,
        sampling=SamplingParams(),
        tenant=tenant,
        weight=weight,
        priority=priority,
    )
    return Sequence(seq_id=number, request=request, table=BlockTable([]), accepted_s=0.0)


def test_the_tenant_that_got_least_is_next_and_inside_a_tenant_the_oldest() -> None:
    line = Line()
    for tenant, num_tokens in [("a", 30), ("a", 10), ("a", 10), ("b", 10), ("b", 10), ("b", 30)]:
        line.add(tenant, num_tokens)
    served = [line.serve() for _ in range(6)]
    assert [sequence.seq_id for sequence in served] == [1, 4, 5, 6, 2, 3]


def test_a_generated_token_costs_two() -> None:
    line = Line()
    for tenant in "aabbbb":
        line.add(tenant, 10)
    assert line.serve(num_output=10).request.tenant == "a"
    assert line.order() == "bbbab"


def test_shares_go_by_weight() -> None:
    line = Line()
    for _ in range(6):
        line.add("a", 10, weight=1.0)
        line.add("b", 10, weight=2.0)
    assert line.order() == "abbabbabbaaa"


def test_classes_come_strictly_one_after_the_other() -> None:
    line = Line()
    for tenant, priority in [("a", 1), ("b", 2), ("b", 0), ("a", 1), ("c", 0), ("c", -5)]:
        line.add(tenant, 10, priority=priority)
    assert [line.serve().request.priority for _ in range(6)] == [-5, 0, 0, 1, 1, 2]


def test_absence_gives_no_credit() -> None:
    line = Line()
    for _ in range(30):
        line.add("a", 10)
    for _ in range(10):
        line.serve()
    for _ in range(10):
        line.add("b", 10)
    assert line.order() == "ab" * 10 + "a" * 10


def test_who_comes_when_nobody_waits_begins_where_the_last_one_stopped() -> None:
    line = Line()
    line.add("a", 100)
    running = line.admit()
    for _ in range(5):
        line.queue.charge_output(running)
    for _ in range(3):
        line.add("b", 10)
    line.add("a", 10)
    # Both stand at 110.
    assert line.order() == "babb"


def test_a_preempted_sequence_is_the_next_of_its_tenant() -> None:
    line = Line()
    first, second, _ = (line.add("a", 10) for _ in range(3))
    assert [line.admit(), line.admit()] == [first, second]
    line.queue.put_back(second)
    line.queue.put_back(first)
    assert [sequence.seq_id for sequence in line.queue] == [1, 2, 3]
    line.queue.check_integrity()
    assert line.queue.first() is first
    line.queue.admit(first, 0)
    assert line.queue.tenant_of(first.request).counter == 20


def test_who_asks_for_little_is_light_until_it_has_used_its_burst() -> None:
    line = Line(burst=25)
    for _ in range(20):
        line.add("a", 10)
    for _ in range(10):
        assert not line.queue.is_below_fair_share(line.serve())
    for _ in range(5):
        line.add("b", 10)
    served = [line.admit() for _ in range(8)]
    assert "".join(sequence.request.tenant for sequence in served) == "bbbababa"
    assert [sequence.is_below_fair_share for sequence in served] == [True] * 3 + [False] * 5


def test_who_uses_its_share_is_never_light() -> None:
    """Alone, or coming back before the others had as much."""
    line = Line(burst=25)
    for _ in range(5):
        line.add("a", 10)
        assert not line.queue.is_below_fair_share(line.serve())
    for _ in range(20):
        line.add("a", 10)
    lights = []
    for _ in range(6):
        line.add("b", 50)
        while (served := line.admit()).request.tenant == "a":
            line.queue.leave(served)
        lights.append(served.is_below_fair_share)
        line.queue.leave(served)
        if not any(sequence.request.tenant == "a" for sequence in line.queue):
            line.add("a", 10)
    assert lights == [True] + [False] * 5


def test_tokens_ahead_in_fair_order() -> None:
    line = Line()
    for _ in range(9):
        line.add("a", 10)
    line.add("b", 10)
    line.add("c", 7, priority=-1)
    line.serve()  # c
    line.serve()  # a, which is 10 ahead of b now

    def ahead(tenant: str, priority: int = 0) -> float:
        request = make_sequence(99, tenant, 10, weight=1.0, priority=priority).request
        return line.queue.num_tokens_ahead(request)

    assert ahead("a") == 80 + 10
    assert ahead("b") == 10 + 0
    assert ahead("new") == 0
    assert ahead("new", priority=1) == 90
    assert ahead("new", priority=-1) == 0
    line.add("b", 30)
    assert ahead("b") == 40 + 30


def test_idle_tenants_are_forgotten_without_gain() -> None:
    line = Line()
    line.add("z", 10)  # waits all the time, so that the floor stays at 0
    tenants = [f"t{number}" for number in range(3 * MAX_IDLE_TENANTS)]
    for tenant in tenants:
        sequence = line.add(tenant, 10)
        line.queue.admit(sequence, 10)
        line.queue.leave(sequence)
    assert len(line.queue._classes[0].tenants) <= MAX_IDLE_TENANTS + 1
    assert min(line.queue.tenant_of(line.add(tenant, 10).request).counter for tenant in tenants) >= 10
    line.queue.check_integrity()


Act = tuple[str, int, int, int]
ACTS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "admit", "admit", "output", "put back", "leave"]),
        st.integers(0, 3),
        st.integers(1, 60),
        st.integers(0, 1),
    ),
    max_size=80,
)


@given(ACTS, st.sampled_from([0.0, 40.0]))
def test_whatever_happens(acts: list[Act], burst: float) -> None:
    """The queue stays sound, floors never fall, and nobody who waits is further below the floor than a burst."""
    line = Line(burst)
    running: list[Sequence] = []
    weights = [0.5, 1.0, 1.0, 3.0]

    def pick(number: int) -> Sequence:
        return running.pop(number % len(running))

    steps: dict[str, Callable[[int, int, int], object]] = {
        "add": lambda who, size, priority: line.add("abcd"[who], size, weight=weights[who], priority=priority),
        "admit": lambda who, size, priority: running.append(line.admit()) if len(line.queue) else None,
        "output": lambda who, size, priority: line.queue.charge_output(running[size % len(running)]),
        # Of a tenant in a class, the one admitted last.
        "put back": lambda who, size, priority: line.queue.put_back(running.pop()),
        "leave": lambda who, size, priority: line.queue.leave(pick(size)),
    }
    floors = {0: 0.0, 1: 0.0}
    for act, *arguments in acts:
        if act in ("add", "admit") or running:
            steps[act](*arguments)
        line.queue.check_integrity()
        for priority, counters in line.queue._classes.items():
            assert counters._floor >= floors[priority]
            floors[priority] = counters._floor
            for tenant in counters.waiting.values():
                assert tenant.counter >= counters._floor - burst / tenant.weight - 1e-9
    for sequence in running:
        line.queue.leave(sequence)
    served = [line.serve() for _ in range(len(line.queue))]
    assert len(line.queue) == line.queue.num_tokens == 0
    for tenant in "abcd":
        for priority in (0, 1):
            mine = [s.seq_id for s in served if (s.request.tenant, s.request.priority) == (tenant, priority)]
            assert mine == sorted(mine)


def served_until(line: Line, tenant: str, others: str) -> int:
    """Requests of the other one, who always has more, until the next of the tenant."""
    for num_others in range(100_000):
        if line.serve(num_output=100).request.tenant == tenant:
            return num_others
        line.add(others, 200)
    raise AssertionError("it starves")


def test_a_tenant_that_gets_more_weight_does_not_pay_at_the_old_price() -> None:
    """What it is ahead of the others stays as many tokens: 700, which are two or three requests of theirs."""
    line = Line(burst=2048)
    for _ in range(20):
        line.add("b", 200)
        line.add("a", 500, weight=0.001)
    served_until(line, "a", "b")
    line.add("a", 200, weight=1.0)
    assert served_until(line, "a", "b") <= 3


@given(st.floats(0.001, 1000), st.floats(0.001, 1000), st.integers(0, 30))
def test_another_weight_and_back_changes_nothing(before: float, between: float, num_served: int) -> None:
    line = Line(burst=100)
    for _ in range(20):
        line.add("a", 50, weight=before)
        line.add("b", 50)
    for _ in range(num_served):
        line.serve(num_output=10)
    tenant = line.queue.tenant_of(line.add("a", 50, weight=before).request)
    counter = tenant.counter
    line.add("a", 50, weight=between)
    line.add("a", 50, weight=before)
    assert tenant.counter == pytest.approx(counter, rel=1e-6, abs=1e-6)
