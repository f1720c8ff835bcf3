"""Ranks as processes: steps, every way of losing a rank or the leader, and that nothing is left."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from model_parallel.errors import CheckpointError, ConfigError, GroupFailedError
from model_parallel.runtime.executors import SpawnedExecutor
from model_parallel.runtime.leader_watch import LOOK_PERIOD_S, SILENCE_S
from model_parallel.runtime.silence import MIN_LIMIT_S
from tests.support.effort import by_day, rest_by_night
from tests.support.executors import execute
from tests.support.fake_rank import BURN, CRAWL, EXIT, FAKE_RANK, HANG, RAISE, group_config, plan, tokens
from tests.support.processes import is_running
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, thread, file descriptor or temporary file outlives a group, however it ended."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads, files = set(threading.enumerate()), os.listdir("/proc/self/fd")
    yield
    assert psutil.Process().children(recursive=True) == []
    assert {t.name for t in set(threading.enumerate()) - threads} == set()
    assert len(os.listdir("/proc/self/fd")) == len(files)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def group() -> Iterator[SpawnedExecutor]:
    executor = SpawnedExecutor(group_config(2), rank_class=FAKE_RANK)
    yield executor
    executor.shutdown()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_ranks_of_one_host_exchange_through_memory_that_leaves_nothing(group: SpawnedExecutor) -> None:
    for pid in group.pids:
        assert listening_addresses(pid) == set()  # Gloo would listen
        assert any("memfd:packtrain-store" in m.path for m in psutil.Process(pid).memory_maps())
    assert not any("packtrain-store" in m.path for m in psutil.Process().memory_maps())
    assert tokens(execute(group, plan(1, (0, 5)))) == [15]


def test_without_a_compiler_and_what_it_made_ranks_exchange_through_gloo(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PACKTRAIN_CACHE", str(cache))
    monkeypatch.setattr("model_parallel.native.shutil.which", lambda name: None)
    # In /tmp there may be what somebody compiled whose cache could not be written.
    monkeypatch.setattr("model_parallel.native.private_directories", lambda *, create: iter(()))
    executor = SpawnedExecutor(group_config(2), rank_class=FAKE_RANK)
    assert [record.getMessage() for record in caplog.records] == [
        "ranks will exchange through Gloo, which is slower than shared memory: g++ is not installed, and nothing compiled "
        f"before is in {cache / 'native'}"
    ]
    assert all(listening_addresses(pid) == {"127.0.0.1"} for pid in executor.pids)
    assert tokens(execute(executor, plan(1, (0, 5)))) == [15]
    executor.shutdown()


def test_starting_and_stopping_many_times_leaves_nothing_open() -> None:
    """The fixture compares file descriptors; shared memory has no name that could be left."""
    for turn in range(1, 1 + by_day(3, by_night=6)):
        executor = SpawnedExecutor(group_config(2), rank_class=FAKE_RANK)
        assert tokens(execute(executor, plan(1, (0, turn)))) == [3 * turn]
        executor.shutdown()
    assert not list(Path("/dev/shm").glob("*packtrain-store*"))


def listening_addresses(pid: int) -> set[str]:
    sockets = psutil.Process(pid).net_connections(kind="inet")
    return {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}


def test_steps_progress_listeners_and_orderly_stop() -> None:
    progress: list[tuple[int, int, int]] = []
    executor = SpawnedExecutor(group_config(3), rank_class=FAKE_RANK, on_progress=lambda *seen: progress.append(seen))
    lost: list[str] = []
    executor.set_failure_callback(lost.append)
    assert sorted(progress) == [(rank, done, 2) for rank in range(3) for done in (1, 2)]
    for step_id in range(1, 200):
        assert tokens(execute(executor, plan(step_id, (0, step_id), (1, 7)))) == [6 * step_id, 42]
    assert len(set(executor.pids)) == 3
    for pid in executor.pids:
        assert listening_addresses(pid) <= {"127.0.0.1"}
        command = " ".join(psutil.Process(pid).cmdline())
        assert command.endswith(f"model_parallel.runtime.rank_process {os.getpid()}")  # and so holds no secret
    assert listening_addresses(os.getpid()) == set()
    executor.shutdown()
    executor.shutdown()
    assert lost == []
    with pytest.raises(GroupFailedError, match="shut down"):
        execute(executor, plan(200))


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_between_steps_calls_back_once(group: SpawnedExecutor, victim: int) -> None:
    reasons: list[str] = []
    group.set_failure_callback(reasons.append)
    execute(group, plan(1, (0, 1)))
    os.kill(group.pids[victim], signal.SIGKILL)
    assert wait_until(lambda: reasons)
    assert f"rank {victim} (pid {group.pids[victim]}) is lost" in reasons[0]
    with pytest.raises(GroupFailedError, match=f"rank {victim}"):
        execute(group, plan(2, (0, 1)))
    assert wait_until(lambda: not any(map(is_running, group.pids)))
    assert len(reasons) == 1


@pytest.mark.parametrize(
    ("victim", "behaviour", "said"),
    [(0, EXIT, "is lost"), (1, RAISE, "failed: ValueError: told to raise"), (0, RAISE, "failed: ValueError")],
)
def test_lost_inside_a_step_names_the_rank(group: SpawnedExecutor, victim: int, behaviour: int, said: str) -> None:
    """The other rank is stuck in the collective that the victim does not join."""
    reasons: list[str] = []
    group.set_failure_callback(reasons.append)
    with pytest.raises(GroupFailedError, match=rf"rank {victim} \(pid \d+\) {said}"):
        execute(group, plan(1, (behaviour, victim), (0, 1)))
    assert wait_until(lambda: not any(map(is_running, group.pids)))
    assert reasons == []  # execute has told of it


def test_kill_inside_a_step(group: SpawnedExecutor) -> None:
    timer = threading.Timer(0.3, os.kill, (group.pids[1], signal.SIGKILL))
    timer.start()
    with pytest.raises(GroupFailedError, match=r"rank 1 \(pid \d+\) is lost"):
        execute(group, plan(1, (HANG, 1), (0, 1)))
    timer.join()


@pytest.mark.parametrize("victim", rest_by_night([0, 1], by_day=[0]))
def test_a_first_step_in_which_a_rank_is_stopped_has_the_step_timeout(victim: int) -> None:
    group = SpawnedExecutor(group_config(2, step_timeout_s=2.0), rank_class=FAKE_RANK)
    os.kill(group.pids[victim], signal.SIGSTOP)
    with pytest.raises(GroupFailedError, match=rf"nothing has moved in step 1 for 2 s; no answer from .*rank {victim}"):
        execute(group, plan(1, (0, 1)))
    assert wait_until(lambda: not any(map(is_running, group.pids)))
    group.shutdown()


def run_steps(group: SpawnedExecutor, num_steps: int) -> None:
    """Enough for the group to know how long its steps of one or two tokens take."""
    for step_id in range(1, num_steps + 1):
        execute(group, plan(step_id, (0, 1), (1, 1)))


@pytest.mark.parametrize("victim", rest_by_night([0, 1], by_day=[1]))
def test_a_rank_that_is_stopped_later_is_given_up_as_soon_as_its_steps_allow(
    group: SpawnedExecutor, victim: int
) -> None:
    """They take milliseconds, so that is the least that every group has."""
    run_steps(group, 10)
    os.kill(group.pids[victim], signal.SIGSTOP)
    with pytest.raises(
        GroupFailedError, match=rf"nothing has moved in step 11 for 1 s; no answer from .*rank {victim}"
    ):
        execute(group, plan(11, (0, 1)))
    assert wait_until(lambda: not any(map(is_running, group.pids)))


@pytest.mark.parametrize("victim", rest_by_night([0, 1], by_day=[0]))
def test_a_short_stop_restarts_nothing(group: SpawnedExecutor, victim: int) -> None:
    run_steps(group, 10)
    os.kill(group.pids[victim], signal.SIGSTOP)
    timer = threading.Timer(0.9 * MIN_LIMIT_S, os.kill, (group.pids[victim], signal.SIGCONT))
    timer.start()
    assert tokens(execute(group, plan(11, (0, 5)))) == [15]
    timer.join()
    assert group.health.problem() is None


@pytest.mark.parametrize("crawler", rest_by_night([0, 1], by_day=[1]))
def test_a_long_step_that_moves_is_waited_for(group: SpawnedExecutor, crawler: int) -> None:
    """It takes four times as long as a group may be silent whose steps were as short until then."""
    run_steps(group, 10)
    assert tokens(execute(group, plan(11, (CRAWL, crawler), (0, 5)))) == [3 * crawler, 15]


@pytest.mark.parametrize("victim", rest_by_night([0, 1], by_day=[0]))
def test_a_starved_rank_is_waited_for(group: SpawnedExecutor, victim: int) -> None:
    """It gets a tenth of a processor beside one busy process, so that the step takes longer than it may be silent."""
    run_steps(group, 10)
    cores = {min(os.sched_getaffinity(0))}
    busy = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        assert busy.stdout is not None
        busy.stdout.readline()
        os.sched_setaffinity(busy.pid, cores)
        for thread in psutil.Process(group.pids[victim]).threads():
            os.sched_setaffinity(thread.id, cores)
            os.setpriority(os.PRIO_PROCESS, thread.id, 10)
        with contextlib.suppress(FileNotFoundError):  # where Linux shares processors among sessions first
            Path(f"/proc/{group.pids[victim]}/autogroup").write_text("10")
        assert tokens(execute(group, plan(11, (BURN, victim), (0, 5)))) == [3 * victim, 15]
    finally:
        busy.kill()
        busy.communicate()


def test_step_out_of_turn_is_refused(group: SpawnedExecutor) -> None:
    """A result of another epoch or step never reaches the scheduler."""
    execute(group, plan(1, (0, 1)))
    with pytest.raises(GroupFailedError, match="rank 1"):
        execute(group, plan(1, (0, 1)))
        execute(group, plan(2, (0, 1)))


@pytest.mark.parametrize(
    ("checkpoint", "error", "message"),
    [
        ("broken:1", CheckpointError, "rank 1 failed to start: broken:1: no such file"),
        ("dies:0", GroupFailedError, r"the group did not start: rank 0 is lost"),
    ],
)
def test_failed_load_cleans_up(checkpoint: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SpawnedExecutor(group_config(2, checkpoint_path=checkpoint), rank_class=FAKE_RANK)


def test_unknown_rank_class_fails_the_start() -> None:
    with pytest.raises(ConfigError, match="nowhere:Rank"):
        SpawnedExecutor(group_config(1), rank_class="nowhere:Rank")


def test_process_that_dies_before_it_connects_fails_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(GroupFailedError, match=r"rank [01] ended with status 1 before it connected"):
        SpawnedExecutor(group_config(2), rank_class=FAKE_RANK)


def test_start_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/sleep")
    monkeypatch.setattr(subprocess, "Popen", _SleepingProcess)
    with pytest.raises(GroupFailedError, match=r"ranks \[0\] did not connect within"):
        SpawnedExecutor(group_config(1, start_timeout_s=0.5), rank_class=FAKE_RANK)


class _SleepingProcess(subprocess.Popen[bytes]):
    def __init__(self, command: list[str], **options: object) -> None:
        super().__init__(["/bin/sleep", "60"], **options)  # type: ignore[call-overload]


LEADER = """
import sys, time
from model_parallel.runtime.executors import SpawnedExecutor
from tests.support.executors import execute
from tests.support.fake_rank import FAKE_RANK, HANG, group_config, plan
executor = SpawnedExecutor(group_config(2), rank_class=FAKE_RANK)
print(*executor.pids, flush=True)
if sys.argv[1] == "in a step":
    execute(executor, plan(1, (HANG, 1), (0, 1)))
