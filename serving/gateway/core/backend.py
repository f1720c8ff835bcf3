"""What a gateway needs from whatever runs the models. Ray Serve implements it in serving/gateway/groups/serve_backend.py."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

from model_parallel.engine.request import EngineRequest
from serving.contracts.group_link import GroupOutputs
from serving.contracts.models import ModelCard


class Backend(Protocol):
    """Runs requests on replica groups."""

    @property
    def models(self) -> Mapping[str, ModelCard]:
        """Served models by name, adapters among them. It changes."""
        ...

    def generate(
        self, model: str, requests: Sequence[EngineRequest], trace_context: Mapping[str, str]
    ) -> AsyncGenerator[GroupOutputs, None]:
        """Run the choices of one client request on one group of `model`, which is no adapter; outputs that are ready together
        come together.

        The first item has no outputs and tells which group has accepted. Ends after every choice had its finish_reason. Closing
        the iterator (`aclose`), or cancelling the task that waits on it, cancels what still runs; while it is left alone, little
        more is computed. `trace_context` are headers that make the group's span a child of the gateway's, empty when nothing is
        traced. Raises GroupRefusedError when the group refuses the request, and GroupUnavailableError when no group can take it
        or the group is lost. After a refusal the next call goes to another group, if there is one.
        """
        ...

    async def can_serve(self, model: str) -> bool:
        """Whether some group of `model` can take a request now, or one will be started for it; bounded wait, never raises."""
        ...
