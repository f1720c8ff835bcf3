"""What ends for good although Ray restarts it: the autoscaler is begun anew, and without Serve's controller, or a process
of Ray's, it is over."""

import threading

import pytest
from ray.exceptions import RayError

from serving.driver.caretaker import NUM_LOOKS, Caretaker
from tests.support.waiting import PATIENCE_S


class Actors:
    """Serve's controller as a script says, a letter each: `+` is there, `-` is not, `?` nobody can tell; the last one stays."""

    def __init__(self, script: str, *, fails: Exception | None = None) -> None:
        self.script = script
        self.fails = fails
        self.ended: list[str] = []
        self.num_looks = self.num_revivals = 0
        self.is_through = threading.Event()

    def has_controller(self) -> bool:
        seen = self.script[min(self.num_looks, len(self.script) - 1)]
        self.num_looks += 1
        if self.num_looks > len(self.script) + 2:
            self.is_through.set()
        if seen == "?":
            raise RayError("no answer")
        return seen == "+"

    def revive(self) -> None:
        self.num_revivals += 1
        if self.fails is not None:
            raise self.fails


def watch(actors: Actors) -> Caretaker:
    return Caretaker(
        [actors.revive],
        has_controller=actors.has_controller,
        ended_processes=lambda: actors.ended,
        period_s=0.001,
    )


def test_without_a_controller_it_is_over() -> None:
    actors = Actors("++" + "-" * NUM_LOOKS)
    caretaker = watch(actors)
    assert caretaker.is_over.wait(PATIENCE_S)
    caretaker.close()
    assert (actors.num_looks, actors.num_revivals) == (2 + NUM_LOOKS, 2)
    assert caretaker.what_ended == "Serve's controller"


def test_without_a_process_of_ray_it_is_over_and_nobody_is_asked() -> None:
    """Gateways and groups went on, groups that were lost did not come back, and `serve` said nothing."""
    actors = Actors("+")
    actors.ended = ["gcs_server", "raylet"]
    caretaker = watch(actors)
    assert caretaker.is_over.wait(PATIENCE_S)
    caretaker.close()
    assert caretaker.what_ended == "Ray's gcs_server and raylet"
    assert (actors.num_looks, actors.num_revivals) == (0, 0)


@pytest.mark.parametrize("script", ["+", "--+--+", "-?-+", "?+"])
def test_a_controller_that_comes_back_is_waited_for(script: str) -> None:
    actors = Actors(script)
    caretaker = watch(actors)
    assert actors.is_through.wait(PATIENCE_S)
    caretaker.close()
    assert not caretaker.is_over.is_set()


@pytest.mark.parametrize("error", [RayError("no node"), KeyError("a bug")])
def test_an_autoscaler_that_cannot_be_begun_is_tried_again(error: Exception) -> None:
    actors = Actors("+", fails=error)
    caretaker = watch(actors)
    assert actors.is_through.wait(PATIENCE_S)
    caretaker.close()
    assert actors.num_revivals >= 3
