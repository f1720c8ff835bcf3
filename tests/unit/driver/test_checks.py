"""The checks before a start, with the system's answers put in."""

import asyncio
import errno
import json
import os
import re
import resource
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from model_parallel.errors import ConfigError
from model_parallel.machine import Machine, read_machine
from serving.cli.doctor import Level, _checked, look_at_config, look_at_machine
from serving.config import ServingConfig, parse_config
from serving.driver import checks, preflight
from serving.driver.checks import (
    MIN_FILE_BYTES,
    check_cache,
    check_compiler,
    check_cpus,
    check_file_size,
    check_gpus,
    check_loopback,
    check_ports,
    check_threads,
    listeners,
    num_more_threads_of_user,
    port_owner,
)
from serving.driver.preflight import _problems, begin
from serving.models.sizes import Host
from serving.tenants.authority import ledger as ledger_module
from serving.tenants.authority.service import AuthorityService

GIB = 1 << 30


def config(**sections: object) -> ServingConfig:
    return parse_config({"models": [{"name": "m", "source": "s"}], **sections}, origin="test")


def taken(*ports: int, number: int = errno.EADDRINUSE) -> checks.Probe:
    return lambda address, port: number if port in ports else 0


def test_every_listener_is_checked() -> None:
    found = [listener.setting for listener in listeners(config(tenancy={}))]
    assert found == ["gateway.port", "gateway.http_port", "admin.metrics_port", "admin.port"]
    assert "admin.port" in [listener.setting for listener in listeners(config())]
    beyond = config(gateway={"insecure": True}, admin={"host": "0.0.0.0"})
    assert "admin.port" not in [
        listener.setting for listener in listeners(beyond)
    ]  # nothing to show there without keys
    closed = config(gateway={"http_port": None}, admin={"metrics_port": None, "port": None})
    assert [listener.setting for listener in listeners(closed)] == ["gateway.port"]


@pytest.mark.parametrize(
    ("port", "setting", "flag"), [(50051, "gateway.port", "--port"), (8000, "gateway.http_port", "--http-port")]
)
def test_a_taken_port_of_clients_is_refused_with_its_flag(port: int, setting: str, flag: str) -> None:
    _, moved, problems = check_ports(config(), taken(port))
    assert not moved
    (problem,) = problems
    assert f"{setting} ({flag}): 127.0.0.1:{port} is in use" in problem and flag in problem.partition(";")[2]


def test_ports_of_operators_move_where_nobody_chose_them() -> None:
    changed, moved, problems = check_ports(config(tenancy={}), taken(9464, 50052))
    assert not problems
    assert (changed.admin.metrics_port, changed.admin.port) == (0, 0)
    assert [line.split()[0] for line in moved] == ["admin.metrics_port", "admin.port"]
    assert "--metrics-port" in moved[0] and "--admin-port" in moved[1]


def test_a_port_of_operators_that_was_chosen_is_refused() -> None:
    changed, moved, problems = check_ports(config(admin={"metrics_port": 9464}), taken(9464))
    assert not moved and changed.admin.metrics_port == 9464
    assert "admin.metrics_port (--metrics-port)" in problems[0]


def test_two_listeners_with_one_port_are_told_by_both_names() -> None:
    _, _, problems = check_ports(config(gateway={"port": 7000, "http_port": 7000}), taken())
    assert problems == [
        "gateway.http_port (--http-port): 7000 is gateway.port (--port) already; choose another port, or 0 for a free one"
    ]
    free = config(gateway={"port": 0, "http_port": 0}, admin={"metrics_port": 0})
    assert check_ports(free, taken())[2] == []


