"""Memory that a leader shares with the ranks of its host: tells each side that the other one is alive.

**Rank to leader.** A rank's death is told before the rank's memory is freed.

Linux frees a process's memory before it closes its files, and tells its pidfd and its parent even later. A rank has gigabytes,
and may get little of the processor to end with, so its closed socket can be most of a second late. What Linux does first is to
hand on the robust mutexes that a dying thread holds (pthread_mutexattr_setrobust(3)). So each rank on the leader's host holds one
for as long as it lives, and its leader waits for it. Without it the socket tells all the same.

**Leader to rank.** A counter, for leaders that are to be ended when they hang (leader_watch.py).
"""

import ctypes
import errno
import mmap
import os
import threading

_STRIDE = 64
"""Bytes from one mutex to the next: more than a pthread_mutex_t has anywhere."""
_ATTRIBUTE_BYTES = 64
_PROCESS_SHARED, _ROBUST = 1, 1
"""PTHREAD_PROCESS_SHARED and PTHREAD_MUTEX_ROBUST of Linux."""
_c = ctypes.CDLL(None, use_errno=True)
_c.mmap.restype = ctypes.c_void_p
_c.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_c.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


class _Leader(ctypes.Structure):
    """What the leader says of itself."""

    _fields_ = (("pid", ctypes.c_uint64), ("num_beats", ctypes.c_uint64))


class _Memory:
    """What the leader says, and a mutex for each rank; mapped until `unmap`. (Python's own mmap would keep a descriptor.)"""

    def __init__(self, fd: int, num_ranks: int) -> None:
        self._size = (1 + num_ranks) * _STRIDE
        self._address = _c.mmap(None, self._size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if self._address == _FAILED:
            _check(ctypes.get_errno())
        self.leader = _Leader.from_address(self._address)

    def lock(self, rank: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._address + (1 + rank) * _STRIDE)

    def unmap(self) -> None:
        _c.munmap(self._address, self._size)


class LifeLocks:
    """The leader's: one for each rank."""

    def __init__(self, num_ranks: int) -> None:
        self._fd = os.memfd_create("packtrain-life")
        os.ftruncate(self._fd, (1 + num_ranks) * _STRIDE)
        self._memory = _Memory(self._fd, num_ranks)
        self._memory.leader.pid = os.getpid()
        self._mapping = threading.Lock()
        self._is_mapped = True
        attribute = ctypes.create_string_buffer(_ATTRIBUTE_BYTES)
        _check(_c.pthread_mutexattr_init(attribute))
        _check(_c.pthread_mutexattr_setpshared(attribute, _PROCESS_SHARED))
        _check(_c.pthread_mutexattr_setrobust(attribute, _ROBUST))
        for rank in range(num_ranks):
            _check(_c.pthread_mutex_init(self._memory.lock(rank), attribute))

    @property
    def path(self) -> str:
        """For ranks of this host, until `close`."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        """No further rank opens them. Those that have go on."""
        os.close(self._fd)

    def beat(self) -> None:
        """The leader goes on. From the first call on it is ended when it says so no more. Nothing after `unmap`."""
        with self._mapping:
            if self._is_mapped:
                self._memory.leader.num_beats += 1

    def unmap(self) -> None:
        """Nobody waits any more."""
        with self._mapping:
            self._is_mapped = False
            self._memory.unmap()

    def await_end(self, rank: int) -> bool:
        """Wait until a rank that holds its lock ends; whether it died. False at once of one that does not hold it."""
        lock = self._memory.lock(rank)
        result = int(_c.pthread_mutex_lock(lock))
        if result == errno.EOWNERDEAD:
            _check(_c.pthread_mutex_consistent(lock))
        else:
            _check(result)
        _check(_c.pthread_mutex_unlock(lock))
        return result == errno.EOWNERDEAD


class HeldLifeLock:
    """A rank's own. The thread that makes it holds it, and must be the one that lives as long as the rank."""

    def __init__(self, path: str, rank: int) -> None:
        """Raises OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._memory = _Memory(fd, rank + 1)
        finally:
            os.close(fd)
        self._lock = self._memory.lock(rank)
        _check(_c.pthread_mutex_lock(self._lock))

    @property
    def leader_pid(self) -> int:
        """Process id of the leader."""
        return int(self._memory.leader.pid)

    @property
    def num_beats(self) -> int:
        """Grows while the leader goes on; 0 of a leader that is not to be watched."""
        return int(self._memory.leader.num_beats)

    def release(self) -> None:
        """The rank ends in good order."""
        _check(_c.pthread_mutex_unlock(self._lock))


def _check(result: int) -> None:
    if result:
        raise OSError(result, os.strerror(result))
