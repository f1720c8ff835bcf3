"""Which adapters the ranks hold, and who waits for one."""

import msgspec
import pytest

from model_parallel.config import AdapterConfig
from model_parallel.engine.request import AdapterRef, EngineRequest, FinishReason
from model_parallel.errors import RequestError
from tests.support.engine import Harness, make_request

ADAPTERS = [AdapterRef(f"{n:064x}", f"/adapters/{n}") for n in range(5)]


def _harness(max_loaded: int = 2, max_bytes: int = 100, **settings: int) -> Harness:
    harness = Harness(adapters=AdapterConfig(max_loaded=max_loaded, max_bytes=max_bytes), **settings)
    for ref in ADAPTERS:
        harness.scheduler.adapters.know(ref, num_bytes=30)
    return harness


def _request(name: str, adapter: int | None, prompt: list[int] | None = None, max_tokens: int = 4) -> EngineRequest:
    request = make_request(name, prompt or [1, 2, 3], max_tokens=max_tokens, ignore_eos=True)
    return request if adapter is None else msgspec.structs.replace(request, adapter=ADAPTERS[adapter])


def _loaded(harness: Harness) -> list[str]:
    return sorted(digest[-1] for digest in harness.scheduler.adapters.loaded)


def test_an_adapter_is_loaded_once_and_kept() -> None:
    harness = _harness()
    for name in ("r1", "r2"):
        harness.add(_request(name, 0))
    harness.run()
    harness.add(_request("r3", 0))
    harness.run()
    loads = [load for plan in harness.executor.plans for load in plan.adapters_to_load]
    assert [load.path for load in loads] == ["/adapters/0"]
    assert all(harness.finish_reason(name) is FinishReason.LENGTH for name in ("r1", "r2", "r3"))


def test_the_one_that_was_needed_longest_ago_goes() -> None:
    harness = _harness()
    for turn, adapter in enumerate([0, 1, 0, 2]):
        harness.add(_request(f"r{turn}", adapter))
        harness.run()
    assert _loaded(harness) == ["0", "2"]


def test_bytes_are_bounded_too() -> None:
    harness = _harness(max_loaded=5, max_bytes=70)
    for adapter in range(5):
        harness.add(_request(f"r{adapter}", adapter))
    harness.run()
    assert len(_loaded(harness)) == 2
    assert harness.scheduler.adapters.num_bytes == 60


def test_a_running_sequence_keeps_its_adapter() -> None:
    """The next one waits until one of them has ended, although it came long before."""
    harness = _harness()
    harness.add(_request("r0", 0, max_tokens=30))
    harness.add(_request("r1", 1, max_tokens=12))
    harness.add(_request("r2", 2, max_tokens=2))
    while not harness.outputs["r2"]:
        harness.step()
        if len(harness.tokens("r1")) < 12:
            assert not harness.outputs["r2"]
            assert "2" not in _loaded(harness)
    assert len(harness.tokens("r0")) < 30
    harness.run()
    assert len(harness.tokens("r0")) == 30


def test_requests_without_one_run_while_another_is_loaded() -> None:
    harness = _harness()
    harness.executor.num_steps_to_load = 20
    harness.add(_request("r0", None, max_tokens=5))
    harness.add(_request("r1", 0, max_tokens=1))
    for _ in range(8):
        harness.step()
    assert harness.finish_reason("r0") is FinishReason.LENGTH
    assert not harness.outputs["r1"]
    harness.run()
    assert harness.finish_reason("r1") is FinishReason.LENGTH


def test_a_broken_adapter_ends_its_requests_alone() -> None:
    harness = _harness()
    harness.executor.broken_adapters.add(ADAPTERS[1].digest)
    for name, adapter in (("r0", 0), ("r1", 1), ("r2", 1), ("r3", None)):
        harness.add(_request(name, adapter))
    harness.run()
    for name in ("r1", "r2"):
        last = harness.last(name)
        assert (last.finish_reason, last.error_kind) == (FinishReason.ERROR, "adapter_failed")
        assert "could not be loaded" in last.error
    assert [harness.finish_reason(name) for name in ("r0", "r3")] == [FinishReason.LENGTH] * 2
    assert _loaded(harness) == ["0"]
    assert harness.scheduler.adapters.state_of(ADAPTERS[1].digest).error == "rank 1: it is broken"


