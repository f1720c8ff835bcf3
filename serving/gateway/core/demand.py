"""How much has arrived at a gateway, for the autoscaler: counted once, before it is known what becomes of it."""

from collections.abc import Iterable, Sequence

from model_parallel.engine.request import EngineRequest
from serving.contracts.fleet import ModelDemand


class DemandCounter:
    """Totals since the gateway started, by model."""

    def __init__(self, models: Iterable[str]) -> None:
        self.totals = {model: ModelDemand(0, 0) for model in models}

    def count(self, model: str, requests: Sequence[EngineRequest]) -> None:
        """The choices of one client request."""
        before = self.totals.get(model, ModelDemand(0, 0))
        self.totals[model] = ModelDemand(
            before.num_sequences + len(requests),
            before.num_prompt_tokens + sum(len(request.prompt_token_ids) for request in requests),
        )
