"""What a process may use, under every kind of limit."""

import os
from pathlib import Path

import pytest

from model_parallel.errors import ConfigError
from model_parallel.machine import Machine, read_machine

GIB = 1 << 30
MIB = 1 << 20


class FakeRoot:
    """/proc and /sys/fs/cgroup of a machine with 16 GiB, 12 of them available."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mounts: list[str] = []
        self.groups: list[str] = []
        self.write(
            "proc/meminfo", f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {12 * GIB // 1024} kB\n"
        )

    def write(self, path: str, text: str | int) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.fsencode(f"{text}\n"))

    def v2(self, path: str, *, point: str = "/sys/fs/cgroup", top: str = "/", **files: str | int) -> None:
        self.mounts.append(f"31 23 0:28 {top} {point} rw,nosuid - cgroup2 cgroup2 rw")
        self.groups.append(f"0::{path}")
        for name, value in files.items():
            self.write(f"{point}{path}/{name.replace('_', '.', 1)}", value)

    def v1(self, controllers: str, path: str, *, top: str = "/", **files: str | int) -> None:
        point = f"/sys/fs/cgroup/{controllers.split(',', maxsplit=1)[0]}"
        self.mounts.append(f"35 31 0:32 {top} {point} rw - cgroup cgroup rw,{controllers}")
        self.groups.append(f"{len(self.groups) + 2}:{controllers}:{path}")
        below = path.removeprefix(top.rstrip("/")) if path.startswith(top) else ""
        for name, value in files.items():
            self.write(f"{point}{below}/{name.replace('_', '.', 1)}", value)

    def read(self, affinity: int = 8) -> Machine:
        self.write("proc/self/mountinfo", "\n".join(["23 1 0:1 / / rw - ext4 /dev/vda rw", *self.mounts]))
        self.write("proc/self/cgroup", "\n".join(self.groups))
        return read_machine(self.root, affinity)


@pytest.fixture
def fake(tmp_path: Path) -> FakeRoot:
    return FakeRoot(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "MemTotal: 1024 kB\nMemFree: 512 kB\n", "MemTotal: many kB\nMemAvailable: 1 kB\n"]
)
def test_memory_that_the_system_does_not_tell_is_one_line(fake: FakeRoot, text: str) -> None:
    fake.write("proc/meminfo", text)
    with pytest.raises(ConfigError, match=r"proc/meminfo does not tell MemTotal and MemAvailable.*mount /proc"):
        fake.read()


def test_this_machine_can_be_read() -> None:
    machine = read_machine()
    assert 1 <= machine.num_cpus <= machine.num_host_cpus
    assert 0 < machine.available_memory_bytes <= machine.total_memory_bytes


def test_without_limits_the_machine_counts(fake: FakeRoot) -> None:
    machine = fake.read(affinity=8)
    assert (machine.num_cpus, machine.total_memory_bytes, machine.available_memory_bytes) == (8, 16 * GIB, 12 * GIB)
    assert machine.memory_limit == ""


def test_v2_limits(fake: FakeRoot) -> None:
    fake.v2(
        "/job", cpu_max="150000 100000", memory_max=900 * MIB, memory_current=300 * MIB,
        memory_stat=f"anon 1\ninactive_file {100 * MIB}\nactive_file 7",
    )  # fmt: skip
    machine = fake.read()
    assert machine.num_cpus == 1, (
        "one and a half CPUs' worth of time is slower for two threads that wait for each other"
    )
    assert machine.cpu_limit.endswith("/sys/fs/cgroup/job/cpu.max")
    assert machine.total_memory_bytes == 900 * MIB
    assert machine.available_memory_bytes == 700 * MIB, "the file cache is given up first"
    assert machine.memory_limit.endswith("/sys/fs/cgroup/job/memory.max")


def test_v2_without_limits(fake: FakeRoot) -> None:
    fake.v2("/", cpu_max="max 100000", memory_max="max", memory_current=1)
    assert fake.read() == FakeRoot(fake.root).read()


def test_a_limit_above_holds_below(fake: FakeRoot) -> None:
    fake.v2("/pod/container", memory_max="max", memory_current=10 * MIB, cpu_max="400000 100000")
    fake.write("/sys/fs/cgroup/pod/memory.max", 2 * GIB)
    fake.write("/sys/fs/cgroup/pod/memory.current", GIB)
    fake.write("/sys/fs/cgroup/pod/cpu.max", "200000 100000")
    machine = fake.read()
    assert (machine.available_memory_bytes, machine.num_cpus) == (GIB, 2)


def test_where_the_kernel_stalls_is_a_limit_too(fake: FakeRoot) -> None:
    fake.v2("/s", memory_max=4 * GIB, memory_high=2 * GIB, memory_current=0)
    assert fake.read().available_memory_bytes == 2 * GIB


def test_v1_limits(fake: FakeRoot) -> None:
    fake.v1(
        "memory", "/box", memory_limit_in_bytes=900 * MIB, memory_usage_in_bytes=400 * MIB,
        memory_stat=f"cache 9\ntotal_inactive_file {50 * MIB}",
    )  # fmt: skip
    fake.v1("cpu,cpuacct", "/box", cpu_cfs_quota_us=300000, cpu_cfs_period_us=100000)
    machine = fake.read()
    assert (machine.num_cpus, machine.available_memory_bytes) == (3, 550 * MIB)


def test_v1_without_limits(fake: FakeRoot) -> None:
    fake.v1("memory", "/", memory_limit_in_bytes=9223372036854771712, memory_usage_in_bytes=GIB)
    fake.v1("cpu,cpuacct", "/", cpu_cfs_quota_us=-1, cpu_cfs_period_us=100000)
    assert fake.read() == FakeRoot(fake.root).read()


def test_v1_beside_v2(fake: FakeRoot) -> None:
    """As systemd's hybrid hierarchy has it."""
    fake.v1("memory", "/box", memory_limit_in_bytes=GIB, memory_usage_in_bytes=0)
    fake.v2("/user.slice", point="/sys/fs/cgroup/unified")
    assert fake.read().available_memory_bytes == GIB


