"""What is looked at before anything starts: each problem is one line that names the setting and says what to do.

`serve`, `doctor` and, for what concerns a checkpoint, `inspect` make the same checks and say the same. Nothing here imports
Ray or torch.
"""

import errno
import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from model_parallel.directories import cache_choice, why_not_writable
from model_parallel.errors import ConfigError
from model_parallel.machine import Machine
from model_parallel.native import is_ready
from serving.config import AdminConfig, ModelEntry, ServingConfig
from serving.contracts.addresses import can_share_a_port, explain_listening, listening_addresses, why_not_listening

MIN_FILE_BYTES = 256 << 20
"""Ray's object store is a file of some 80 MiB, and logs grow."""

_THREADS_OF_A_STACK = 230
"""Ray, Serve, the driver, a gateway and a leader on two cores; more where there are more."""
_THREADS_OF_A_RANK = 25

_LOOPBACK = "127.0.0.1"
_CONNECT_TIMEOUT_S = 5.0

Probe = Callable[[str, int], int]
"""(address, port) to the errno of listening there; 0 when it works."""


class StartRefusedError(ConfigError):
    """Nothing was started. Each line of the message is one problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class Listener:
    """One port that serving opens."""

    setting: str
    flag: str
    host: str
    port: int
    can_move: bool = False
    """Nobody chose this port, and no client knows it by heart: where it is taken, another one will do."""

    def problem(self, probe: Probe = why_not_listening) -> str:
        """Why it cannot be opened, and what to do; "" when it can. Raises ConfigError for a host that does not resolve."""
        for address in listening_addresses(self.host):
            if number := probe(address, self.port):
                reason = explain_listening(number, address, self.port)
                hint = f"choose another port with {self.flag}, or 0 for a free one"
                if number == errno.EADDRNOTAVAIL:
                    hint = "choose an address of this machine with --host"
                elif number == errno.EADDRINUSE and (owner := port_owner(self.port)):
                    reason += f" by {owner}"
                return f"{self.setting} ({self.flag}): {reason}; {hint}"
        return ""


def listeners(config: ServingConfig) -> list[Listener]:
    """Every port that this configuration opens on this machine, in the order in which they are told. The gateways of a cluster
    that is joined run on other machines."""
    gateway, admin = config.gateway, config.admin
    found = []
    if config.ray.address is None:
        found.append(Listener(setting="gateway.port", flag="--port", host=gateway.host, port=gateway.port))
        if gateway.http_port is not None:
            found.append(
                Listener(setting="gateway.http_port", flag="--http-port", host=gateway.host, port=gateway.http_port)
            )
        if admin.metrics_port is not None:
            found.append(_operators(admin, "metrics_port", "--metrics-port", admin.metrics_port))
    if admin.port is not None and config.serves_admin:
        found.append(_operators(admin, "port", "--admin-port", admin.port))
    return found


def _operators(admin: AdminConfig, name: str, flag: str, port: int) -> Listener:
    chosen = name in admin.model_fields_set
    return Listener(setting=f"admin.{name}", flag=flag, host=admin.host, port=port, can_move=not chosen)


def check_ports(config: ServingConfig, probe: Probe = why_not_listening) -> tuple[ServingConfig, list[str], list[str]]:
    """(the configuration with ports moved that may be, what was moved, problems)."""
    problems, moved = [], []
    admin: dict[str, int] = {}
    taken: dict[int, list[tuple[Listener, set[str]]]] = {}
    for listener in listeners(config):
        addresses: set[str] = set()
        try:
            addresses.update(listening_addresses(listener.host))
            problem = listener.problem(probe)
        except ConfigError as error:
            problem = f"{listener.setting.partition('.')[0]}.host (--host): {error}"
        others = taken.setdefault(listener.port, []) if listener.port else []
        other = next((each for each, its in others if not _can_share(its, addresses)), None)
        if not problem and other is not None:
            problem = (
                f"{listener.setting} ({listener.flag}): {listener.port} is {other.setting} ({other.flag}) already; "
                "choose another port, or 0 for a free one"
            )
        others.append((listener, addresses))
        if problem and listener.can_move and "in use" in problem:
            admin[listener.setting.partition(".")[2]] = 0
            moved.append(
                f"{listener.setting} {listener.port} is in use; a free port is taken ({listener.flag} chooses one)"
            )
        elif problem and problem not in problems:
            problems.append(problem)
    if admin:
        config = config.model_copy(update={"admin": config.admin.model_copy(update=admin)})
    return config, moved, problems


def _can_share(some: set[str], others: set[str]) -> bool:
    return all(can_share_a_port(one, other) for one in some for other in others)


def check_file_size() -> None:
    """Let this process and what it starts write files as large as Ray's object store. Raises ConfigError when the system forbids
    it; who writes beyond the limit is killed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft == resource.RLIM_INFINITY or soft >= MIN_FILE_BYTES:
        return
    if hard != resource.RLIM_INFINITY and hard < MIN_FILE_BYTES:
        raise ConfigError(
            f"files may have {hard} bytes at most, and files of {MIN_FILE_BYTES} bytes are needed; raise the limit (ulimit -Hf)"
        )
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def check_loopback() -> None:
    """Whether a private cluster can lie on loopback. Raises ConfigError; Ray would try for minutes."""
    try:
        with (
            socket.create_server((_LOOPBACK, 0)) as server,
            socket.create_connection(server.getsockname(), _CONNECT_TIMEOUT_S),
        ):
            return
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(
            f"nothing can connect to {_LOOPBACK} ({reason}), where Ray's processes meet; bring `lo` up with that address"
        ) from error


