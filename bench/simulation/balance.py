"""Routing among very many groups: what the rule of `serving.gateway.groups.loads.preference` picks, in constant time.

The rule sorts all groups for every request. Here the groups lie in buckets by their number of open sequences, so that a choice
among thousands costs as much as among two; tests/unit/bench/simulation/test_balance.py compares the two.
"""

import random

from serving.gateway.groups.loads import GroupLoads


class Balance:
    """The groups of one model as one gateway sees them."""

    def __init__(self, loads: GroupLoads, rng: random.Random) -> None:
        self.loads = loads
        self._rng = rng
        self._load_of: dict[str, int] = {}
        self._buckets: list[list[str]] = [[]]
        self._place: dict[str, int] = {}
        """Of each group in its bucket."""
        self._least = 0

    def __len__(self) -> int:
        return len(self._load_of)

    def add(self, engine: str) -> None:
        """A group serves from now on."""
        self._put(engine, self.loads.load(engine))

    def remove(self, engine: str) -> None:
        """A group takes nothing new."""
        if engine in self._load_of:
            self._take_out(engine)
            del self._load_of[engine]

    def refresh(self, engine: str, num_on_their_way: int) -> None:
        """The group's load has changed, as `loads` tells it; so many more requests are on their way to it."""
        if engine in self._load_of:
            self._take_out(engine)
            self._put(engine, self.loads.load(engine) + num_on_their_way)

    def choose(self) -> str | None:
        """The group that the rule puts first; None when there is none."""
        while self._least < len(self._buckets) and not self._buckets[self._least]:
            self._least += 1
        least_avoided: list[str] = []
        for bucket in self._buckets[self._least :]:
            if not bucket:
                continue
            engine = bucket[int(self._rng.random() * len(bucket))]
            if not self.loads.is_avoided(engine):
                return engine
            fine = [name for name in bucket if not self.loads.is_avoided(name)]
            if fine:
                return fine[int(self._rng.random() * len(fine))]
            least_avoided = least_avoided or bucket
        return least_avoided[int(self._rng.random() * len(least_avoided))] if least_avoided else None

    def _put(self, engine: str, load: int) -> None:
        while len(self._buckets) <= load:
            self._buckets.append([])
        bucket = self._buckets[load]
        self._load_of[engine], self._place[engine] = load, len(bucket)
        bucket.append(engine)
        self._least = min(self._least, load)

    def _take_out(self, engine: str) -> None:
        bucket, place = self._buckets[self._load_of[engine]], self._place.pop(engine)
        last = bucket.pop()
        if last != engine:
            bucket[place] = last
            self._place[last] = place
