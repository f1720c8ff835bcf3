"""A rank kills a leader that says no more that it goes on, and no other one."""

import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from model_parallel.runtime.leader_watch import LOOK_PERIOD_S, MAX_COUNTED_S, SILENCE_S, LeaderWatch
from model_parallel.runtime.starvation import Starvation
from tests.support.waiting import PATIENCE_S


@dataclass
class Leader:
    """A real process, and what it says."""

    leader_pid: int
    num_beats: int = 0


class World:
    """A watch on a clock of its own."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.now_s = 1000.0
        self.process = process
        self.leader = Leader(process.pid)
        self.watch = LeaderWatch(self.leader, clock=lambda: self.now_s)

    def look_for(self, seconds: float, *, beats: bool, every_s: float = LOOK_PERIOD_S) -> bool:
        """Whether one of the looks found that the leader had been silent for too long."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += every_s
            self.leader.num_beats += beats
            if self.watch.look():
                return True
        return False

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None


@pytest.fixture
def world() -> Iterator[World]:
    with subprocess.Popen(["sleep", "600"]) as process:
        world = World(process)
        yield world
        process.kill()


def test_one_that_goes_on_is_left_alone(world: World) -> None:
    assert not world.look_for(10 * SILENCE_S, beats=True)
    assert world.is_alive


def test_one_that_says_no_more_that_it_goes_on_is_killed(world: World) -> None:
    assert not world.look_for(1.0, beats=True)
    began_s = world.now_s
    assert world.look_for(10 * SILENCE_S, beats=False)
    assert SILENCE_S < world.now_s - began_s <= SILENCE_S + LOOK_PERIOD_S
    assert world.process.wait(PATIENCE_S) == -signal.SIGKILL
    assert world.look_for(1.0, beats=False), "a second look at one that is gone raises nothing"


def test_one_that_other_work_keeps_from_the_processors_is_left_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Starvation, "look", lambda self: 0.9 * LOOK_PERIOD_S)
    assert not world.look_for(1.0, beats=True)
    assert not world.look_for(9 * SILENCE_S, beats=False)
    assert world.look_for(3 * SILENCE_S, beats=False), "what it does not wait counts"


def test_a_shorter_silence_restarts_nothing(world: World) -> None:
    for _ in range(5):
        assert not world.look_for(1.0, beats=True)
        assert not world.look_for(0.9 * SILENCE_S, beats=False)
    assert world.is_alive


def test_one_that_has_never_said_so_is_not_watched(world: World) -> None:
    """It is loading, or it is somebody's own process."""
    assert not world.look_for(100 * SILENCE_S, beats=False)
    assert world.is_alive


def test_a_rank_that_was_held_up_itself_does_not_blame_the_leader(world: World) -> None:
    assert not world.look_for(1.0, beats=True)
    num_looks = int(SILENCE_S / MAX_COUNTED_S)
    assert not world.look_for(100.0 * num_looks, beats=False, every_s=100.0)
    assert world.is_alive