@pytest.mark.parametrize(
    ("gateway", "admin", "is_one"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.1", True),
        ("127.0.0.1", "localhost", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("0.0.0.0", "127.0.0.2", True),
        ("::", "127.0.0.1", True),
    ],
)
def test_two_addresses_of_one_machine_may_have_the_same_port(gateway: str, admin: str, is_one: bool) -> None:
    hosts = config(gateway={"host": gateway, "port": 7000, "insecure": True}, admin={"host": admin, "port": 7000})
    _, _, problems = check_ports(hosts, taken())
    assert [problem.partition(";")[0] for problem in problems] == (
        ["admin.port (--admin-port): 7000 is gateway.port (--port) already"] if is_one else []
    )


def test_each_of_several_listeners_with_one_port_is_told() -> None:
    ports = config(gateway={"port": 7000, "http_port": 7001}, admin={"port": 7001, "metrics_port": 7001})
    _, _, problems = check_ports(ports, taken())
    assert [problem.partition(" ")[0] for problem in problems] == ["admin.metrics_port", "admin.port"]


def test_other_reasons_have_other_ways_out() -> None:
    _, _, problems = check_ports(config(gateway={"port": 80}), taken(80, number=errno.EACCES))
    assert "below 1024" in problems[0]
    _, _, problems = check_ports(config(gateway={"host": "192.0.2.7", "http_port": None}))
    assert "192.0.2.7 is not an address of this machine" in problems[0] and "--host" in problems[0]
    _, _, problems = check_ports(config(gateway={"host": "no-such-host.invalid"}))
    assert len(problems) == 1 and "'no-such-host.invalid' cannot be resolved" in problems[0]


def test_who_holds_a_port_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "process" in port_owner(port)
        (_, _, problems) = check_ports(config(gateway={"port": port}))
        assert f"127.0.0.1:{port} is in use by" in problems[0]
    assert port_owner(port) == ""


def test_the_name_of_a_process_may_end_in_the_middle_of_a_character(tmp_path: Path) -> None:
    """Linux keeps its first 15 bytes."""
    (tmp_path / "proc/net").mkdir(parents=True)
    (tmp_path / "proc/net/tcp").write_text("head\n0: 0100007F:C383 00000000:0000 0A 0:0 00:0 00 0 0 4711\n")
    (tmp_path / "proc/8/fd").mkdir(parents=True)
    (tmp_path / "proc/8/fd/3").symlink_to("socket:[4711]")
    (tmp_path / "proc/8/comm").write_bytes("abcdefghijklmnü".encode()[:15] + b"\n")
    assert port_owner(0xC383, tmp_path) == "abcdefghijklmn\ufffd (process 8)"


def test_a_process_table_of_somebody_else_is_no_answer(tmp_path: Path) -> None:
    assert port_owner(1, tmp_path) == ""


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "localhost"])
def test_hosts_as_they_are_written(host: str) -> None:
    _, _, problems = check_ports(config(gateway={"host": host}), taken())
    assert problems == []


def test_a_cache_elsewhere_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.delenv("PACKTRAIN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    text = check_cache()
    assert (
        text.startswith("HOME: /proc/nowhere/.cache/packtrain ") and str(tmp_path) in text and "PACKTRAIN_CACHE" in text
    )
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)  # of nobody that the user database knows
    assert check_cache().startswith("HOME is not set; models and compiled code go to ")
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path))
    assert check_cache() == ""


@pytest.mark.parametrize("compiled", [True, False])
def test_a_chosen_cache_that_cannot_be_written_is_told(
    compiled: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checks, "is_ready", lambda: compiled)
    (tmp_path / "file").touch()
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path / "file"))
    assert check_cache().startswith(f"PACKTRAIN_CACHE: {tmp_path / 'file'} cannot be written (File exists)")
    monkeypatch.setenv("PACKTRAIN_CACHE", "/proc")  # as in an image, where all that is needed may be in it
    assert (check_cache() == "") == compiled


@pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.EADDRNOTAVAIL])
def test_a_machine_without_loopback_is_refused(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray tried for minutes."""

    def refuse(*arguments: object) -> None:
        raise OSError(number, "its own words (while attempting something)")

    check_loopback()
    name = "create_connection" if number == errno.ENETUNREACH else "create_server"
    monkeypatch.setattr(f"socket.{name}", refuse)
    told = re.escape(f"nothing can connect to 127.0.0.1 ({os.strerror(number)})")
    with pytest.raises(ConfigError, match=told):
        begin(config())
    (finding,) = (each for each in look_at_machine() if each.subject == "loopback")
    assert finding.level is Level.PROBLEM and "bring `lo` up" in finding.text


@pytest.mark.parametrize(
    ("compiler", "compiled", "warns"), [(None, False, True), (None, True, False), ("/g++", False, False)]
)
def test_a_missing_compiler(compiler: str | None, compiled: bool, warns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: compiler)
    monkeypatch.setattr(checks, "is_ready", lambda: compiled)
    assert ("install g++" in check_compiler()) == warns


@pytest.mark.parametrize("limits", [(0, 1 << 20), (1 << 20, MIN_FILE_BYTES - 1)])
def test_a_limit_of_file_sizes_that_is_too_low_is_told(
    limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: limits)
    with pytest.raises(ConfigError, match=f"files may have {limits[1]} bytes at most.*ulimit -Hf"):
        check_file_size()


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ((0, MIN_FILE_BYTES), (MIN_FILE_BYTES, MIN_FILE_BYTES)),
        ((1 << 20, resource.RLIM_INFINITY), (resource.RLIM_INFINITY, resource.RLIM_INFINITY)),
        ((MIN_FILE_BYTES, MIN_FILE_BYTES), None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None),
    ],
)
def test_a_limit_of_file_sizes_that_may_be_raised_is(
    limits: tuple[int, int], wanted: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: list[tuple[int, int]] = []
    monkeypatch.setattr("resource.getrlimit", lambda kind: limits)
    monkeypatch.setattr("resource.setrlimit", lambda kind, new: changes.append(new))
    check_file_size()
    assert changes == ([wanted] if wanted else [])


def test_more_threads_than_cpus() -> None:
    machine = Machine(
        num_cpus=1, num_host_cpus=8, total_memory_bytes=GIB, available_memory_bytes=GIB, cpu_limit="CPU affinity"
    )
    assert check_cpus(machine, 1) == ""
    assert check_cpus(machine, 2).startswith("2 threads of ranks share 1 CPUs (CPU affinity)")


def test_too_few_threads_are_told() -> None:
    """A process of Ray's ended, and nothing said why."""
    machine = Machine(num_cpus=1, num_host_cpus=1, total_memory_bytes=GIB, available_memory_bytes=GIB)
    check_threads(machine, 8)
    limited = replace(machine, num_more_threads=280, thread_limit="/sys/fs/cgroup/pids.max")
    check_threads(limited, 2)
    with pytest.raises(
        ConfigError, match=r"3 ranks need at least 305, and /sys/fs/cgroup/pids\.max allows 280 more.*--pids-limit"
    ):
        check_threads(limited, 3)


def test_too_few_processes_of_a_user_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It was told as a deployment that failed."""
    for process, text in (("8", "Name: a\nThreads:\t30\n"), ("9", "Name: b\nThreads:\t20\n"), ("10", "gone")):
        (tmp_path / "proc" / process).mkdir(parents=True)
        (tmp_path / "proc" / process / "status").write_text(text)
    (tmp_path / "proc/11").mkdir()
    owner = (tmp_path / "proc").stat().st_uid or 1000
    for directory in (tmp_path / "proc").iterdir():
        if os.geteuid() == 0:
            os.chown(directory, owner, -1)
    changes: list[tuple[int, int]] = []
    monkeypatch.setattr("os.getuid", lambda: owner)
    monkeypatch.setattr("resource.getrlimit", lambda kind: (100, 300))
    monkeypatch.setattr("resource.setrlimit", lambda kind, new: changes.append(new))
    assert num_more_threads_of_user(tmp_path) == 250
    assert changes == [(300, 300)]
    monkeypatch.setattr("resource.getrlimit", lambda kind: (100, resource.RLIM_INFINITY))
    assert num_more_threads_of_user(tmp_path) is None
    monkeypatch.setattr("os.getuid", lambda: 0)
    assert num_more_threads_of_user(tmp_path) is None
    monkeypatch.setattr(checks, "num_more_threads_of_user", lambda: 250)
    machine = Machine(num_cpus=1, num_host_cpus=1, total_memory_bytes=GIB, available_memory_bytes=GIB)
    with pytest.raises(ConfigError, match=r"1 ranks need at least 255, and .*of this user allows 250 more.*ulimit -Hu"):
        check_threads(machine, 1)


def test_doctor_looks_at_limits_without_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (64, 64))
    monkeypatch.setattr(checks, "num_more_threads_of_user", lambda: 64)
    found = {finding.subject: finding for finding in _checked(None, None)}
    for subject in ("processes", "open files", "file size"):
        assert found[subject].level is Level.PROBLEM
    assert "ulimit -Hn" in found["open files"].text


def test_what_a_check_of_a_checkpoint_prints() -> None:
    assert _problems(0, json.dumps(["a", "b"])) == ["a", "b"]
    assert _problems(0, "[]\n") == []
    assert "status -9" in _problems(-9, "")[0]


def test_a_key_that_can_be_kept_nowhere_is_told_before_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It was told after everything had loaded, and doctor said that all was well."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("serving.admin.operator_key.private_directories", lambda create: iter(()))
    with pytest.raises(ConfigError, match="the operator's key cannot be kept"):
        begin(config(ray={"address": "auto"}))
    # Where nobody needs one, that is no matter.
    begin(config(ray={"address": "auto"}, admin={"port": None})).close()


def test_a_database_that_can_never_work_is_told_before_the_start() -> None:
    with pytest.raises(ConfigError, match="database is not a URL"):
        begin(config(ray={"address": "auto"}, tenancy={"database": "postgresql://u@one:1,two:2/db"}))


def test_a_database_that_another_server_uses_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "BEAT_PERIOD_S", 0.0)
    url = f"sqlite:///{tmp_path / 'tenants.db'}"
    free_ports = {"gateway": {"port": 0, "http_port": 0}, "admin": {"port": 0, "metrics_port": 0}}
    mine = config(tenancy={"database": url}, **free_ports)

    async def look() -> None:
        other = AuthorityService(url, owner="elsewhere", refresh_s=0.05)
        await other.open()
        try:
            with pytest.raises(ConfigError, match="in use by the server on elsewhere"):
                await asyncio.to_thread(begin, mine)
            (finding,) = await asyncio.to_thread(lambda: list(look_at_config(mine)))
            assert finding.level is Level.PROBLEM and "in use by the server on elsewhere" in finding.text
            # In a cluster that is joined it may be this server's own authority.
            joining = config(tenancy={"database": url}, ray={"address": "auto"}, **free_ports)
            (await asyncio.to_thread(begin, joining)).close()
        finally:
            await other.close()

    asyncio.run(look())


def test_ranks_on_gpus_need_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"source": "smollm2-135m-instruct", "kv_cache_tokens": 4096}
    models = [
        {"name": "a", "device": "cuda", "tensor_parallel_size": 3, **shape},
        {"name": "b", "device": "cuda", **shape},
        {"name": "c", "device": "auto", **shape},
    ]
    free_ports = {"gateway": {"port": 0, "http_port": 0}, "admin": {"port": 0, "metrics_port": 0}}
    wanted = parse_config({"models": models, **free_ports}, origin="test")
    assert check_gpus(wanted.models, 4) == ""
    told = "models.a, models.b: device is cuda, and each of 4 ranks needs a GPU; torch finds 3 on this machine"
    assert check_gpus(wanted.models, 3) == told
    monkeypatch.setattr(preflight, "this_host", lambda: Host(machine=read_machine(), num_gpus=3))
    assert [finding.text for finding in look_at_config(wanted)] == [told]
