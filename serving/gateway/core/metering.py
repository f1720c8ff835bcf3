"""Counts what one request uses, and settles its reservation exactly once, however it ends."""

import asyncio
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from model_parallel.engine.request import EngineOutput, FinishReason, Timings
from serving.contracts.accounts import Reservation, UsageRecord
from serving.contracts.errors import (
    CancelledInGroupError,
    DeadlineExceededError,
    GroupRefusedError,
    GroupUnavailableError,
    OverloadedError,
    ValidationError,
)
from serving.contracts.group_link import GroupOutputs
from serving.gateway.core.call import Call
from serving.gateway.core.choices import Summary


class Meter:
    """A context around the run of one request. Leaving it without `close` charges what was used until then."""

    def __init__(
        self,
        call: Call,
        model: str,
        num_prompt_tokens: int,
        reservation: Reservation,
        clock: Callable[[], float],
        wall_clock: Callable[[], float] = time.time,
        *,
        num_choices: int = 1,
        billed_id: str = "",
    ) -> None:
        """`num_choices` are those of each prompt. `billed_id` is the id of the request that this one goes on with; its own when
        empty."""
        self._call = call
        self._billed_id = billed_id or call.request_id
        self._model = model
        self._num_prompt_tokens = num_prompt_tokens
        self._reservation = reservation
        self._clock = clock
        self._started_unix_s = wall_clock() - (clock() - call.arrived_s)
        self._submitted_s: float | None = None
        self._engine = ""
        self._was_taken = False
        self._is_settled = False
        self._num_choices = num_choices
        self._latest: dict[int, EngineOutput] = {}
        """By choice. Each tells what the choice has cost until then."""
        self.num_completion_tokens = 0

    def __enter__(self) -> "Meter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._is_settled:
            self._settle(self._summary(), _outcome(error))

    def submit(self) -> Mapping[str, str]:
        """The request is offered to groups from now on, with the returned trace context."""
        self._submitted_s = self._clock()
        return self._call.observer.submitted()

    def received(self, step: GroupOutputs) -> None:
        """A group has accepted the request, or has made outputs of it."""
        self._was_taken = True
        if step.engine != self._engine:
            self._engine = step.engine
            self._call.observer.accepted(step.engine)
        if step.outputs:
            self._call.observer.received(step.outputs)

    def took(self, output: EngineOutput) -> None:
        """An output of a choice that has not ended for the client."""
        if output.timings is not None or output.choice not in self._latest:
            self._latest[output.choice] = output

    def interrupted(self) -> None:
        """The group that had accepted it is lost, and another one is to go on."""
        self._engine = ""
        self._call.observer.interrupted()

    async def close(self, reason: FinishReason) -> Summary:
        """The request has ended well: settle it, with a durable record if the answer is not streamed."""
        summary = self._summary()
        self._settle(summary, reason.value)
        if not self._call.is_streamed:
            await self._reservation.recorded()
        return summary

    def _settle(self, summary: Summary, outcome: str) -> None:
        self._is_settled = True
        group = summary.group or Timings()
        # What has been written of a stream that is resumed was written by a group that had read the prompt.
        was_read = self._was_taken or summary.num_completion_tokens > 0
        record = UsageRecord(
            request_id=self._billed_id,
            tenant_id=self._call.principal.tenant_id,
            key_id=self._call.principal.key_id,
            model=self._model,
            num_prompt_tokens=summary.num_prompt_tokens if was_read else 0,
            num_cached_tokens=summary.num_cached_tokens,
            num_completion_tokens=summary.num_completion_tokens,
            outcome=outcome,
            started_unix_s=self._started_unix_s,
            gateway_s=summary.gateway_s,
            queue_s=group.queue_s,
            prefill_s=group.prefill_s,
            decode_s=group.decode_s,
            total_s=summary.total_s,
        )
        self._reservation.settle(record)
        self._call.observer.settled(record)

    def _summary(self) -> Summary:
        now_s = self._clock()
        latest = self._latest.values()
        timings = [output.timings for output in latest if output.timings is not None]
        group = None
        if timings:
            group = Timings(
                queue_s=max(timing.queue_s for timing in timings),
                prefill_s=max(timing.prefill_s for timing in timings),
                decode_s=max(timing.decode_s for timing in timings),
            )
        return Summary(
            num_prompt_tokens=self._num_prompt_tokens,
            num_completion_tokens=self.num_completion_tokens,
            num_cached_tokens=self._num_cached_tokens(),
            # A stop string cuts off tokens that the group has drawn.
            num_accepted_tokens=min(sum(output.num_accepted_tokens for output in latest), self.num_completion_tokens),
            num_rejected_tokens=sum(output.num_rejected_tokens for output in latest),
            group=group,
            gateway_s=(now_s if self._submitted_s is None else self._submitted_s) - self._call.arrived_s,
            total_s=now_s - self._call.arrived_s,
        )

    def _num_cached_tokens(self) -> int:
        """Prompt tokens that no choice of their prompt had to compute: as a prompt counts once, so does what is cached of it."""
        by_prompt: dict[int, int] = {}
        for choice, output in self._latest.items():
            prompt = choice // self._num_choices
            by_prompt[prompt] = min(output.num_cached_tokens, by_prompt.get(prompt, output.num_cached_tokens))
        return sum(by_prompt.values())


def _outcome(error: BaseException | None) -> str:
    match error:
        case asyncio.CancelledError() | GeneratorExit() | CancelledInGroupError():
            return "cancelled"
        case DeadlineExceededError():
            return "deadline"
        case GroupUnavailableError():
            return "unavailable"
        case GroupRefusedError() | OverloadedError() | ValidationError():
            return "rejected"
        case _:
            return "error"
