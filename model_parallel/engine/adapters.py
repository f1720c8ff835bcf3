"""Which adapters a group's ranks hold, as the leader decides it. Numbers and names only: the weights are on the ranks.

An adapter that a sequence needs is loaded beside the steps, and is loaded once all ranks have it. Where there is no room, the
one that was needed longest ago goes, never one that a running sequence uses. All ranks hold the same adapters, because they
follow the same plans.
"""

from collections import OrderedDict
from dataclasses import dataclass

from model_parallel.config import AdapterConfig
from model_parallel.engine.messages import AdapterLoad, AdapterOutcome
from model_parallel.engine.request import AdapterRef
from model_parallel.errors import RequestError

MAX_REMEMBERED = 4096
"""Adapters that are known although they are neither loaded nor asked for."""


@dataclass(frozen=True, slots=True)
class AdapterState:
    """How far an adapter is."""

    is_loading: bool = False
    is_loaded: bool = False
    error: str = ""
    """Why it could not be loaded the last time; "" when it could, or nobody has tried."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Adapter:
    adapter_id: int
    ref: AdapterRef
    num_bytes: int
    is_loading: bool = False
    is_loaded: bool = False
    num_living: int = 0
    """Sequences that were accepted and have not ended."""
    num_running: int = 0

    @property
    def takes_room(self) -> bool:
        return self.is_loading or self.is_loaded


class AdapterPool:
    """The adapters of one group. One thread at a time calls it."""

    def __init__(self, config: AdapterConfig | None) -> None:
        """None: there are none."""
        self._config = config
        self._adapters: OrderedDict[str, _Adapter] = OrderedDict()
        """By digest, the one that was needed longest ago first."""
        self._by_id: dict[int, _Adapter] = {}
        self._last_id = 0
        self._to_load: list[AdapterLoad] = []
        self._to_drop: list[int] = []
        self._errors: dict[str, str] = {}
        """Why the last try to load an adapter failed, by digest."""

    @property
    def loaded(self) -> list[str]:
        """Digests of those that all ranks have."""
        return [digest for digest, adapter in self._adapters.items() if adapter.is_loaded]

    @property
    def num_bytes(self) -> int:
        """On a rank, of those that are loaded or being loaded."""
        return sum(adapter.num_bytes for adapter in self._adapters.values() if adapter.takes_room)

    @property
    def has_work(self) -> bool:
        """The ranks must be told something, or are to be asked how far they are."""
        return bool(self._to_load or self._to_drop) or any(a.is_loading for a in self._adapters.values())

    def know(self, ref: AdapterRef, num_bytes: int) -> None:
        """Requests may name the adapter from now on; on a rank it takes `num_bytes`. Raises RequestError if that is too much."""
        if self._config is None:
            raise RequestError("this group takes no adapters")
        if num_bytes > self._config.max_bytes:
            raise RequestError(
                f"the adapter takes {num_bytes} bytes on a rank; adapters.max_bytes is {self._config.max_bytes}"
            )
        if ref.digest not in self._adapters:
            self._last_id += 1
            adapter = _Adapter(adapter_id=self._last_id, ref=ref, num_bytes=num_bytes)
            self._adapters[ref.digest] = self._by_id[self._last_id] = adapter
            self._forget_some()

    def is_known(self, digest: str) -> bool:
        return digest in self._adapters

    def state_of(self, digest: str) -> AdapterState:
        """Of one that may be unknown."""
        adapter = self._adapters.get(digest)
        if adapter is None:
            return AdapterState()
        return AdapterState(adapter.is_loading, adapter.is_loaded, self._errors.get(digest, ""))

    def join(self, digest: str) -> int:
        """A sequence that needs the adapter has been accepted. Loads it ahead of its turn, if that takes it from nobody.

        Returns its id. Raises RequestError when it is not known.
        """
        adapter = self._adapters.get(digest)
        if adapter is None:
            raise RequestError("the adapter is not known to this group")
        adapter.num_living += 1
        self._need(adapter, takes_from_waiting=False)
        return adapter.adapter_id

    def leave(self, digest: str) -> None:
        """Such a sequence has ended."""
        self._adapters[digest].num_living -= 1

    def is_ready(self, digest: str) -> bool:
        """Whether the next sequence can run; loads the adapter, if there is or will be room."""
        adapter = self._adapters[digest]
        self._need(adapter, takes_from_waiting=True)
        return adapter.is_loaded

    def hold(self, digest: str) -> None:
        """A sequence that uses it runs."""
        self._adapters[digest].num_running += 1

    def release(self, digest: str) -> None:
        """It runs no more."""
        self._adapters[digest].num_running -= 1

    def load(self, digest: str) -> None:
        """Load the adapter although nobody has asked for it yet. Nothing happens when there is no room now."""
        self._need(self._adapters[digest], takes_from_waiting=False)

    def drop(self, digest: str) -> bool:
        """Take it from the ranks and forget it. False when sequences still need it; then nothing happens."""
        adapter = self._adapters.get(digest)
        if adapter is None:
            return True
        if adapter.num_living or adapter.is_loading:
            return False
        self._evict(adapter)
        self._forget(adapter)
        return True

    def take_commands(self) -> tuple[tuple[int, ...], tuple[AdapterLoad, ...]]:
        """What the next plan tells the ranks: adapters to drop, and to load."""
        commands = tuple(self._to_drop), tuple(self._to_load)
        self._to_drop, self._to_load = [], []
        return commands

    def take_outcomes(self, outcomes: tuple[AdapterOutcome, ...]) -> dict[int, str]:
        """What the ranks have told. Returns why loading failed, by the id of the adapter."""
        failed = {}
        for outcome in outcomes:
            adapter = self._by_id[outcome.adapter_id]
            adapter.is_loading, adapter.is_loaded = False, not outcome.error
            self._errors.pop(adapter.ref.digest, None)
            if outcome.error:
                self._errors[adapter.ref.digest] = failed[adapter.adapter_id] = outcome.error
        return failed

    def lose(self) -> None:
        """The ranks are gone: nothing is loaded, and nothing will be."""
        self._to_load, self._to_drop = [], []
        for adapter in self._adapters.values():
            adapter.is_loading = adapter.is_loaded = False

    def check_integrity(self, living: dict[str, int], running: dict[str, int]) -> None:
        """Compare with the sequences, by digest. Raises RuntimeError when they disagree."""
        for digest, adapter in self._adapters.items():
            if (adapter.num_living, adapter.num_running) != (living.get(digest, 0), running.get(digest, 0)):
                raise RuntimeError(f"adapter {digest} counts {adapter.num_living} and {adapter.num_running} sequences")
            if adapter.num_running and not adapter.is_loaded:
                raise RuntimeError(f"adapter {digest} is used and not loaded")
        if self._config is not None and self.num_bytes > self._config.max_bytes:
            raise RuntimeError(f"adapters take {self.num_bytes} bytes of {self._config.max_bytes}")

    def _need(self, adapter: _Adapter, *, takes_from_waiting: bool) -> None:
        self._adapters.move_to_end(adapter.ref.digest)
        if adapter.takes_room or not self._make_room(adapter, takes_from_waiting=takes_from_waiting):
            return
        adapter.is_loading = True
        self._errors.pop(adapter.ref.digest, None)
        self._to_load.append(AdapterLoad(adapter.adapter_id, adapter.ref.digest, adapter.ref.path))

    def _make_room(self, wanted: _Adapter, *, takes_from_waiting: bool) -> bool:
        """Drop others until `wanted` fits; none, if it does not fit even so. Those whose sequences wait go last."""
        assert self._config is not None
        held = [adapter for adapter in self._adapters.values() if adapter.takes_room]
        num_left, bytes_left = self._config.max_loaded - len(held), self._config.max_bytes - self.num_bytes
        idle = [a for a in held if a.is_loaded and not a.num_living]
        if takes_from_waiting:
            idle += [a for a in held if a.is_loaded and a.num_living and not a.num_running]
        victims: list[_Adapter] = []
        while num_left < 1 or bytes_left < wanted.num_bytes:
            if len(victims) == len(idle):
                return False
            victims.append(idle[len(victims)])
            num_left, bytes_left = num_left + 1, bytes_left + victims[-1].num_bytes
        for victim in victims:
            self._evict(victim)
        return True

    def _evict(self, adapter: _Adapter) -> None:
        if adapter.is_loaded:
            adapter.is_loaded = False
            self._to_drop.append(adapter.adapter_id)

    def _forget_some(self) -> None:
        """So that names which nobody uses any more do not add up."""
        num_over = len(self._adapters) - MAX_REMEMBERED
        newest = next(reversed(self._adapters.values()))
        idle = [a for a in self._adapters.values() if not (a.takes_room or a.num_living) and a is not newest]
        for adapter in idle[: max(0, num_over)]:
            self._forget(adapter)

    def _forget(self, adapter: _Adapter) -> None:
        del self._adapters[adapter.ref.digest], self._by_id[adapter.adapter_id]
        self._errors.pop(adapter.ref.digest, None)