def port_owner(port: int, root: Path = Path("/")) -> str:
    """The process that listens at a TCP port, as `name (pid)`; "" where that cannot be seen."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = (root / "proc/net" / table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:  # 0A: LISTEN
                inodes.add(f"socket:[{fields[9]}]")
    return next(_holders(inodes, root), "") if inodes else ""


def _holders(inodes: set[str], root: Path) -> Iterator[str]:
    for process in (root / "proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if any(str(fd.readlink()) in inodes for fd in (process / "fd").iterdir()):
                yield f"{(process / 'comm').read_text(errors='replace').strip()} (process {process.name})"
        except OSError:
            continue  # it ended, or belongs to somebody else


def check_cache() -> str:
    """Where files are kept when not where they should be; "" when all is as it should be."""
    path, unusable = cache_choice()
    if unusable is None:
        return _check_chosen_cache(path) if os.environ.get("PACKTRAIN_CACHE") else ""
    what = f"{unusable.setting}: {unusable.path}" if unusable.path else unusable.setting
    return f"{what} {unusable.reason}; models and compiled code go to {path} (PACKTRAIN_CACHE chooses)"


def _check_chosen_cache(path: Path) -> str:
    """One that is only read is as it should be where all is in it."""
    reason = why_not_writable(path)
    if not reason or (path.is_dir() and is_ready()):
        return ""
    return f"PACKTRAIN_CACHE: {path} {reason}; compiled code goes to a temporary directory, and no model can be fetched"


def check_compiler() -> str:
    """What is lost without a compiler; "" when there is one, or when all was compiled before."""
    if shutil.which("g++") is not None or is_ready():
        return ""
    return (
        "g++ is not installed and nothing compiled is in the cache: ranks on CPUs compute with the reference kernels, many "
        "times slower; install g++ (Debian: apt-get install g++)"
    )


def check_threads(machine: Machine, num_ranks: int) -> None:
    """Whether Ray's processes, a gateway and ranks may start as many threads as they do at least. Raises ConfigError; a process
    that may not start one ends, without a word that says why."""
    needed = _THREADS_OF_A_STACK + num_ranks * _THREADS_OF_A_RANK
    limits = (
        (machine.num_more_threads, machine.thread_limit, "docker: --pids-limit, systemd: TasksMax"),
        (num_more_threads_of_user(), "the limit on all processes of this user", "ulimit -Hu, systemd: LimitNPROC"),
    )
    for num_more, limit, how in limits:
        if num_more is not None and num_more < needed:
            raise ConfigError(
                f"processes and threads: Ray, gateway and {num_ranks} ranks need at least {needed}, and {limit} "
                f"allows {num_more} more; raise it ({how})"
            )


def num_more_threads_of_user(root: Path = Path("/")) -> int | None:
    """Which this process's user may start when the limit is raised as far as the system lets it, which is done here; None where
    nothing limits them. Root is not held back."""
    user = os.getuid()
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if user == 0 or soft == resource.RLIM_INFINITY:
        return None
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return None
    num_threads = 0
    for process in (root / "proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, StopIteration):  # it has ended, or is not to be seen
            if process.stat().st_uid == user:
                lines = (process / "status").read_text(errors="replace").splitlines()
                num_threads += int(next(line for line in lines if line.startswith("Threads:")).split()[1])
    return max(0, hard - num_threads)


def check_cpus(machine: Machine, num_threads: int) -> str:
    """Whether CPU ranks have a CPU for each of their threads; "" when they do."""
    if num_threads <= machine.num_cpus:
        return ""
    limit = f" ({machine.cpu_limit})" if machine.cpu_limit else ""
    return (
        f"{num_threads} threads of ranks share {machine.num_cpus} CPUs{limit}: they wait for each other at every step"
    )


def check_gpus(models: Sequence[ModelEntry], num_gpus: int) -> str:
    """Whether this machine has a GPU for each rank that begins on one; "" when it has."""
    on_gpus = [entry for entry in models if entry.device == "cuda"]
    needed = sum(entry.num_groups * entry.tensor_parallel_size for entry in on_gpus)
    if needed <= num_gpus:
        return ""
    names = ", ".join(f"models.{entry.name}" for entry in on_gpus)
    return f"{names}: device is cuda, and each of {needed} ranks needs a GPU; torch finds {num_gpus} on this machine"
