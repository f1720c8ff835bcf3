"""Engines are timed in turn, and one that fails does not end the run."""

from collections.abc import Callable

import pytest

from bench.timing import ContenderFailedError, Timing, Workload, as_rows, time_in_turn

SHORT, LONG = Workload(1, 8, 4), Workload(2, 64, 8)


class FakeContender:
    """Notes what it is asked, in a log that contenders share."""

    def __init__(self, name: str, log: list[str], *, max_repeats: int = 9, fails: Callable[[int], bool] = bool) -> None:
        self.name, self.max_repeats, self._log, self._fails = name, max_repeats, log, fails

    def run(self, workload: Workload, seed: int) -> float:
        self._log.append(f"{self.name}{seed}")
        if self._fails(len(self._log)):
            raise ContenderFailedError("out of memory")
        return float(seed)


def never(_: int) -> bool:
    return False


def in_turn(contenders: list[FakeContender], repeats: int) -> tuple[list[Timing], dict[str, str]]:
    return time_in_turn(contenders, [SHORT], repeats, lambda line: None, pause_s=0.0)


def test_engines_take_turns_after_a_warm_up() -> None:
    log: list[str] = []
    timings, failures = in_turn([FakeContender("a", log, fails=never), FakeContender("b", log, fails=never)], 3)
    assert log == ["a0", "b0", "a1", "b1", "a2", "b2", "a3", "b3"]
    assert [(timing.contender, timing.seconds) for timing in timings] == [
        ("a", (1.0, 2.0, 3.0)),
        ("b", (1.0, 2.0, 3.0)),
    ]
    assert timings[0].median_s == 2.0
    assert failures == {}


def test_a_slow_engine_is_asked_less_often() -> None:
    log: list[str] = []
    timings, _ = in_turn([FakeContender("slow", log, max_repeats=1, fails=never)], 3)
    assert timings[0].seconds == (1.0,)


def test_an_engine_that_fails_is_asked_no_more_and_the_others_go_on() -> None:
    log: list[str] = []
    bad = FakeContender("bad", log, fails=lambda num_calls: num_calls > 2)
    timings, failures = in_turn([bad, FakeContender("good", log, fails=never)], 2)
    assert failures == {"bad": "out of memory"}
    assert log == ["bad0", "good0", "bad1", "good1", "good2"]
    assert [timing.contender for timing in timings] == ["good"]


@pytest.mark.parametrize("vocab_size", [16, 500, 49_152])
def test_prompts_are_the_same_for_every_engine_and_lie_in_the_vocabulary(vocab_size: int) -> None:
    prompts = LONG.prompts(vocab_size, 7)
    assert prompts == LONG.prompts(vocab_size, 7) != LONG.prompts(vocab_size, 8)
    assert [len(prompt) for prompt in prompts] == [64, 64]
    assert all(0 <= token < vocab_size for prompt in prompts for token in prompt)


def test_a_table_tells_tokens_a_second_or_seconds_and_leaves_a_gap_open() -> None:
    prefill = Workload(1, 1024, 4)
    timings = [
        Timing(contender="a", workload=LONG, seconds=(0.5, 4.0, 1.0)),
        Timing(contender="a", workload=prefill, seconds=(0.25,)),
        Timing(contender="b", workload=LONG, seconds=(2.0,)),
    ]
    header, rows = as_rows([Timing.from_data(timing.as_data()) for timing in timings])
    assert header == ["output tokens/s", "2 × 64→8", "1 × 1024→4"]
    assert rows == [["a", "16.0", "0.25 s"], ["b", "8.0", "-"]]
