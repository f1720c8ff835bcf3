"""What the autoscaler's process is started with."""

import msgspec

from cluster.autoscaler import Mode, ScaledModel
from cluster.policy import ModelPolicy
from serving.config import ModelEntry, ServingConfig


class ScaledDeployment(msgspec.Struct, frozen=True, kw_only=True):
    """One model, and the deployment whose replicas are its groups."""

    deployment: str
    scaled: ScaledModel


class AutoscalerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Of one application of Serve."""

    app: str
    gateway: str
    """Name of the gateways' deployment."""
    models: dict[str, ScaledDeployment]
    period_s: float
    """Between two looks."""
    max_ranks: int | None = None
    """Of the groups of all models together."""


def settings_of(
    config: ServingConfig, app: str, gateway: str, deployments: dict[str, str]
) -> AutoscalerSettings | None:
    """`deployments` by model. None when no model has a mode other than off."""
    models = {
        entry.name: ScaledDeployment(deployment=deployments[entry.name], scaled=scaled)
        for entry in config.models
        if (scaled := _scaled(entry)) is not None
    }
    if not models:
        return None
    return AutoscalerSettings(
        app=app,
        gateway=gateway,
        models=models,
        period_s=config.autoscaler.period_s,
        max_ranks=config.autoscaler.max_ranks,
    )


def _scaled(entry: ModelEntry) -> ScaledModel | None:
    scaling = entry.autoscaling
    if scaling is None or scaling.mode == "off":
        return None
    policy = ModelPolicy(
        min_groups=scaling.min_groups,
        max_groups=scaling.max_groups,
        ttft_p99_s=scaling.ttft_p99_s,
        tpot_p99_s=scaling.tpot_p99_s,
        accelerators_per_group=entry.tensor_parallel_size,
        priority=scaling.priority,
        start_timeout_s=2 * entry.start_timeout_s,
        shrink_after_s=scaling.shrink_after_s,
        cooldown_s=scaling.cooldown_s,
        idle_s=scaling.idle_s,
    )
    return ScaledModel(policy=policy, mode=Mode(scaling.mode))
