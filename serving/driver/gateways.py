"""On a cluster that was there before, gateways follow its nodes: one on each, at the same ports."""

import logging
import threading
from collections.abc import Callable

from ray.exceptions import RayError

from cluster.ray_api import alive_nodes, draining_nodes
from serving.contracts.start_failure import StartError
from serving.driver import applications, joined
from serving.driver.environment import CLUSTER_VARIABLES

logger = logging.getLogger(__name__)

PERIOD_S = 5.0
LOOK_TIMEOUT_S = 10.0


def num_hosts() -> int:
    """Addresses of nodes that live and are not to end. Raises RayError."""
    ending = draining_nodes(LOOK_TIMEOUT_S)
    return len({node.ip for node in alive_nodes() if node.node_id not in ending})


def node_problem() -> str:
    """Which node was started without a setting that Packtrain needs; "" when none was. Raises TimeoutError, RayError."""
    return joined.environment_problem(CLUSTER_VARIABLES)


class GatewayFollower:
    """Tells Serve how many gateways there are to be, whenever nodes have come or gone. Serve puts at most one on a node, and
    takes those away first that have none. What a node that has come lacks is told in the log."""

    def __init__(
        self,
        num_gateways: int,
        *,
        count: Callable[[], int] = num_hosts,
        order: Callable[[int], None] = applications.set_num_gateways,
        problem: Callable[[], str] = node_problem,
        period_s: float = PERIOD_S,
    ) -> None:
        """`num_gateways` were ordered last. Follows from now on, until `close`."""
        self._num_gateways = num_gateways
        self._count, self._order, self._problem, self._period_s = count, order, problem, period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gateways", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Order nothing any more."""
        self._stop.set()
        self._thread.join(LOOK_TIMEOUT_S)

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            try:
                wanted = max(1, self._count())
                if wanted != self._num_gateways:
                    self._order(wanted)
                    logger.info("%d gateways, and %d before, since nodes have come or gone", wanted, self._num_gateways)
                    self._num_gateways = wanted
                    if problem := self._problem():
                        logger.warning("%s", problem)
            except (RayError, RuntimeError, OSError, StartError) as error:  # OSError: TimeoutError too
                logger.warning("it cannot be told how many gateways there should be: %s", error)
