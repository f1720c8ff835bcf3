"""What this process may use of its machine: CPUs and memory, within the limits of its control groups and its affinity.

`os.cpu_count` and /proc/meminfo tell of the whole machine. A container, a job of a batch system and `taskset` give a process
less, and the kernel ends or slows down the one that takes more.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model_parallel.errors import ConfigError

ROOT = Path("/")
_UNLIMITED_BYTES = 1 << 60
"""Control groups v1 write a number near 2^63 for "no limit"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A snapshot."""

    num_cpus: int
    """CPUs that can work for this process at the same time; at least 1."""
    num_host_cpus: int
    total_memory_bytes: int
    """The machine's, or the limit of a control group where that is less."""
    available_memory_bytes: int
    """What can be taken now without swapping and without reaching a limit."""
    memory_limit: str = ""
    """The file of the control group that limits memory to less than the machine has; "" when none does."""
    cpu_limit: str = ""
    """What limits CPUs to fewer than the machine has: the file of a control group, or "CPU affinity"; "" when nothing does."""
    num_more_threads: int | None = None
    """Which control groups still allow, each process counted as one; None when none limits them."""
    thread_limit: str = ""
    """The file of the control group that allows the fewest."""


def read_machine(root: Path = ROOT, affinity: int | None = None) -> Machine:
    """Look at /proc and at the control groups below `root`, and at this process's affinity (or `affinity` CPUs).
    Raises ConfigError where /proc does not tell the memory."""
    num_host_cpus = os.cpu_count() or 1
    num_cpus, cpu_limit = len(os.sched_getaffinity(0)) if affinity is None else affinity, ""
    if num_cpus < num_host_cpus:
        cpu_limit = "CPU affinity"
    total, available = _host_memory(root)
    memory_limit = thread_limit = ""
    num_more_threads: int | None = None
    for group in _control_groups(root):
        if (quota := group.cpu_quota()) is not None and max(1, int(quota)) < num_cpus:
            num_cpus, cpu_limit = max(1, int(quota)), str(group.file("cpu"))
        if (limit := group.memory_limit_bytes()) is not None:
            available = min(available, max(0, limit - group.memory_used_bytes()))
            if limit < total:
                total, memory_limit = limit, str(group.file("memory"))
        if (more := group.num_more_threads()) is not None and (num_more_threads is None or more < num_more_threads):
            num_more_threads, thread_limit = more, str(group.file("pids"))
    return Machine(
        num_cpus=num_cpus,
        num_host_cpus=num_host_cpus,
        total_memory_bytes=total,
        available_memory_bytes=available,
        memory_limit=memory_limit,
        cpu_limit=cpu_limit,
        num_more_threads=num_more_threads,
        thread_limit=thread_limit,
    )


def _host_memory(root: Path) -> tuple[int, int]:
    """(all, available) bytes, of /proc/meminfo. What is available includes caches that the kernel gives up."""
    path = root / "proc/meminfo"
    found = dict(re.findall(r"^(MemTotal|MemAvailable): *(\d+) kB$", _words(path), re.MULTILINE))
    if len(found) < 2:
        raise ConfigError(f"{path} does not tell MemTotal and MemAvailable, the machine's memory; mount /proc")
    return int(found["MemTotal"]) * 1024, int(found["MemAvailable"]) * 1024


@dataclass(frozen=True, slots=True)
class _ControlGroup:
    """One directory of a hierarchy. Files that are not there limit nothing: a kernel need not have every controller."""

    directory: Path
    is_v2: bool

    def file(self, resource: str) -> Path:
        """The file that holds the limit on "cpu", "memory" or "pids"."""
        names = {
            "cpu": ("cpu.cfs_quota_us", "cpu.max"),
            "memory": ("memory.limit_in_bytes", "memory.max"),
            "pids": ("pids.max", "pids.max"),
        }
        return self.directory / names[resource][self.is_v2]

    def cpu_quota(self) -> float | None:
        """CPUs' worth of time; None without a limit."""
        if self.is_v2:
            quota, _, period = _words(self.directory / "cpu.max").partition(" ")
        else:
            quota, period = _words(self.directory / "cpu.cfs_quota_us"), _words(self.directory / "cpu.cfs_period_us")
        if not (quota.isdigit() and period.isdigit() and int(period)):
            return None  # "max" in v2, -1 in v1
        return int(quota) / int(period)

    def num_more_threads(self) -> int | None:
        """None without a limit."""
        limit, used = _words(self.file("pids")), _words(self.directory / "pids.current")
        return max(0, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else None

    def memory_limit_bytes(self) -> int | None:
        """None without a limit. Of v2 the smaller of `memory.max`, where the kernel kills, and `memory.high`, where it stalls."""
        names = ("memory.max", "memory.high") if self.is_v2 else ("memory.limit_in_bytes",)
        limits = [int(word) for name in names if (word := _words(self.directory / name)).isdigit()]
        limit = min(limits, default=_UNLIMITED_BYTES)
        return limit if limit < _UNLIMITED_BYTES else None

    def memory_used_bytes(self) -> int:
        """Without the file cache that the kernel gives up first."""
        used = _words(self.directory / ("memory.current" if self.is_v2 else "memory.usage_in_bytes"))
        wanted = "inactive_file" if self.is_v2 else "total_inactive_file"
        reclaimable = 0
        for line in _words(self.directory / "memory.stat").splitlines():
            name, _, value = line.partition(" ")
            if name == wanted:
                reclaimable = int(value)
        return max(0, int(used) - reclaimable) if used.isdigit() else 0


def _words(path: Path) -> str:
    """Paths in it, of mounts and of groups, may have any bytes."""
    try:
        return os.fsdecode(path.read_bytes()).strip()
    except OSError:
        return ""


def _control_groups(root: Path) -> Iterator[_ControlGroup]:
    """Those that this process is in, with all above them: a limit holds for everything below."""
    mounts = list(_mounts(root))
    for line in filter(None, _words(root / "proc/self/cgroup").split("\n")):
        hierarchy, controllers, path = line.split(":", 2)
        wanted = set(controllers.split(",")) & {"cpu", "memory", "pids"}
        is_v2 = hierarchy == "0" and not controllers
        for mount in mounts:
            if mount.is_v2 == is_v2 and (is_v2 or wanted & mount.controllers):
                for directory in mount.directories(path):
                    yield _ControlGroup(directory, is_v2)


@dataclass(frozen=True, slots=True)
class _Mount:
    """A hierarchy as this process sees it."""

    point: Path
    top: str
    """Which group of the hierarchy lies at `point`: a container may see only its own."""
    controllers: frozenset[str]
    is_v2: bool

    def directories(self, path: str) -> list[Path]:
        """Of the group at `path` of the hierarchy, and of those above it that can be seen."""
        top = self.top.rstrip("/")
        inside = path[len(top) :] if path == top or path.startswith(f"{top}/") else ""
        parts = [part for part in inside.split("/") if part not in ("", "..")]
        return [self.point.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _mounts(root: Path) -> Iterator[_Mount]:
    """Of /proc/self/mountinfo; see proc(5)."""
    for line in _words(root / "proc/self/mountinfo").split("\n"):
        before, _, after = line.partition(" - ")
        kind, _, options = after.partition(" ")
        if kind not in ("cgroup", "cgroup2"):
            continue
        fields = before.split(" ")
        controllers = frozenset(options.split(" ")[-1].split(","))
        yield _Mount(root / _unescaped(fields[4]).lstrip("/"), _unescaped(fields[3]), controllers, kind == "cgroup2")


def _unescaped(path: str) -> str:
    """A space is written \\040."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), path)
