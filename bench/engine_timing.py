"""The engine on spawned ranks, and the machine's limit, as contenders to be timed."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.timing import ContenderFailedError, Workload
from model_parallel.checkpoint.detect import describe
from model_parallel.config import CacheConfig, DraftConfig, GroupConfig, ModelConfig, ParallelConfig, SchedulerConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.request import EngineRequest, SamplingParams
from model_parallel.engine.scheduler import Scheduler
from model_parallel.errors import GroupFailedError
from model_parallel.runtime.executors import SpawnedExecutor

NUM_REPEATS_OF_LIMIT = 7
MIN_ROWS_OF_LIMIT, MAX_ROWS_OF_LIMIT = 32, 1024
MAX_PRODUCT_S = 0.5
UNLIMITED_REPEATS = 1 << 30


def default_shapes(num_cores: int) -> list[tuple[int, int]]:
    """(tensor-parallel ranks, threads of each): the same cores, used in two ways."""
    return [(1, num_cores), (2, max(1, num_cores // 2))]


def shape_name(parallel: ParallelConfig) -> str:
    """How a row of a table calls an engine."""
    threads = f"{parallel.num_threads} thread{'s' * (parallel.num_threads > 1)} each"
    device = threads if parallel.device == "cpu" else parallel.device
    return f"packtrain TP={parallel.tp_size}, {device}, {weights_name(parallel)}"


def weights_name(parallel: ParallelConfig) -> str:
    """What the weight matrices are kept in."""
    return parallel.quantization or parallel.dtype


class EngineContender:
    """Scheduler, engine loop and executor as they serve, with one process a rank, without Ray and gateway."""

    max_repeats = UNLIMITED_REPEATS

    def __init__(
        self,
        path: Path,
        parallel: ParallelConfig,
        *,
        num_kv_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool = False,
        speculation: str = "off",
        draft: DraftConfig | None = None,
    ) -> None:
        """Starts and loads the ranks. Raises ConfigError, CheckpointError, GroupFailedError."""
        began_s = time.perf_counter()
        cache = CacheConfig(num_blocks=-(-num_kv_tokens // 16), enable_prefix_caching=enable_prefix_caching)
        config = GroupConfig(checkpoint_path=str(path), parallel=parallel, cache=cache, epoch=1, draft=draft)
        self.parallel = parallel
        self.name = shape_name(parallel)
        self.vocab_size = describe(path).config.vocab_size
        self.executor = SpawnedExecutor(config)
        limits = SchedulerConfig(max_model_len=max_model_len, speculation=speculation)
        self.engine = Engine(self.executor, Scheduler(limits, cache, epoch=config.epoch, draft=draft))
        self.ready_s = time.perf_counter() - began_s
        self.detail = f"kernels: {', '.join(sorted(self.executor.kernels_names))}"

    def add(self, workload: Workload, seed: int) -> None:
        """Give the engine all requests of a workload."""
        sampling = SamplingParams(temperature=0.0, max_tokens=workload.num_new_tokens, ignore_eos=True)
        for index, prompt in enumerate(workload.prompts(self.vocab_size, seed)):
            self.engine.add(
                EngineRequest(request_id=f"{seed}-{index}", prompt_token_ids=tuple(prompt), sampling=sampling)
            )

    def run(self, workload: Workload, seed: int) -> float:
        began_s = time.perf_counter()
        num_tokens = 0
        try:
            self.add(workload, seed)
            while self.engine.has_work:
                num_tokens += sum(len(output.token_ids) for output in self.engine.step())
        except GroupFailedError as error:
            raise ContenderFailedError(str(error)) from error
        took_s = time.perf_counter() - began_s
        if num_tokens != workload.batch * workload.num_new_tokens:
            raise ContenderFailedError(
                f"{num_tokens} tokens came of {workload}: {self.engine.failure or 'no reason known'}"
            )
        return took_s

    def close(self) -> None:
        self.executor.shutdown()


class Limit:
    """The floor that this machine's read bandwidth and bfloat16 arithmetic set, as torch reaches them, measured at every call.

    Every weight is read once a step and takes part in one multiply-add a token; caches and attention are left out.
    """

    max_repeats = UNLIMITED_REPEATS

    def __init__(self, model: ModelConfig, *, bytes_per_weight: int, num_threads: int, name: str) -> None:
        self.name = name
        self._num_parameters = model.num_parameters
        self._bytes_per_weight = bytes_per_weight
        torch.set_num_threads(num_threads)
        self._data = torch.ones(128 << 20)
        self._weight_OI = torch.randn(4096, 4096).bfloat16()
        self._x_TI = torch.randn(self._num_rows(), 4096).bfloat16()
        self.bandwidths: list[float] = []
        """Bytes a second, of every call."""
        self.rates: list[float] = []
        """Operations a second, of every call."""

    def _num_rows(self) -> int:
        """Of the product: 1024, or fewer where that takes long, as it does on a machine that emulates bfloat16."""
        x_TI, num_rows = torch.randn(MIN_ROWS_OF_LIMIT, 4096).bfloat16(), MIN_ROWS_OF_LIMIT
        row_s = _best_of(1, lambda: torch.nn.functional.linear(x_TI, self._weight_OI)) / num_rows
        while num_rows < MAX_ROWS_OF_LIMIT and 2 * num_rows * row_s < MAX_PRODUCT_S:
            num_rows *= 2
        return num_rows

    def measure(self) -> None:
        """Append to `bandwidths` and `rates`."""
        read_s = _best_of(NUM_REPEATS_OF_LIMIT, self._data.sum)
        product_s = _best_of(NUM_REPEATS_OF_LIMIT, lambda: torch.nn.functional.linear(self._x_TI, self._weight_OI))
        self.bandwidths.append(self._data.nbytes / read_s)
        self.rates.append(2 * self._x_TI.shape[0] * self._weight_OI.numel() / product_s)

    def run(self, workload: Workload, seed: int) -> float:
        self.measure()
        return floor_s(
            workload,
            num_parameters=self._num_parameters,
            bytes_per_weight=self._bytes_per_weight,
            bandwidth=self.bandwidths[-1],
            rate=self.rates[-1],
        )

    @property
    def detail(self) -> str:
        bandwidth, rate = statistics.median(self.bandwidths), statistics.median(self.rates)
        return f"read {bandwidth / 1e9:.1f} GB/s, bfloat16 product {rate / 1e9:.0f} GFLOP/s"


def _best_of(num_repeats: int, run: Callable[[], object]) -> float:
    """Seconds of the fastest: what slows the others down is not what the machine can do. One more is not counted."""
    times = []
    for _ in range(num_repeats + 1):
        began_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - began_s)
    return min(times[1:])


def floor_s(workload: Workload, *, num_parameters: int, bytes_per_weight: int, bandwidth: float, rate: float) -> float:
    """Seconds that a workload takes at least, at `bandwidth` bytes/s and `rate` operations/s."""
    prefill_s = 2 * num_parameters * workload.batch * workload.num_prompt_tokens / rate
    step_s = max(num_parameters * bytes_per_weight / bandwidth, 2 * num_parameters * workload.batch / rate)
    return prefill_s + workload.num_new_tokens * step_s
