"""The autoscaler's memory in Ray's control store, which lives as long as the groups that it is about. The last who opened it may
write, and nobody before."""

from typing import Protocol

from cluster import ray_api
from cluster.autoscaler import ScalingError, SupersededError


class Records(Protocol):
    """A key-value store, whose calls raise RayError."""

    def read(self, key: str) -> bytes | None: ...

    def write(self, key: str, value: bytes | None) -> None:
        """None removes it."""
        ...

    def create(self, key: str, value: bytes) -> bool:
        """Write it unless the key is there; whether it was written."""
        ...


class RayRecords:
    """Ray's own."""

    def read(self, key: str) -> bytes | None:
        return ray_api.read_record(key)

    def write(self, key: str, value: bytes | None) -> None:
        ray_api.write_record(key, value)

    def create(self, key: str, value: bytes) -> bool:
        return ray_api.create_record(key, value)


class RecordStore:
    """Writers are numbered. Each has a key of its own that only it could create, and writes its memory under its own number.

    So a writer that was superseded never replaces what its successor has written, however long it was stopped in between.
    """

    def __init__(self, records: Records, prefix: str = "packtrain/autoscaler") -> None:
        self._records, self._prefix = records, prefix
        self._number = 0
        self._has_saved = False

    def open(self) -> bytes | None:
        """Raises ScalingError."""
        try:
            number = int(self._records.read(f"{self._prefix}/last") or b"0") + 1
            while not self._records.create(self._writer(number), b""):
                number += 1
            self._number, self._has_saved = number, False
            self._records.write(f"{self._prefix}/last", str(number).encode())
            for before in range(number - 1, 0, -1):
                if (memory := self._records.read(self._memory(before))) is not None:
                    return memory
            return None
        except ray_api.RayError as error:
            raise ScalingError(f"the autoscaler's memory cannot be read: {error}") from error

    def save(self, memory: bytes) -> None:
        """Raises SupersededError, ScalingError."""
        try:
            if self._records.read(self._writer(self._number + 1)) is not None:
                raise SupersededError(f"writer {self._number} of the autoscaler's memory has a successor")
            self._records.write(self._memory(self._number), memory)
            if not self._has_saved:
                for before in range(1, self._number):
                    self._records.write(self._memory(before), None)
                self._has_saved = True
        except ray_api.RayError as error:
            raise ScalingError(f"the autoscaler's memory cannot be written: {error}") from error

    def _writer(self, number: int) -> str:
        return f"{self._prefix}/writer/{number}"

    def _memory(self, number: int) -> str:
        return f"{self._prefix}/memory/{number}"
