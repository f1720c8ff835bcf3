"""A real engine on ranks that are threads of the test's process."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from model_parallel.config import AdapterConfig, CacheConfig, DraftConfig, SchedulerConfig, TokenTable
from model_parallel.engine.engine import Engine
from model_parallel.engine.request import AdapterRef, EngineOutput, EngineRequest
from model_parallel.engine.scheduler import Scheduler
from model_parallel.engine.speculation import Drafter
from model_parallel.runtime.executors import InProcessExecutor
from model_parallel.runtime.rank import Rank
from model_parallel.runtime.rank_process import RankFactory
from tests.support.ranks import group_config


class LocalGroup:
    """Ranks that are loaded once and driven by one engine after another, each with its own scheduling."""

    def __init__(
        self,
        path: Path,
        tp_size: int,
        *,
        dtype: str = "float32",
        quantization: str = "",
        device: str = "cpu",
        deterministic: bool = False,
        num_blocks: int = 256,
        rank_factory: RankFactory = Rank,
        tokens: TokenTable | None = None,
        adapters: AdapterConfig | None = None,
        draft: DraftConfig | None = None,
        known: Sequence[tuple[AdapterRef, int]] = (),
    ) -> None:
        """`known` are adapters, each with its bytes on a rank."""
        config = group_config(
            path,
            tp_size,
            dtype=dtype,
            quantization=quantization,
            device=device,
            deterministic=deterministic,
            num_blocks=num_blocks,
        )
        self.config = replace(config, tokens=tokens, adapters=adapters, draft=draft)
        self.known = known
        torch.set_num_threads(1)
        self.executor = InProcessExecutor(self.config, rank_factory=rank_factory)

    @property
    def kernels_name(self) -> str:
        return str(self.executor._workers[0].kernels_name)  # type: ignore[attr-defined]

    @property
    def is_deterministic(self) -> bool:
        return bool(self.executor._workers[0].deterministic)

    def run(
        self,
        requests: Sequence[EngineRequest],
        *,
        num_blocks: int | None = None,
        prefix_caching: bool = False,
        max_prefill_chunk: int = 1 << 30,
        waves: Sequence[int] = (),
        before: Sequence[EngineRequest] = (),
        speculation: str = "off",
        drafter: Drafter | None = None,
    ) -> "Outcome":
        """Run `before` to their ends, then `requests`; those with index in `waves` are added only when nothing else runs."""
        cache = CacheConfig(
            num_blocks=num_blocks or self.config.cache.num_blocks, block_size=16, enable_prefix_caching=prefix_caching
        )
        config = SchedulerConfig(
            max_model_len=1024,
            max_prefill_chunk=max_prefill_chunk,
            max_num_batched_tokens=256,
            speculation=speculation,
        )
        scheduler = Scheduler(config, replace(cache), epoch=1, adapters=self.config.adapters, drafter=drafter)
        scheduler._last_step_id = self.executor._workers[0].last_step_id  # type: ignore[attr-defined]
        scheduler._last_seq_id = scheduler._last_step_id * 1000
        # So are grammars: those of the engine before are still there under its numbers.
        scheduler._grammars._last_id = scheduler._last_step_id * 1000
        # Each scheduler begins anew; so the ranks, which go on, must meet no number of an adapter twice.
        scheduler.adapters._last_id = scheduler._last_step_id * 1000
        for ref, num_bytes in self.known:
            scheduler.adapters.know(ref, num_bytes)
        engine = Engine(self.executor, scheduler)
        outcome = Outcome()
        early = [r for i, r in enumerate(requests) if i not in waves]
        for wave in [before, early, *([requests[i]] for i in waves)]:
            for request in wave:
                engine.add(request)
            while engine.has_work:
                for output in engine.step():
                    outcome.outputs[output.request_id].append(output)
        engine.check_integrity()
        for worker in self.executor._workers:
            worker.adapters._loaded.clear()  # type: ignore[attr-defined]
        outcome.num_preemptions = engine.stats.num_preemptions
        outcome.num_draft_tokens = engine.stats.num_draft_tokens
        outcome.num_accepted_tokens = engine.stats.num_accepted_tokens
        if engine.stats.kv_usage:
            raise AssertionError(f"{engine.stats.kv_usage:.0%} of the KV cache is still held")
        return outcome

    def close(self) -> None:
        self.executor.shutdown()


class Outcome:
    """What an engine put out, by request id."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[EngineOutput]] = defaultdict(list)
        self.num_preemptions = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]

    def last(self, request_id: str) -> EngineOutput:
        return self.outputs[request_id][-1]
