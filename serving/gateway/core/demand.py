"""How much has arrived at a gateway, for the autoscaler: counted once, before it is known what becomes of it."""

from collections.abc import Iterable, Sequence

from model_parallel.engine.request import EngineRequest
from serving.contracts.fleet import ModelDemand


class DemandCounter:
    """Totals of each model that is served, since the gateway serves it."""

    def __init__(self, models: Iterable[str]) -> None:
        self.totals = {model: ModelDemand(0, 0) for model in models}

    def add_model(self, model: str) -> None:
        """Count for it from now on, if not before."""
        self.totals.setdefault(model, ModelDemand(0, 0))

    def forget_model(self, model: str) -> None:
        """It is not served any more."""
        del self.totals[model]

    def count(self, model: str, requests: Sequence[EngineRequest]) -> None:
        """The choices of one client request. Nothing is counted for a model that has gone since the request came."""
        if (before := self.totals.get(model)) is None:
            return
        self.totals[model] = ModelDemand(
            before.num_sequences + len(requests),
            before.num_prompt_tokens + sum(len(request.prompt_token_ids) for request in requests),
        )
