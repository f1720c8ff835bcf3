"""Environment variables around Ray: what a user's shell, container or batch system sets must not decide how a cluster starts.

`prepare_environment` runs before Ray is imported, because Ray and Serve read many of theirs at import.
"""

import os
import pwd
import secrets
import shutil
import warnings
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

from cluster.guard import MAX_PARENT_BYTES
from model_parallel.directories import cache_directory, private_directories, temporary_parents, why_not_writable
from model_parallel.errors import ConfigError

_MIN_FREE_BYTES = 64 << 20
"""Of a temporary directory: Ray's logs, sockets and session files."""

OBJECT_STORE_BYTES = 80 << 20
"""Of a private cluster. Ray takes no less than 75 MiB."""
SHARED_MEMORY = Path("/dev/shm")

PROCESS_TIMEOUT_S = 300
"""Of processes that Ray starts. A machine that has other work to do may take longer than the minute that Ray gives them."""

# For the processes of a private cluster, and not for this one.
CLUSTER_VARIABLES = {
    # Our code and Serve's router run in one event loop: no token changes threads on its way.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # What start-up leaves is not looked through again by every garbage collection; request logs are written in bulk.
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    # Ten looks a second at a handful of replicas cost 5 % of what two cores can serve; two are enough.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # Ray's control store would keep a record of each of the last 100,000 calls: 37 MB an hour at seven requests a second.
    "RAY_task_events_report_interval_ms": "0",
    # Nobody reads Ray's own metrics; sending them every ten seconds made its node manager grow by 7 MB an hour.
    "RAY_enable_metrics_collection": "0",
    # The C library gives 8 lots of memory a core to a process's threads, and each grows to a high-water mark of its own.
    "MALLOC_ARENA_MAX": "4",
}
# Of a private cluster alone.
_OF_A_PRIVATE_CLUSTER = {
    "RAY_AUTH_MODE": "token",
    # Despite its name, on Linux too: Ray then keeps to 127.0.0.1. Otherwise it takes an address of the network in its place.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
_SWITCHES = {
    # Handles carry values instead of object references.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray forks its head from this process; gRPC's own fork handlers can leave the child hanging.
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    # A call that comes after the end must fail. Without this it starts a new cluster, which nobody would ever stop.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Serve's own log goes to its files; the terminal belongs to the command line.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(PROCESS_TIMEOUT_S),
    "RAY_worker_register_timeout_seconds": str(PROCESS_TIMEOUT_S),
    "RAY_agent_register_timeout_ms": str(1000 * PROCESS_TIMEOUT_S),
}
# Of a process that joins a cluster, whatever its container has for the nodes: the driver calls gateways from plain threads,
# which no event loop runs in, and its calls after the end must fail.
_OF_WHO_JOINS = {
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
}
_NO_PROXY = ("localhost", "127.0.0.1", "::1")
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")
_TOKEN = secrets.token_hex(32)
"""Of every private cluster of this process: Ray keeps the first that it reads."""


def prepare_environment(*, joins: bool = False, environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Set Ray's switches for this process and all that it starts. Returns the names of variables that are no longer set.

    A private cluster takes nothing from variables named RAY_*. With `joins` they stay, but for what its nodes need and the
    driver must not have: they say how the cluster at hand is reached.
    """
    removed = []
    if not joins:
        removed = sorted(name for name in environment if name.startswith("RAY_") and name not in _SWITCHES)
        for name in removed:
            del environment[name]
        environment.update(_OF_A_PRIVATE_CLUSTER)
    for name, value in _SWITCHES.items():
        if joins:
            environment.setdefault(name, value)
        else:
            environment[name] = value
    if joins:
        environment.update(_OF_WHO_JOINS)
    environment.update(without_proxy(environment))
    return sorted([*removed, *_remove_what_breaks_imports(environment)])


def _remove_what_breaks_imports(environment: MutableMapping[str, str]) -> list[str]:
    """Ray Serve cannot be imported while warnings are errors, Ray's agent not without docstrings, which PYTHONOPTIMIZE=2 leaves
    out, nor torch with log settings that it does not know."""
    broken = {"TORCH_LOGS", "PYTHONOPTIMIZE"} & environment.keys()
    if "error" in environment.get("PYTHONWARNINGS", ""):
        broken.add("PYTHONWARNINGS")
        warnings.filters[:] = [entry for entry in warnings.filters if entry[0] != "error"]  # type: ignore[index]
    for name in broken:
        del environment[name]
    return sorted(broken)


def without_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep calls to this machine from a proxy. gRPC sends calls to 127.0.0.1 through one otherwise.

    Everything else, such as traces to a collector, goes through the proxy as before.
    """
    if not any(name.lower() in _PROXIES for name in environment):
        return {}
    changes = {}
    names = [name for name in environment if name.lower() in ("no_proxy", "no_grpc_proxy") and environment[name]]
    for name in {"no_proxy", "NO_PROXY", *names}:
        before = [part for part in environment.get(name, environment.get("no_proxy", "")).split(",") if part.strip()]
        changes[name] = ",".join([*before, *(host for host in _NO_PROXY if host not in before)])
    return changes


def cluster_environment(directory: Path, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables for the processes of a private cluster that lives in `directory`: they write there or in the cache."""
    temporary = directory / "tmp"
    temporary.mkdir(mode=0o700, exist_ok=True)
    cache = cache_directory(environment)
    variables = CLUSTER_VARIABLES | {
        "TMPDIR": str(temporary),
        "RAY_AUTH_TOKEN_PATH": str(token_file(directory)),
        # Worker processes that nobody uses yet import what the next group will need.
        "RAY_preload_python_modules": "cluster.spare_start",
        # Ranks find compiled code where this process put it.
        "PACKTRAIN_CACHE": str(cache),
    }
    # Triton and its like fail where they cannot write what they have compiled.
    compiled = next(private_directories(environment), temporary) if why_not_writable(cache) else cache
    for name, place in (
        ("TRITON_CACHE_DIR", compiled / "triton"),
        ("TORCHINDUCTOR_CACHE_DIR", compiled / "inductor"),
        ("CUDA_CACHE_PATH", compiled / "cuda"),
    ):
        variables[name] = environment.get(name, str(place))
    home = environment.get("HOME")
    if not home or why_not_writable(Path(home), create=False):
        variables["HOME"] = str(temporary)
    if not any(environment.get(name) for name in ("LOGNAME", "USER")):
        variables["USER"] = _user_name()  # libraries ask for one, and fail where the user database has none
    return variables


def _user_name() -> str:
    with suppress(KeyError):
        return pwd.getpwuid(os.getuid()).pw_name
    return f"user-{os.getuid()}"


def token_file(directory: Path) -> Path:
    """The file with the token that processes of the cluster in `directory` show each other: only its owner can read it."""
    path = directory / "token"
    if not path.exists():
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(_TOKEN)
    return path


def cluster_parent(environment: Mapping[str, str] = os.environ, candidates: Iterable[Path] | None = None) -> Path:
    """Where a private cluster's directory is made: the first temporary directory with room and a short path in ASCII.

    Raises ConfigError that says why each was not taken.
    """
    reasons = []
    tried = list(temporary_parents(environment) if candidates is None else candidates)
    for parent in tried:
        if len(os.fsencode(parent)) > MAX_PARENT_BYTES:
            reasons.append(
                f"the path {parent} has more than {MAX_PARENT_BYTES} bytes, which is too long for Ray's sockets"
            )
        elif not str(parent).isascii():
            reasons.append(f"the path {parent} has characters beyond ASCII, with which Ray does not start")
        elif (free := os.statvfs(parent)).f_bavail * free.f_frsize < _MIN_FREE_BYTES:
            reasons.append(f"{parent} has less than {_MIN_FREE_BYTES >> 20} MiB free")
        else:
            return parent
    raise ConfigError(
        "TMPDIR: no temporary directory can be used ("
        + ("; ".join(reasons) or "TMPDIR, /tmp, /var/tmp and /dev/shm cannot be written")
        + "); set TMPDIR to a writable directory with a short path in ASCII"
    )


def object_store_directory(directory: Path, shared_memory: Path = SHARED_MEMORY) -> Path:
    """Where Ray's objects lie: in shared memory, or else in `directory`, which is the cluster's. Ray by itself does not start
    where there is no /dev/shm or it cannot be written."""
    return directory if why_no_object_store(shared_memory) else shared_memory


def why_no_object_store(shared_memory: Path = SHARED_MEMORY) -> str:
    """ "" when Ray's objects can lie there."""
    if reason := why_not_writable(shared_memory, create=False):
        return reason
    free = shutil.disk_usage(shared_memory).free
    return "" if free >= OBJECT_STORE_BYTES else f"has {free >> 20} of {OBJECT_STORE_BYTES >> 20} MiB free"
