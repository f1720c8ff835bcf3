"""What the autoscaler's process is started with."""

from collections.abc import Iterable

import msgspec

from cluster.autoscaler import Mode, ScaledModel
from cluster.policy import ModelPolicy
from cluster.policy.config import STALE_AFTER_S
from serving.config import AutoscalerConfig, ModelEntry
from serving.contracts.served import APP_NAME, app_name, deployment_name


class ScaledDeployment(msgspec.Struct, frozen=True, kw_only=True):
    """One model, and the deployment whose replicas are its groups."""

    app: str
    """Serve's application that it belongs to."""
    deployment: str
    scaled: ScaledModel


class AutoscalerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Of all models of a cluster."""

    app: str
    """Serve's application of the gateways."""
    gateway: str
    """Name of the gateways' deployment."""
    models: dict[str, ScaledDeployment]
    period_s: float
    """Between two looks."""
    max_ranks: int | None = None
    """Of the groups of all models together."""

    @property
    def apps(self) -> dict[str, str]:
        """Serve's application of each deployment."""
        return {self.gateway: self.app} | {model.deployment: model.app for model in self.models.values()}


def settings_of(entries: Iterable[ModelEntry], config: AutoscalerConfig, gateway: str) -> AutoscalerSettings | None:
    """`gateway` is the name of the gateways' deployment. None when no model has a mode other than off."""
    models = {
        entry.name: ScaledDeployment(app=app_name(entry.name), deployment=deployment_name(entry.name), scaled=scaled)
        for entry in entries
        if (scaled := _scaled(entry, config.period_s)) is not None
    }
    if not models:
        return None
    return AutoscalerSettings(
        app=APP_NAME, gateway=gateway, models=models, period_s=config.period_s, max_ranks=config.max_ranks
    )


def _scaled(entry: ModelEntry, period_s: float) -> ScaledModel | None:
    scaling = entry.autoscaling
    if scaling is None or not entry.is_scaled:
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
        stale_after_s=max(STALE_AFTER_S, period_s),
    )
    return ScaledModel(policy=policy, mode=Mode(scaling.mode))
