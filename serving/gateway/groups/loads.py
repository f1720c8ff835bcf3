"""How busy the groups are, as a gateway knows it, and who refuses.

A call of Serve ends as soon as a group has taken a request in, so what Serve counts is only what is on its way. The rest is
counted here: a gateway knows its own open sequences, and every group tells it of those of other gateways (`output_link`).
"""

import time
from collections import Counter
from collections.abc import Callable

AVOIDED_S = 0.25
"""A group that has refused a request comes last for so long. Otherwise one that is full of few long sequences, or that is lost
and so has none, would be sent everything."""


AVOIDED_WHEN_LOST_S = 5.0
"""The same of one that has lost a rank, or its connection to this gateway: its leader may go on refusing, and has nothing to do.
Serve sends it nothing any more after its next look, within two seconds."""

AVOIDED_WHEN_SILENT_S = 30.0
"""The same of one that does not answer: longer than Serve takes to replace it."""

AVOIDED_WHEN_DRAINING_S = 600.0
"""The same of one that takes nothing new: its successor has another name."""


PROMPT_TOKENS_A_SEQUENCE = 64
"""A prompt that is not computed yet counts as one open sequence more for each so many of its tokens: who comes after it waits for
it, and hardly notices a sequence that decodes. `python -m bench.routing` compares other numbers; 16 brought no more."""


def prompt_load(num_prompt_tokens: int) -> int:
    """Open sequences that a prompt counts as while it is not computed."""
    return num_prompt_tokens // PROMPT_TOKENS_A_SEQUENCE


class GroupLoads:
    """Open sequences of the groups, and prompts that they have yet to compute, as one gateway knows them. One thread writes; any
    may read."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._avoided_until_s: dict[str, float] = {}
        self._own: Counter[str] = Counter()
        self._elsewhere: dict[str, int] = {}
        self._prompts: Counter[str] = Counter()
        """What this gateway's prompts that are not computed yet add to the load."""

    def begin(self, engine: str, num_sequences: int) -> None:
        """The group `engine` has taken in so many of this gateway's."""
        self._own[engine] += num_sequences

    def end(self, engine: str, num_sequences: int) -> None:
        """They have ended, or the group is lost."""
        _take_off(self._own, engine, num_sequences)

    def prompt_begins(self, engine: str, load: int) -> None:
        """The group has taken in a prompt of this gateway's, of so much `prompt_load`."""
        self._prompts[engine] += load

    def prompt_ends(self, engine: str, load: int) -> None:
        """It is computed, or will never be."""
        _take_off(self._prompts, engine, load)

    def tell(self, engine: str, num_sequences: int) -> None:
        """The group has so many of other gateways'."""
        self._elsewhere[engine] = num_sequences

    def forget(self, engine: str) -> None:
        """The group cannot tell any more."""
        self._elsewhere.pop(engine, None)

    def refused(self, engine: str, avoided_s: float = AVOIDED_S) -> None:
        """The group has not taken a request in, and comes last for so long."""
        now_s = self._clock()
        avoided = {name: until_s for name, until_s in self._avoided_until_s.items() if now_s < until_s}
        self._avoided_until_s = avoided | {engine: max(now_s + avoided_s, avoided.get(engine, 0.0))}

    def is_avoided(self, engine: str) -> bool:
        """It has refused something just now."""
        return self._clock() < self._avoided_until_s.get(engine, 0.0)

    def of(self, engine: str) -> int:
        """Open sequences of a group; 0 of one that has told nothing yet."""
        return self._own.get(engine, 0) + self._elsewhere.get(engine, 0)

    def load(self, engine: str) -> int:
        """What is to be done in a group, in open sequences."""
        return self.of(engine) + self._prompts.get(engine, 0)


def _take_off(counts: Counter[str], engine: str, number: int) -> None:
    """A group of which nothing is left is not kept: its successors have other names."""
    counts[engine] -= number
    if not counts[engine]:
        del counts[engine]


def preference(loads: GroupLoads, engine: str, num_on_their_way: int, tie: float) -> tuple[bool, int, float]:
    """The rule of routing: groups are asked in this order. `num_on_their_way` are requests that it has not answered for yet;
    `tie` is drawn at random, or gateways would agree on a group."""
    return loads.is_avoided(engine), loads.load(engine) + num_on_their_way, tie


_LOADS = GroupLoads()


def loads_of_this_process() -> GroupLoads:
    """What a gateway and its routers share. Serve makes the routers by itself, so only a module can hold what is common.

    A function, because Serve copies the objects that a deployment's class names.
    """
    return _LOADS
