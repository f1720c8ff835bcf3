"""The adapters that one rank holds. Which, and when, the leader decides (engine/adapters.py); here they are read and kept.

Reading goes on in a thread beside the steps. In each step the ranks tell each other how far they are, as long as something is
being read, so that all of them have an adapter from the same step on, or none has it.
"""

import logging
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from model_parallel.checkpoint.adapter_weights import load_adapter
from model_parallel.collectives.interface import Collectives
from model_parallel.config import GroupConfig, ModelConfig
from model_parallel.engine.messages import AdapterLoad, AdapterOutcome
from model_parallel.errors import ConfigError, EngineError
from model_parallel.kernels.interface import Fp8Matrix, GroupMatrix, LowRankUpdate, PackedAdapter
from model_parallel.model.llama import Llama

logger = logging.getLogger(__name__)

MAX_WAIT_S = 0.02
"""How long a step that computes nothing else waits for what is being read."""
_MESSAGE_LENGTH = 512
_IS_READING, _IS_READ, _HAS_FAILED = 0.0, 1.0, 2.0


class HostCache:
    """Parts of adapters that were read and cut lately, up to so many bytes; the one used longest ago goes first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, Mapping[str, LowRankUpdate]] = OrderedDict()
        self._num_bytes: dict[str, int] = {}

    @property
    def num_bytes(self) -> int:
        return sum(self._num_bytes.values())

    def find(self, digest: str) -> Mapping[str, LowRankUpdate] | None:
        if digest in self._kept:
            self._kept.move_to_end(digest)
        return self._kept.get(digest)

    def keep(self, digest: str, updates: Mapping[str, LowRankUpdate]) -> None:
        num_bytes = sum(p.down_RI.nbytes + p.up_OR.nbytes for update in updates.values() for p in update.parts)
        if num_bytes > self._max_bytes:
            return
        self._kept[digest], self._num_bytes[digest] = updates, num_bytes
        while self.num_bytes > self._max_bytes:
            oldest, _ = self._kept.popitem(last=False)
            del self._num_bytes[oldest]


class AdapterStore:
    """See the module. All but reading happens in the rank's own thread."""

    def __init__(
        self, config: GroupConfig, model_config: ModelConfig, model: Llama, collectives: Collectives, dtype: torch.dtype
    ) -> None:
        self._config = config
        self._model_config = model_config
        self._model = model
        self._collectives = collectives
        self._dtype = dtype
        self._cache = HostCache(0 if config.adapters is None else config.adapters.host_cache_bytes)
        self._loaded: dict[int, PackedAdapter] = {}
        self._reading: dict[int, Future[PackedAdapter]] = {}
        """In the order of the leader's commands, which is the same on all ranks."""
        self._reader: ThreadPoolExecutor | None = None

    @property
    def num_loaded(self) -> int:
        return len(self._loaded)

    def of(self, adapter_id: int) -> PackedAdapter:
        """One that is loaded."""
        return self._loaded[adapter_id]

    def begin(self, load: AdapterLoad) -> None:
        """Read it, beside the steps."""
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="packtrain-adapters", initializer=_compute_alone)
        self._reading[load.adapter_id] = self._reader.submit(self._read, load)

    def drop(self, adapter_id: int) -> None:
        del self._loaded[adapter_id]

    def settle(self, *, may_wait: bool) -> tuple[AdapterOutcome, ...]:
        """Agree with the other ranks on what has been read by now. All ranks call it in the same step; what it returns is the
        same on all. `may_wait`: for up to MAX_WAIT_S, because the step has nothing else to do."""
        if not self._reading:
            return ()
        if may_wait:
            wait(self._reading.values(), MAX_WAIT_S)
        device = self._model.final_norm_E.device
        states = torch.tensor([_state_of(future) for future in self._reading.values()], device=device)
        everywhere = self._collectives.all_gather(states).cpu()  # [ranks, adapters]
        outcomes = []
        for index, adapter_id in enumerate(list(self._reading)):
            of_ranks = everywhere[:, index].tolist()
            if _IS_READING in of_ranks:
                continue
            future = self._reading.pop(adapter_id)
            error = self._first_error(future, of_ranks) if _HAS_FAILED in of_ranks else ""
            if error and self._collectives.rank == 0:
                logger.error("an adapter could not be loaded: %s", error)
            if not error:
                self._loaded[adapter_id] = future.result()
            outcomes.append(AdapterOutcome(adapter_id, error))
        return tuple(outcomes)

    def close(self) -> None:
        """What is still being read is not waited for."""
        if self._reader is not None:
            self._reader.shutdown(wait=False, cancel_futures=True)
        self._loaded.clear()
        self._reading.clear()

    def _read(self, load: AdapterLoad) -> PackedAdapter:
        updates = self._cache.find(load.digest)
        if updates is None:
            updates = load_adapter(
                Path(load.path),
                load.digest,
                self._model_config,
                self._collectives.size,
                self._collectives.rank,
                self._dtype,
            )
            self._cache.keep(load.digest, updates)
        return self._model.pack_adapter(updates)

    def _first_error(self, future: "Future[PackedAdapter]", of_ranks: list[float]) -> str:
        """What the first rank that has failed says. All ranks ask."""
        error = future.exception()
        text = (
            ""
            if error is None
            else str(error)
            if isinstance(error, EngineError)
            else f"{type(error).__name__}: {error}"
        )
        if error is not None and not isinstance(error, EngineError):
            logger.error("an adapter could not be loaded", exc_info=error)
        encoded = text.encode()[:_MESSAGE_LENGTH].ljust(_MESSAGE_LENGTH, b"\0")
        device = self._model.final_norm_E.device
        texts = self._collectives.all_gather(torch.tensor(list(encoded), dtype=torch.float32, device=device)).cpu()
        rank = of_ranks.index(_HAS_FAILED)
        said = bytes(int(code) for code in texts[rank].tolist()).rstrip(b"\0").decode(errors="ignore")
        return f"rank {rank}: {said}"


def check_takes_adapters(weights: Mapping[str, Any], multiple: int) -> None:
    """Refuse a matrix of parts that are stored in different ways, where adapters cannot change the outputs of each.

    `weights` are loader.load_shard's, `multiple` is Kernels.adapted_multiple. Raises ConfigError.
    """
    for name, weight in weights.items():
        parts = weight[:-1] if isinstance(weight, tuple) else ()
        for begin in accumulate(p.num_outputs if isinstance(p, GroupMatrix | Fp8Matrix) else p.shape[0] for p in parts):
            if begin % multiple:
                raise ConfigError(
                    f"{name} is of parts that are quantised in different ways, and one begins at output {begin}; adapters need "
                    f"a multiple of {multiple} there. Set quantization to none, or leave out the lora section"
                )


def _state_of(future: "Future[PackedAdapter]") -> float:
    if not future.done():
        return _IS_READING
    return _IS_READ if future.exception() is None else _HAS_FAILED


def _compute_alone() -> None:
    """The steps have the cores."""
    torch.set_num_threads(1)
