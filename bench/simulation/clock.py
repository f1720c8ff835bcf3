"""Virtual time. It is counted in ticks, so that sums are exact in whatever order they are made."""

TICKS_PER_S = 1 << 36
"""A tick is about 15 ps. A float holds every tick of the first 36 hours exactly."""
TICK_S = 1.0 / TICKS_PER_S
MAX_S = float((1 << 53) // TICKS_PER_S)
"""The longest time that can be simulated."""


def to_ticks(seconds: float) -> int:
    """The nearest tick."""
    return round(seconds * TICKS_PER_S)


class VirtualClock:
    """The time of one simulation. It never runs backwards."""

    __slots__ = ("now_s", "tick")

    def __init__(self) -> None:
        self.tick = 0
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def move_to(self, tick: int) -> None:
        """It is this late now. Raises ValueError when it was later already."""
        if tick < self.tick:
            raise ValueError(f"the virtual clock is at tick {self.tick} and cannot go back to {tick}")
        self.tick = tick
        self.now_s = tick * TICK_S
