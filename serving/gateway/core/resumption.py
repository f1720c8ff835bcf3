"""What is left of a client request when the group that ran it is lost: its other part, for another group.

A request that was present when two groups were lost may be what ended them: it runs alone from then on, and when a third is
lost it ends. One that was waiting there has nothing to do with it.

The tokens delivered so far go along as `output_token_ids`. Draws are a pure function of seed, choice and position, and a row's
bits do not depend on the batch. So where the model is deterministic, the rest has the bits of the lost group.
Where it is not, tokens are still neither lost nor repeated.
"""

from collections.abc import Sequence

import msgspec

from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason
from serving.contracts.errors import GroupUnavailableError, PoisonedRequestError

ALONE_AFTER = 2
"""Groups that may be lost while they run a request together with others."""
RECOVERY_TIMEOUT_S = 300.0
"""How long a request whose group is lost waits for a group that can go on, where its deadline is not sooner: as long as a group
may take to load."""
MIN_RECOVERY_PAUSE_S, MAX_RECOVERY_PAUSE_S = 0.1, 1.0
"""Between two offers of a request that no group has accepted meanwhile; each is twice as long as the one before."""
MAX_LOSSES = 2
"""Groups that may be lost while they run a request; with one more it is taken to be the cause."""


class Resumption:
    """The open choices of one client request, with what has been delivered of each."""

    def __init__(self, requests: Sequence[EngineRequest]) -> None:
        self._open = {request.choice: request for request in requests}
        self._tokens: dict[int, list[int]] = {request.choice: [] for request in requests}
        self._num_prompt_logprobs = dict.fromkeys(self._open, 0)
        self.num_losses = 0
        """Groups that were lost while they ran it."""
        self.num_offers = 0
        """How often it was handed to the backend."""

    def take(self, output: EngineOutput) -> EngineOutput:
        """An output on its way to the client. Raises GroupUnavailableError when it says that the group is lost."""
        if output.finish_reason is FinishReason.ERROR and output.error_kind == "unavailable":
            raise GroupUnavailableError(output.error, may_have_run=not output.was_waiting)
        self._tokens[output.choice] += output.token_ids
        self._num_prompt_logprobs[output.choice] += len(output.prompt_logprobs)
        if output.finish_reason is not None:
            del self._open[output.choice]
        return output

    def lose(self, error: GroupUnavailableError) -> None:
        """The group that had accepted the request is lost. Raises PoisonedRequestError when that is one too many."""
        self.num_losses += error.may_have_run
        if self.num_losses > MAX_LOSSES:
            raise PoisonedRequestError(
                f"the request was ended because {self.num_losses} replica groups were lost while they ran it"
            ) from error

    def requests(self, deadline_s: float | None) -> list[EngineRequest]:
        """What the next group has to run. `deadline_s` is what is left of the client's deadline."""
        self.num_offers += 1
        return [self._rest_of(request, deadline_s) for request in self._open.values()]

    def _rest_of(self, request: EngineRequest, deadline_s: float | None) -> EngineRequest:
        if self.num_offers == 1:
            return msgspec.structs.replace(request, deadline_s=deadline_s)
        sampling = request.sampling
        if sampling.prompt_logprobs is not None:
            start = max(1, sampling.prompt_logprobs_start) + self._num_prompt_logprobs[request.choice]
            sampling = msgspec.structs.replace(sampling, prompt_logprobs_start=start)
        return msgspec.structs.replace(
            request,
            # A new id: outputs of an earlier group, should they still come, belong to nobody.
            request_id=f"{request.request_id}.{self.num_offers - 1}",
            runs_alone=self.num_losses >= ALONE_AFTER,
            output_token_ids=(*request.output_token_ids, *self._tokens[request.choice]),
            sampling=sampling,
            deadline_s=deadline_s,
        )
