"""An autoscaler whose clock and ears a test has in its hand, through notes in Ray's control store."""

from collections.abc import Mapping

from cluster import ray_api
from serving.autoscaling.actor import AutoscalerActor
from serving.autoscaling.retirement import Control, Deployed, Replica

CLOCK_NOTE = "test/clock"
"""Seconds by which its clock is wrong."""
SILENCE_NOTE = "test/silence"
"""While it is there, no group and no gateway answers."""


class SwitchedAutoscaler(AutoscalerActor):
    def _clock(self) -> float:
        return super()._clock() + float(ray_api.read_note(CLOCK_NOTE) or 0.0)

    def _control(self) -> Control:
        return _Switched(super()._control())


class _Switched:
    def __init__(self, control: Control) -> None:
        self._control = control

    def deployed(self) -> Mapping[str, Deployed]:
        return self._control.deployed()

    def ask_all(self, deployment: str, method: str, *arguments: bytes) -> list[bytes]:
        answers = self._control.ask_all(deployment, method, *arguments)
        return [] if ray_api.read_note(SILENCE_NOTE) else answers

    def set_target(self, deployment: str, num_replicas: int) -> None:
        self._control.set_target(deployment, num_replicas)

    def kill(self, replica: Replica) -> None:
        self._control.kill(replica)
