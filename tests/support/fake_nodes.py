"""The machines of a fake cluster that Ray's own autoscaler starts and ends. It imports this in a process of its own."""

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class FakeNodes(FakeMultiNodeProvider):  # type: ignore[misc]  # Ray's is not typed
    """Ray's own, but one whose node manager was killed is gone, as a machine that has failed is for a cloud."""

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        with self.lock:
            failed = [
                node_id for node_id, about in self._nodes.items() if "node" in about and about["node"].dead_processes()
            ]
            for node_id in failed:
                self.terminate_node(node_id)
        left: list[str] = super().non_terminated_nodes(tag_filters)
        return left
