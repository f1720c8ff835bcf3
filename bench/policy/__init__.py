"""Autoscaling policies on the same traces, in a simulator of replica groups: `python -m bench.policy`."""
