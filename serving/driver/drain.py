"""The end of a node of a joined cluster: told to Ray before the node is stopped, so that what runs there ends in good order."""

import time
from collections.abc import Callable
from pathlib import Path

from cluster.placement import DRIVER_RESOURCE
from cluster.ray_api import ClusterControl, RayError

CONTROL_TIMEOUT_S = 5.0
SETTLE_S = 10.0
"""How long head and driver wait for other nodes to say that they end, when the whole cluster is taken down."""
_POLL_S = 0.25
_REPLICA_TITLE = "ray::ServeReplica:"


def drain_node(address: str, timeout_s: float, proc: Path = Path("/proc")) -> str:
    """Drain the node of this host, for `timeout_s` at most, and say what came of it. The head waits for other nodes that
    drain, and so does the driver's node, which has the quota authority.

    Never raises for a cluster that cannot be reached: then nothing is left to wait for but the replicas of this host.
    """
    deadline_s = time.monotonic() + timeout_s
    try:
        control = ClusterControl(address, CONTROL_TIMEOUT_S)
        node = control.local_node()
        if node is None:
            return "no Ray node runs here"
        if node.is_head or DRIVER_RESOURCE in node.resources:
            return _wait_for_others(control, deadline_s)
        problem = control.drain(node.node_id, "the pod ends", timeout_s)
    except (RayError, RuntimeError, OSError) as error:
        problem = str(error) or type(error).__name__
    told = f"Ray could not be told ({problem}); " if problem else ""
    is_empty = _wait(lambda: not replicas_here(proc), deadline_s)
    return told + ("all replicas here have ended" if is_empty else f"replicas are still here after {timeout_s:g} s")


def replicas_here(proc: Path) -> list[int]:
    """Process ids of Serve's replicas on this host: gateways, and leaders of groups."""
    found = []
    for directory in proc.iterdir():
        if not directory.name.isdigit():
            continue
        try:
            title = (directory / "cmdline").read_bytes()
        except OSError:
            continue  # it ended meanwhile
        if title.startswith(_REPLICA_TITLE.encode()):
            found.append(int(directory.name))
    return found


def _wait_for_others(control: ClusterControl, deadline_s: float) -> str:
    """They go last: Serve's controller ends replicas elsewhere, and the quota authority takes their last usage records."""
    time.sleep(max(0.0, min(SETTLE_S, deadline_s - time.monotonic())))

    def is_quiet() -> bool:
        node = control.local_node()
        return node is None or node.num_draining == 0

    try:
        is_over = _wait(is_quiet, deadline_s)
    except (RayError, RuntimeError, OSError) as error:
        return f"the control store cannot be asked any more ({error})"
    return "no other node is ending" if is_over else "other nodes are still ending"


def _wait(condition: Callable[[], bool], deadline_s: float) -> bool:
    while not condition():
        if time.monotonic() >= deadline_s:
            return False
        time.sleep(_POLL_S)
    return True
