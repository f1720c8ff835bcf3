"""How busy the groups are, as a gateway knows it.

A call of Serve ends as soon as a group has taken a request in, so what Serve counts is only what is on its way. The rest is
counted here: a gateway knows its own open sequences, and every group tells it of those of other gateways (`output_link`).
"""

from collections import Counter


class GroupLoads:
    """Open sequences of the groups, as one gateway knows them. One thread writes; any may read."""

    def __init__(self) -> None:
        self._own: Counter[str] = Counter()
        self._elsewhere: dict[str, int] = {}

    def begin(self, engine: str, num_sequences: int) -> None:
        """The group `engine` has taken in so many of this gateway's."""
        self._own[engine] += num_sequences

    def end(self, engine: str, num_sequences: int) -> None:
        """They have ended, or the group is lost."""
        self._own[engine] -= num_sequences
        if not self._own[engine]:
            del self._own[engine]

    def tell(self, engine: str, num_sequences: int) -> None:
        """The group has so many of other gateways'."""
        self._elsewhere[engine] = num_sequences

    def forget(self, engine: str) -> None:
        """The group cannot tell any more."""
        self._elsewhere.pop(engine, None)

    def of(self, engine: str) -> int:
        """Open sequences of a group; 0 of one that has told nothing yet."""
        return self._own.get(engine, 0) + self._elsewhere.get(engine, 0)


_LOADS = GroupLoads()


def loads_of_this_process() -> GroupLoads:
    """What a gateway and its routers share. Serve makes the routers by itself, so only a module can hold what is common.

    A function, because Serve copies the objects that a deployment's class names.
    """
    return _LOADS