def test_an_unknown_adapter_is_refused() -> None:
    harness = _harness()
    stranger = msgspec.structs.replace(_request("r0", 0), adapter=AdapterRef("ff" * 32, "/elsewhere"))
    with pytest.raises(RequestError, match="not known to this group"):
        harness.engine.add(stranger)
    plain = Harness()
    with pytest.raises(RequestError, match="takes no adapters"):
        plain.scheduler.adapters.know(ADAPTERS[0], num_bytes=1)
    with pytest.raises(RequestError, match="max_bytes is 100"):
        harness.scheduler.adapters.know(stranger.adapter, num_bytes=101)  # type: ignore[arg-type]
    harness.engine.check_integrity()


def test_one_that_is_used_cannot_be_dropped() -> None:
    harness = _harness()
    harness.add(_request("r0", 0, max_tokens=8))
    for _ in range(6):
        harness.step()
    assert not harness.scheduler.adapters.drop(ADAPTERS[0].digest)
    harness.run()
    assert harness.scheduler.adapters.drop(ADAPTERS[0].digest)
    harness.run()
    assert not harness.executor.adapters
    assert not harness.scheduler.adapters.is_known(ADAPTERS[0].digest)


def test_many_cycles_leave_nothing() -> None:
    harness = _harness()
    pool = harness.scheduler.adapters
    for turn in range(200):
        ref = AdapterRef(f"{turn:064x}", f"/adapters/{turn}")
        pool.know(ref, num_bytes=30)
        harness.add(msgspec.structs.replace(_request(f"r{turn}", 0), adapter=ref))
        harness.run()
        assert pool.drop(ref.digest)
        harness.run()
    assert (pool.loaded, pool.num_bytes, pool.has_work) == ([], 0, False)
    assert not harness.executor.adapters
    assert sum(pool.is_known(f"{turn:064x}") for turn in range(200)) == 0


def test_names_that_nobody_uses_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model_parallel.engine.adapters.MAX_REMEMBERED", 3)
    harness = _harness()
    assert [harness.scheduler.adapters.is_known(ref.digest) for ref in ADAPTERS] == [False, False, True, True, True]


def test_a_lost_group_does_not_wait_for_adapters() -> None:
    harness = _harness()
    harness.executor.fails_at_step = 2
    harness.add(_request("r0", 0))
    harness.run()
    assert harness.last("r0").error_kind == "unavailable"
    assert not harness.engine.has_work


def test_nobody_waits_behind_a_request_whose_adapter_is_being_loaded() -> None:
    """It steps aside, also for requests of its own tenant, and is the next one as soon as its adapter is there."""
    harness = _harness(max_num_seqs=2)
    harness.executor.num_steps_to_load = 6
    harness.add(_request("slow1", 0))
    for number in range(2, 9):
        harness.add(_request(f"quick{number}", None, max_tokens=4))
    began: list[str] = []
    while harness.engine.has_work:
        harness.step()
        began += [name for name in harness.outputs if name not in began and harness.tokens(name)]
    assert 2 <= began.index("slow1") <= 4, began
    assert all(harness.finish_reason(name) is FinishReason.LENGTH for name in harness.outputs)


def test_those_that_stepped_aside_have_their_turns_in_order() -> None:
    """However few adapters the ranks can hold: each has its turn before its adapter may be taken from it."""
    harness = _harness(max_loaded=1, max_num_seqs=4)
    for index in range(10):
        request = _request(f"r{index}", index % 5, max_tokens=2)
        harness.add(msgspec.structs.replace(request, tenant=f"tenant {index % 3}"))
    harness.run(max_steps=400)
    loads = [load for plan in harness.executor.plans for load in plan.adapters_to_load]
    assert len(loads) <= 10, "no adapter was loaded in vain"


def test_one_that_stepped_aside_can_be_paused_aborted_and_lost() -> None:
    harness = _harness()
    harness.executor.num_steps_to_load = 5
    for name in ("r1", "r2", "r3"):
        harness.add(_request(name, 0))
    harness.step()
    assert harness.scheduler.load == (0, 3)
    harness.engine.pause("r1")
    harness.engine.abort("r2")
    harness.step()
    harness.engine.resume("r1")
    harness.run()
    assert harness.finish_reason("r1") is harness.finish_reason("r3") is FinishReason.LENGTH
    assert harness.finish_reason("r2") is FinishReason.CANCELLED
    harness.add(_request("r4", 1))
    harness.step()
    harness.engine.fail("gone")
    harness.run()
    assert harness.last("r4").error_kind == "unavailable"