while True:
    if sys.argv[1] == "watched":
        executor.beat()
    time.sleep(0.1)
"""


def start_leader(moment: str) -> tuple["subprocess.Popen[str]", list[int]]:
    """Its process and those of its ranks."""
    leader = subprocess.Popen([sys.executable, "-c", LEADER, moment], stdout=subprocess.PIPE, text=True)
    assert leader.stdout is not None
    with leader.stdout:
        pids = [int(pid) for pid in leader.stdout.readline().split()]
    assert len(pids) == 2
    return leader, pids


@pytest.mark.parametrize("moment", ["between steps", "in a step"])
def test_ranks_end_with_a_killed_leader(moment: str) -> None:
    leader, pids = start_leader(moment)
    time.sleep(0.3)  # into the step
    assert leader.poll() is None
    leader.kill()
    leader.wait()
    assert wait_until(lambda: not any(map(is_running, pids)))


@pytest.mark.parametrize(("moment", "is_ended"), [("watched", True), ("between steps", False)])
def test_a_leader_that_is_to_be_watched_is_killed_when_it_hangs(moment: str, is_ended: bool) -> None:
    """One that is not, such as a user's own process under a debugger, may stand still for as long as it likes."""
    leader, pids = start_leader(moment)
    try:
        time.sleep(1.0)  # it has said that it goes on
        os.kill(leader.pid, signal.SIGSTOP)
        if is_ended:
            assert wait_until(lambda: leader.poll() == -signal.SIGKILL)
        else:
            time.sleep(SILENCE_S + 4 * LOOK_PERIOD_S)
            assert leader.poll() is None
    finally:
        leader.kill()
        leader.wait()
    assert wait_until(lambda: not any(map(is_running, pids)))


def test_foreign_connections_during_the_start_do_not_disturb_it(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = SpawnedExecutor._launch
    strangers: list[socket.socket] = []

    def launch_among_strangers(self: SpawnedExecutor, host: str, port: int, secret: bytes) -> None:
        for data in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x80\x04pickle" * 20):
            strangers.append(socket.create_connection((host, port)))
            strangers[-1].sendall(data)
        launch(self, host, port, secret)

    monkeypatch.setattr(SpawnedExecutor, "_launch", launch_among_strangers)
    executor = SpawnedExecutor(group_config(1), rank_class=FAKE_RANK)
    assert tokens(execute(executor, plan(1, (0, 5)))) == [5]
    executor.shutdown()
    for sock in strangers:
        sock.close()