def test_a_container_sees_only_its_own_group(fake: FakeRoot) -> None:
    """Without a namespace /proc/self/cgroup gives the host's path, and the mount shows only what lies below it."""
    fake.v1("memory", "/docker/abc", top="/docker/abc", memory_limit_in_bytes=GIB, memory_usage_in_bytes=0)
    assert fake.read().available_memory_bytes == GIB


def test_a_group_outside_of_what_is_mounted(fake: FakeRoot) -> None:
    """Docker beside a kernel that gives a path of the host: the mounted group is the nearest that can be seen."""
    fake.v1("memory", "/elsewhere", top="/docker/abc")
    fake.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", GIB)
    fake.write("/sys/fs/cgroup/memory/memory.usage_in_bytes", 0)
    assert fake.read().available_memory_bytes == GIB


def test_more_is_used_than_may_be(fake: FakeRoot) -> None:
    fake.v2("/s", memory_max=GIB, memory_current=2 * GIB)
    assert fake.read().available_memory_bytes == 0


def test_affinity_limits(fake: FakeRoot) -> None:
    assert fake.read(affinity=1).num_cpus == 1
    fake.v2("/s", cpu_max="50000 100000")
    assert fake.read(affinity=4).num_cpus == 1, "at least one"


def test_broken_files_limit_nothing(fake: FakeRoot) -> None:
    fake.v2("/s", cpu_max="", memory_max="?", memory_current="?")
    assert fake.read().available_memory_bytes == 12 * GIB


@pytest.mark.parametrize("name", ["/media/Übung", "/media/\udcff", "/media/a\u2028b"])
def test_mounts_and_groups_may_have_any_name(name: str, fake: FakeRoot) -> None:
    """A USB stick with such a name ended every command with an error about text that is not UTF-8."""
    fake.mounts.append(f"99 23 0:77 / {name} rw - vfat /dev/sdb1 rw")
    fake.v2(name, memory_max=GIB, memory_current=0)
    assert fake.read().available_memory_bytes == GIB


def test_spaces_of_a_mount_are_escaped(fake: FakeRoot) -> None:
    fake.v2("/s", point="/my groups/é", memory_max=GIB, memory_current=0)
    fake.mounts = [mount.replace("/my groups", "/my\\040groups") for mount in fake.mounts]
    assert fake.read().available_memory_bytes == GIB


def test_the_fewest_threads_that_a_group_allows_count(fake: FakeRoot) -> None:
    assert fake.read().num_more_threads is None
    fake.v1("pids", "/docker/abc", pids_max=512, pids_current=12)
    fake.write("/sys/fs/cgroup/pids/docker/pids.max", "max")
    fake.write("/sys/fs/cgroup/pids/pids.max", 4096)
    fake.write("/sys/fs/cgroup/pids/pids.current", 90)
    machine = fake.read()
    assert machine.num_more_threads == 500 and machine.thread_limit.endswith("/pids/docker/abc/pids.max")
    fake.v2("/s", pids_max=100, pids_current=200)
    assert fake.read().num_more_threads == 0
