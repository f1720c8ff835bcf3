"""Whether work that is done leaves objects behind."""

import gc
import sys
from collections import Counter

BLOCKS = "blocks of memory"
MIN_REQUESTS = 900


class LiveObjects:
    """What is alive at one moment, to be compared with what is alive later."""

    def __init__(self) -> None:
        self._objects = _count_objects()
        # Of small objects; those of which the garbage collector knows nothing, as text and numbers, are among them.
        self._num_blocks = sys.getallocatedblocks()

    def leaked(self, num_requests: int) -> dict[str, int]:
        """What so many requests since then have left: one object of a type for eight of them, or a block of memory each.

        Fewer is no leak: asyncio, for one, keeps up to a hundred timers that were cancelled. So there must be MIN_REQUESTS.
        """
        assert num_requests >= MIN_REQUESTS
        gc.collect()
        num_blocks = sys.getallocatedblocks() - self._num_blocks
        grown = _count_objects() - self._objects
        found = {name: number for name, number in grown.items() if number >= num_requests // 8}
        return found | ({BLOCKS: num_blocks} if num_blocks >= num_requests else {})


def _count_objects() -> Counter[str]:
    gc.collect()
    counts = Counter[str]()
    # One by one: Counter(…) asks whether it is given a mapping, which leaves an entry in a cache of every class of mappings.
    for each in gc.get_objects():
        counts[f"{type(each).__module__}.{type(each).__qualname__}"] += 1
    return counts
