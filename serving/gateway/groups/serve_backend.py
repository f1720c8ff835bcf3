"""The gateway's Backend on Serve handles.

A request goes through Serve (bytes, msgpack, by value) to the group that `router` chooses. Its outputs come back through
`output_receiver`.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from model_parallel.engine.request import EngineRequest
from serving.contracts.errors import (
    GroupCallLostError,
    GroupDrainingError,
    GroupRefusedError,
    GroupUnavailableError,
)
from serving.contracts.fleet import ModelDemand
from serving.contracts.group_link import GroupCall, GroupOutputs, GroupReply
from serving.contracts.group_report import GroupReport
from serving.contracts.models import AdapterCard, ModelCard
from serving.contracts.step_report import StepReport
from serving.gateway.core.catalogue import Catalogue
from serving.gateway.groups.loads import AVOIDED_WHEN_DRAINING_S, AVOIDED_WHEN_LOST_S
from serving.gateway.groups.output_receiver import Inbox, OutputReceiver

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 2.0
ASLEEP_FOR_S = 120.0
"""How long what the autoscaler has told is believed: two of its longest periods."""
STALE_AFTER_S = 10.0
"""How long a group that was healthy and answers late is taken to be healthy."""
Handle = DeploymentHandle[Any]


class _Submission(NamedTuple):
    """A call of Serve that no group has answered yet."""

    model: str
    weights: str
    """Of the model when it was asked for: what has the name later may be another one."""
    num_sequences: int
    num_prompt_tokens: int
    inbox: Inbox


class ServeBackend:
    """The gateway's Backend on Serve handles. See serving/gateway/core/backend.py."""

    def __init__(
        self,
        cards: Sequence[ModelCard],
        groups: Mapping[str, Handle],
        receiver: OutputReceiver,
        clock: Callable[[], float] = time.monotonic,
        adapters: Sequence[AdapterCard] = (),
    ) -> None:
        """`receiver` must have started before the first request."""
        self._models = Catalogue(cards, adapters)
        self._groups = dict(groups)
        self._held: set[str] = set()
        """Models whose groups are being replaced."""
        self._num_open: Counter[str] = Counter()
        self._receiver = receiver
        self._could_serve_s: dict[str, float] = {}
        """When (monotonic) a group of each model last said that it can."""
        self._clock = clock
        self._told_asleep_s: dict[str, float] = {}
        """When (monotonic) the autoscaler last said that the model has no group until it is asked for."""
        self._submissions: dict[asyncio.Task[bytes], _Submission] = {}
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(GroupReply).decode
        self._decode_report = msgspec.msgpack.Decoder(GroupReport).decode

    @property
    def models(self) -> Catalogue:
        return self._models

    def set_model(self, card: ModelCard, handle: Handle, *, is_held: bool) -> None:
        """Serve a model from now on, or with another card. While it `is_held`, its groups are being replaced: requests that none
        can take wait."""
        if (before := self._models.get(card.name)) is not None:
            card = msgspec.structs.replace(card, kernels=before.kernels, deterministic=before.deterministic)
        self._groups.setdefault(card.name, handle)
        self._models.set_base(card)
        (self._held.add if is_held else self._held.discard)(card.name)

    def forget_model(self, name: str) -> None:
        """Serve it no more. What groups have taken in goes on, and what is on its way to one."""
        if self.is_asleep(name):  # nobody would wake it
            self._end_waiting(lambda submission: submission.model == name)
        self._models.forget_base(name)
        del self._groups[name]
        self._held.discard(name)
        self._told_asleep_s.pop(name, None)
        self._could_serve_s.pop(name, None)

    def keep_waiting(self, weights: Mapping[str, str]) -> None:
        """There are these models (the digest of the weights of each, by name). Requests of others that no group has taken in end:
        what gets one of their names later is another model."""
        self._end_waiting(lambda submission: weights.get(submission.model) != submission.weights)

    def _end_waiting(self, ends: Callable[[_Submission], bool]) -> None:
        for submission in self._submissions.values():
            if submission.inbox.is_waiting and ends(submission):
                submission.inbox.fail(_not_served(submission.model))

    @property
    def num_open(self) -> dict[str, int]:
        """Requests that have been offered to groups and have not ended, of each model that has any."""
        return dict(self._num_open)

    def set_groups(self, model: str, num_groups: int, *, is_asleep: bool) -> None:
        """So many groups of the model run now, of which each may be asked before a request is refused. One that is asleep gets
        a group when a request waits for it."""
        card = self._models.get(model)
        if card is None:  # the autoscaler has not heard yet that it was removed
            return
        if card.num_groups != num_groups:
            self._models.set_base(msgspec.structs.replace(card, num_groups=num_groups))
        if is_asleep:
            self._told_asleep_s[model] = self._clock()
        else:
            self._told_asleep_s.pop(model, None)

    def set_adapters(self, adapters: Sequence[AdapterCard]) -> None:
        """These are served now, and no others."""
        self._models.set_adapters(adapters)

    def is_asleep(self, model: str) -> bool:
        """The autoscaler has said so lately. When it is not there any more, nobody would wake the model."""
        return self._clock() - self._told_asleep_s.get(model, -math.inf) < ASLEEP_FOR_S

    def held(self, model: str) -> ModelDemand:
        """What waits for the first group of a model that is asleep."""
        if not self.is_asleep(model):
            return ModelDemand(0, 0)
        waiting = [asked for asked in self._submissions.values() if asked.model == model]
        return ModelDemand(
            sum(asked.num_sequences for asked in waiting), sum(asked.num_prompt_tokens for asked in waiting)
        )

    async def generate(
        self, model: str, requests: Sequence[EngineRequest], trace_context: Mapping[str, str]
    ) -> AsyncGenerator[GroupOutputs, None]:
        if (handle := self._groups.get(model)) is None:
            raise _not_served(model)
        num_open = len(requests)
        num_prompt_tokens = len(requests[0].prompt_token_ids) + len(requests[0].output_token_ids)
        inbox = self._receiver.open([request.request_id for request in requests], num_prompt_tokens)
        card = self._models.get(model)
        weights = "" if card is None else card.weights
        call = GroupCall(tuple(requests), dict(trace_context), self._receiver.address, weights)
        # Serve's response is not held here: with it, an answer that waits for its client would take 30 KiB more.
        submission = asyncio.create_task(_value(handle.generate.remote(self._encode(call))))
        del call
        num_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self._submissions[submission] = _Submission(model, weights, len(requests), num_tokens, inbox)
        submission.add_done_callback(partial(self._take_reply, model, inbox))
        self._num_open[model] += 1
        try:
            while num_open:
                step = await inbox.next()
                ended = [output for output in step.outputs if output.finish_reason is not None]
                num_open -= len(ended)
                if any(output.error_kind == "unavailable" for output in ended):  # What is left goes elsewhere.
                    self._receiver.loads.refused(step.engine, AVOIDED_WHEN_LOST_S)
                yield step
        finally:
            self._num_open[model] -= 1
            if not self._num_open[model]:
                del self._num_open[model]
            inbox.close(cancel=num_open > 0)
            # If a group has taken the request in without our knowing, its first output is answered by a cancel.
            submission.cancel()

    def _take_reply(self, model: str, inbox: Inbox, submission: asyncio.Task[bytes]) -> None:
        """A group has answered for a request, or none can."""
        del self._submissions[submission]
        try:
            reply = self._decode(submission.result())
        except BackPressureError:
            inbox.fail(GroupRefusedError("every replica group of this model is full", kind="overloaded"))
        except (RequestCancelledError, asyncio.CancelledError):
            inbox.fail(GroupUnavailableError("the request was cancelled on its way to a replica group"))
        except RayActorError as lost:
            logger.warning("a replica group of %s was lost before it answered: %s", model, type(lost).__name__)
            inbox.fail(GroupCallLostError(f"the replica group of model {model!r} was lost"))
        except (RayError, RayServeException) as lost:
            logger.warning("a replica group of %s was lost: %s", model, type(lost).__name__)
            inbox.fail(GroupUnavailableError(f"the replica group of model {model!r} was lost"))
        except Exception as bug:
            inbox.fail(bug)
        else:
            self._take_decision(inbox, reply)

    def _take_decision(self, inbox: Inbox, reply: GroupReply) -> None:
        if not reply.error_kind:
            inbox.accepted(self._receiver.connection_of(reply.engine))
            return
        if reply.error_kind in ("overloaded", "unavailable"):
            self._receiver.loads.refused(reply.engine)
        if reply.error_kind == "draining":
            self._receiver.loads.refused(reply.engine, AVOIDED_WHEN_DRAINING_S)
            inbox.fail(GroupDrainingError(reply.error))
        elif reply.error_kind == "unavailable":
            inbox.fail(GroupUnavailableError(reply.error, may_have_run=False))
        else:
            inbox.fail(
                GroupRefusedError(
                    reply.error, kind=reply.error_kind, engine=reply.engine, retry_after_s=reply.retry_after_s
                )
            )

    async def can_serve(self, model: str) -> bool:
        if (handle := self._groups.get(model)) is None:
            return False
        if self.is_asleep(model) or model in self._held:
            return True  # whoever asks waits for its next group
        for _ in range(max(1, self._models[model].num_groups)):
            probe = handle.probe.remote()
            try:
                engine, problem, kernels, deterministic = await asyncio.wait_for(_value(probe), PROBE_TIMEOUT_S)
            except TimeoutError:
                # A busy machine is slow to answer, so the last word counts for a while.
                return time.monotonic() - self._could_serve_s.get(model, -math.inf) < STALE_AFTER_S
            except (RayError, RayServeException) as error:
                logger.warning("no replica group of %s can be reached: %s", model, type(error).__name__)
                return False
            if problem is None:
                self._could_serve_s[model] = time.monotonic()
                card = self._models.get(model)
                if card is not None and card.kernels != kernels:
                    self._models.set_base(msgspec.structs.replace(card, kernels=kernels, deterministic=deterministic))
                return True
            logger.warning("a replica group of %s is lost: %s", model, problem)
            self._receiver.loads.refused(engine)  # so that another one is asked next
        return False

    async def reports(self, reader: str) -> dict[str, list[GroupReport]]:
        """What every group of every model tells the gateway `reader`; a group that does not answer in time is left out."""
        groups = dict(self._groups)
        answers = await asyncio.gather(*(self._reports(handle, reader) for handle in groups.values()))
        return dict(zip(groups, answers, strict=True))

    async def step_reports(self) -> list[StepReport]:
        """The last steps of every group of every model; a group that does not answer in time is left out."""
        answers = await asyncio.gather(*(_ask_all(handle, "steps") for handle in self._groups.values()))
        return [msgspec.msgpack.decode(item, type=StepReport) for items in answers for item in items]

    async def _reports(self, handle: Handle, reader: str) -> list[GroupReport]:
        return [self._decode_report(item) for item in await _ask_all(handle, "report", reader)]


def _not_served(model: str) -> GroupUnavailableError:
    return GroupUnavailableError(f"model {model!r} is not served any more", may_have_run=False)


async def _ask_all(handle: Handle, method: str, *arguments: str) -> list[bytes]:
    """What all groups of a model answer in time."""
    try:
        broadcast = handle.broadcast(method, *arguments)
        items = await broadcast.results_async(timeout_s=PROBE_TIMEOUT_S, return_exceptions=True)
    except (RayError, RayServeException, TimeoutError):
        return []
    return [item for item in items if isinstance(item, bytes)]


async def _value(response: Any) -> Any:
    """A Serve response as a coroutine, which is what can be waited for with a bound. Cancelling it cancels the call."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
