"""How many replica groups each model should have. Pure: no clock, no Ray, no torch; the autoscaler and simulators call it.

Read in this order: `observation` (what is known), `config` (what is wanted), `capacity` (what a group can do), `demand` (what
arrives), `outlook` (how many are needed), `hysteresis` (when a change is allowed), `wants` (one model), `budget` (models that
share accelerators), `decide` (all of it together).
"""

from cluster.policy.config import ModelPolicy, PolicyConfig
from cluster.policy.decide import decide
from cluster.policy.decision import Cause, Decision, ModelDecision
from cluster.policy.observation import (
    GatewayLoad,
    GatewayObservation,
    GroupLoad,
    GroupObservation,
    ModelObservation,
    Observation,
    Phase,
    StepLine,
)
from cluster.policy.state import PolicyState, decode_state, encode_state

__all__ = [
    "Cause",
    "Decision",
    "GatewayLoad",
    "GatewayObservation",
    "GroupLoad",
    "GroupObservation",
    "ModelDecision",
    "ModelObservation",
    "ModelPolicy",
    "Observation",
    "Phase",
    "PolicyConfig",
    "PolicyState",
    "StepLine",
    "decide",
    "decode_state",
    "encode_state",
]
