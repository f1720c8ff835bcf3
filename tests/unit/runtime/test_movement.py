"""When a rank tells its leader that it moves."""

import pytest

from model_parallel.runtime import movement
from model_parallel.runtime.movement import MovementReports
from model_parallel.runtime.rank_link import Ack, Moved, RankMessage


class Link:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[RankMessage] = []

    def send(self, message: RankMessage) -> None:
        self.sent.append(message)


class Worker:
    num_done = 0
    is_compiling = False


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def reports(link: Link, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> MovementReports:
    """Whose thread does not look by itself."""
    monkeypatch.setattr(movement, "PERIOD_S", 1e6)
    return MovementReports(link, worker)  # type: ignore[arg-type]


def test_short_steps_say_nothing(reports: MovementReports, link: Link, worker: Worker) -> None:
    for step_id in range(1, 10):
        reports.begin(step_id)
        worker.num_done += 1
        reports.look()
        reports.end(Ack(7, step_id))
        reports.look()
    reports.close()
    assert link.sent == [Ack(7, step_id) for step_id in range(1, 10)]


def test_a_long_step_says_so_whenever_it_has_got_further(reports: MovementReports, link: Link, worker: Worker) -> None:
    reports.begin(3)
    reports.look()
    worker.num_done += 1
    reports.look()
    reports.look()  # nothing new
    worker.num_done += 5
    reports.look()
    reports.close()
    assert link.sent == [Moved(3, False)] * 2


def test_that_it_compiles_is_said_once(reports: MovementReports, link: Link, worker: Worker) -> None:
    reports.begin(3)
    reports.look()
    worker.is_compiling = True
    for _ in range(5):
        reports.look()
    worker.is_compiling = False
    reports.look()
    reports.close()
    assert link.sent == [Moved(3, True)]
