"""What a gateway needs from whatever runs the models. Ray Serve implements it in serving/gateway/groups/serve_backend.py."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

from model_parallel.engine.request import EngineOutput, EngineRequest
from serving.contracts.models import ModelCard
from serving.contracts.observer import Passage


class Backend(Protocol):
    """Runs requests on replica groups."""

    @property
    def models(self) -> Mapping[str, ModelCard]:
        """Served models by name."""
        ...

    def generate(
        self, model: str, requests: Sequence[EngineRequest], passage: Passage
    ) -> AsyncGenerator[tuple[EngineOutput, ...], None]:
        """Run the choices of one client request on one group; outputs that are ready together come together.

        Ends after every choice had its finish_reason. Closing the iterator (`aclose`), or cancelling the task that waits on it,
        aborts what still runs; while it is left alone, little more is computed. Raises RequestError (kind "overloaded")
        when the group refuses the request, and GroupUnavailableError when no group can take it or the group is lost.
        After a refusal the next call goes to another group, if there is one.
        """
        ...

    async def can_serve(self, model: str) -> bool:
        """Whether some group of `model` can take a request now; bounded wait, never raises."""
        ...
