"""The processes of a stack on this machine, found from the port that its gateway listens at."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import psutil

from model_parallel.errors import ConfigError

_LEADER, _RANK = "ray::ServeReplica:packtrain-model-", "ray::RankActor"
_STARTING = "initialize_and_get_metadata"
_POLL_S = 0.05
_End = tuple[str, int]
"""Address and port."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """One replica group that serves."""

    leader: int
    ranks: tuple[int, ...]

    @property
    def pids(self) -> tuple[int, ...]:
        """Leader and ranks."""
        return (self.leader, *self.ranks)


class LocalStack:
    """A stack whose processes are all on this machine."""

    def __init__(self, port: int) -> None:
        """Raises ConfigError when no gateway on this machine listens at the port."""
        self._raylet = _raylet_of(port)

    def groups(self) -> list[Group]:
        """Those that serve now. Which ranks are whose is told by the connections between them."""
        workers = {process.pid: _title(process) for process in self._workers()}
        leaders = {pid for pid, title in workers.items() if title.startswith(_LEADER) and not title.endswith(_STARTING)}
        ranks = {pid for pid, title in workers.items() if title.startswith(_RANK)}
        ends = {pid: _ends(pid) for pid in leaders | ranks}
        owner = {local: pid for pid in leaders for local, _ in ends[pid]}
        ranks_of: dict[int, list[int]] = {leader: [] for leader in leaders}
        for rank in sorted(ranks):
            for leader in {owner[remote] for _, remote in ends[rank] if remote in owner}:
                ranks_of[leader].append(rank)
        return [Group(leader=leader, ranks=tuple(pids)) for leader, pids in sorted(ranks_of.items()) if pids]

    def await_groups(self, sizes: Iterable[int], timeout_s: float, without: Iterable[int] = ()) -> list[Group]:
        """When groups of these numbers of ranks serve, none with a process of `without`. Raises TimeoutError."""
        expected, gone = sorted(sizes), set(without)
        found: list[Group] = []

        def are_there() -> bool:
            found[:] = self.groups()
            has_gone = gone.isdisjoint(pid for group in found for pid in group.pids)
            return has_gone and sorted(len(group.ranks) for group in found) == expected

        wait_until(are_there, timeout_s, f"{len(expected)} groups serve")
        return found

    def _workers(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._raylet).children()
        except psutil.NoSuchProcess:
            raise ConfigError("the stack has ended") from None


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Raises TimeoutError."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(_POLL_S)


def state_of(pid: int) -> str:
    """psutil's word for what a process does; "" when it is gone."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return ""


def is_gone(pid: int) -> bool:
    """It has ended, whether or not its parent has noticed."""
    return state_of(pid) in ("", psutil.STATUS_ZOMBIE)


def _raylet_of(port: int) -> int:
    for connection in psutil.net_connections("tcp"):
        if connection.status != psutil.CONN_LISTEN or connection.pid is None:
            continue
        if cast(_End, tuple(connection.laddr))[1] == port:
            parent = psutil.Process(connection.pid).parent()
            if parent is not None and "raylet" in parent.name():
                return int(parent.pid)
            raise ConfigError(
                f"process {connection.pid} listens at port {port}, and is no gateway that Ray has started"
            )
    raise ConfigError(
        f"no gateway on this machine listens at port {port}, or its processes are another user's; faults are for a stack that "
        "runs here"
    )


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.NoSuchProcess:
        return ""


def _ends(pid: int) -> set[tuple[_End, _End]]:
    """(own end, other end) of the connections of a process."""
    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except psutil.NoSuchProcess:
        return set()
    return {(cast(_End, tuple(one.laddr)), cast(_End, tuple(one.raddr))) for one in connections if one.raddr}
