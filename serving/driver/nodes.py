"""On a cluster that was there before, nodes come and go: gateways follow them, one on each, at the same ports, and each must have
Packtrain's settings."""

import logging
import threading
from collections.abc import Callable, Mapping

from ray.exceptions import RayError

from cluster.ray_api import alive_nodes, draining_nodes
from serving.contracts.start_failure import StartError
from serving.driver import applications, joined
from serving.driver.environment import CLUSTER_VARIABLES

logger = logging.getLogger(__name__)

PERIOD_S = 5.0
LOOK_TIMEOUT_S = 10.0


def hosts_by_node() -> dict[str, str]:
    """Addresses of the nodes that live and are not to end, by node. Raises RayError."""
    ending = draining_nodes(LOOK_TIMEOUT_S)
    return {node.node_id: node.ip for node in alive_nodes() if node.node_id not in ending}


def node_problem() -> str:
    """Which node was started without a setting that Packtrain needs; "" when none was. Raises TimeoutError, RayError."""
    return joined.environment_problem(CLUSTER_VARIABLES)


class NodeFollower:
    """Looks at the nodes that come and go. What one that has come lacks is told in the log. Where gateways follow the nodes,
    Serve is told how many there are to be; it puts at most one on a node, and takes those away first that have none."""

    def __init__(
        self,
        num_gateways: int | None,
        *,
        look: Callable[[], Mapping[str, str]] = hosts_by_node,
        order: Callable[[int], None] = applications.set_num_gateways,
        problem: Callable[[], str] = node_problem,
        period_s: float = PERIOD_S,
    ) -> None:
        """`num_gateways` were ordered last; None where gateways do not follow. Looks from now on, until `close`."""
        self._num_gateways = num_gateways
        self._look, self._order, self._problem, self._period_s = look, order, problem, period_s
        self._known: frozenset[str] | None = None
        """Nodes whose settings were looked at; None before the first look: those were looked at when the cluster was joined."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nodes", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Order nothing any more."""
        self._stop.set()
        self._thread.join(LOOK_TIMEOUT_S)

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            try:
                self._follow(self._look())
            except (RayError, RuntimeError, OSError, StartError) as error:  # OSError: TimeoutError too
                logger.warning("nodes that have come or gone cannot be followed: %s", error)
            except Exception:  # the thread must outlive whatever the control store answers
                logger.exception("nodes that have come or gone cannot be followed")

    def _follow(self, hosts: Mapping[str, str]) -> None:
        wanted = max(1, len(set(hosts.values())))
        if self._num_gateways is not None and wanted != self._num_gateways:
            self._order(wanted)
            logger.info("%d gateways, and %d before, since nodes have come or gone", wanted, self._num_gateways)
            self._num_gateways = wanted
        if self._known is not None and hosts.keys() - self._known and (problem := self._problem()):
            logger.warning("%s", problem)
        self._known = frozenset(hosts)
