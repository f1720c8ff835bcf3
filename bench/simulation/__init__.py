"""What a cluster would do: the real scheduler, routing and quotas on a virtual clock; only the ranks are a cost model."""
