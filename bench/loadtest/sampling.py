"""A sample of bounded size from a stream of unknown length."""


class Sample:
    """Every k-th value, k doubling whenever the sample is full; and the largest of all."""

    def __init__(self, size: int = 4096) -> None:
        self._size, self._every, self._count = size, 1, 0
        self.values: list[float] = []
        self.largest = 0.0

    def add(self, value: float) -> None:
        if self._count % self._every == 0:
            if len(self.values) == self._size:
                del self.values[1::2]
                self._every *= 2
            if self._count % self._every == 0:
                self.values.append(value)
        self._count += 1
        self.largest = max(self.largest, value)
