"""The autoscaler's process: looks at groups and gateways through Ray Serve, asks `cluster.policy`, and has Serve start and stop
whole groups."""
