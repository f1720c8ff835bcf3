"""What LoRA adapters cost: the same batch without any, with one, and with many, in turn every few steps; and loading them.

Adapters have random weights. With --num-adapters 8 and a batch of 16, each is of two sequences.

    python -m bench.adapters [--model PATH] [--rank 16] [--modules q_proj,v_proj] [--batch 16] [--num-adapters 8] [--rounds 4]
                             [--tp 1] [--threads N] [--dtype bfloat16] [--device cpu] [--cycles 0] [--json FILE]
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from bench.engine_timing import shape_name
from bench.machine import describe_machine, machine_facts
from bench.support.random_adapter import ALL_MODULES, save_random_adapter
from bench.timing import Workload
from bench.turns import Run, ratio_of_turns, take_turns
from model_parallel.checkpoint.adapter_files import adapter_bytes, describe_adapter
from model_parallel.checkpoint.detect import describe
from model_parallel.config import AdapterConfig, CacheConfig, GroupConfig, ModelConfig, ParallelConfig, SchedulerConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.request import AdapterRef, EngineRequest, SamplingParams
from model_parallel.engine.scheduler import Scheduler
from model_parallel.errors import GroupFailedError
from model_parallel.machine import read_machine
from model_parallel.runtime.executors import SpawnedExecutor
from serving.models.fetch import fetch_model

MODEL = "smollm2-135m-instruct"
MAX_MODEL_LEN = 512
NUM_STEPS_IN_TURN = 4
MAX_BYTES = 8 << 30


class AdaptedGroup:
    """One group on spawned ranks, without Ray and gateway, that knows some adapters."""

    def __init__(self, path: Path, parallel: ParallelConfig, directories: Sequence[Path], batch: int) -> None:
        """Starts the ranks. Raises ConfigError, CheckpointError, GroupFailedError."""
        cache = CacheConfig(num_blocks=batch * MAX_MODEL_LEN // 16, enable_prefix_caching=False)
        config = GroupConfig(
            checkpoint_path=str(path),
            parallel=parallel,
            cache=cache,
            epoch=1,
            adapters=AdapterConfig(max_loaded=max(1, len(directories)), max_bytes=MAX_BYTES),
            scheduler=SchedulerConfig(max_model_len=MAX_MODEL_LEN),
        )
        self.model: ModelConfig = describe(path).config
        self.executor = SpawnedExecutor(config)
        scheduler = Scheduler(config.scheduler, cache, epoch=1, adapters=config.adapters)
        self.engine = Engine(self.executor, scheduler)
        infos = [describe_adapter(directory, self.model) for directory in directories]
        self.refs = [AdapterRef(info.digest, str(info.path)) for info in infos]
        self.sizes = [adapter_bytes(info, self.model, parallel.tp_size, dtype=parallel.dtype) for info in infos]
        for ref, num_bytes in zip(self.refs, self.sizes, strict=True):
            self.engine.know_adapter(ref, num_bytes)

    def load(self, ref: AdapterRef) -> None:
        """Raises GroupFailedError."""
        self.engine.load_adapter(ref.digest)
        self.run()

    def run(self) -> int:
        """Step until nothing is left to do. Returns the tokens that came."""
        num_tokens = 0
        while self.engine.has_work:
            num_tokens += sum(len(output.token_ids) for output in self.engine.step())
        if self.engine.failure is not None:
            raise GroupFailedError(self.engine.failure)
        return num_tokens

    def cpu_s(self) -> float:
        """Of the ranks' processors until now."""
        times = [psutil.Process(pid).cpu_times() for pid in self.executor.pids]
        return sum(each.user + each.system for each in times)

    def close(self) -> None:
        self.executor.shutdown()


class Contender:
    """A group whose sequences take turns with the first `num_adapters` adapters; 0 is none."""

    def __init__(self, name: str, group: AdaptedGroup, num_adapters: int) -> None:
        self.name = name
        self.group = group
        self.cpu_s: list[float] = []
        """Of the ranks' processors, in each round. Other processes of the machine do not count."""
        self._num_adapters = num_adapters

    def begin(self, workload: Workload, seed: int) -> Run:
        """A batch whose prompts have been read."""
        sampling = SamplingParams(temperature=0.0, max_tokens=workload.num_new_tokens, ignore_eos=True)
        refs: list[AdapterRef | None] = [*self.group.refs[: self._num_adapters]] or [None]
        prompts = workload.prompts(self.group.model.vocab_size, seed)
        return Run(
            self.group.engine,
            [
                EngineRequest(
                    request_id=f"{seed}-{index}",
                    prompt_token_ids=tuple(prompt),
                    sampling=sampling,
                    adapter=refs[index % len(refs)],
                )
                for index, prompt in enumerate(prompts)
            ],
        )


def compare(
    contenders: Sequence[Contender], workload: Workload, num_rounds: int, report: Callable[[str], None]
) -> dict[str, Any]:
    """All in turn, some steps each, on the same prompts. Prompts are not timed."""
    ratios: dict[str, list[float]] = {each.name: [] for each in contenders}
    step_times_s: dict[str, list[float]] = {each.name: [] for each in contenders}
    for seed in range(num_rounds + 1):  # the first one warms up
        short = workload._replace(num_new_tokens=min(workload.num_new_tokens, 2 * NUM_STEPS_IN_TURN))
        runs = [each.begin(workload if seed else short, seed) for each in contenders]
        before_s = [each.group.cpu_s() for each in contenders]
        take_turns(runs, NUM_STEPS_IN_TURN)
        if not seed:
            continue
        for each, run, began_s in zip(contenders, runs, before_s, strict=True):
            each.cpu_s.append(each.group.cpu_s() - began_s)
            step_times_s[each.name] += run.step_times_s
            ratios[each.name].append(1 / ratio_of_turns(run, runs[0]))
        report(f"round {seed}: tokens/s {', '.join(f'{name} {of[-1]:.3f} ×' for name, of in ratios.items())}")
    base_cpu_s = sum(contenders[0].cpu_s)
    return {
        "workload": str(workload),
        "tokens_per_s": {name: workload.batch / statistics.median(times) for name, times in step_times_s.items()},
        "ratio": {name: statistics.median(of) for name, of in ratios.items()},
        "ratio_of_processor_time": {each.name: base_cpu_s / sum(each.cpu_s) for each in contenders},
    }


def measure_cycles(group: AdaptedGroup, num_cycles: int) -> dict[str, Any]:
    """Load and unload each adapter in turn. Seconds of a load; the ranks' memory after a tenth of the cycles, and at the end."""
    ranks = [psutil.Process(pid) for pid in group.executor.pids]
    times_s, num_bytes = [], []
    for cycle in range(num_cycles):
        ref, size = group.refs[cycle % len(group.refs)], group.sizes[cycle % len(group.refs)]
        group.engine.know_adapter(ref, size)
        began_s = time.perf_counter()
        group.load(ref)
        times_s.append(time.perf_counter() - began_s)
        if not group.engine.drop_adapter(ref.digest):
            raise GroupFailedError("an adapter that nobody uses cannot be dropped")
        group.run()
        num_bytes.append(sum(rank.memory_full_info().uss for rank in ranks))
    return {
        "cycles": num_cycles,
        "median_load_s": statistics.median(times_s),
        "bytes_after_a_tenth": num_bytes[num_cycles // 10],
        "bytes_at_the_end": num_bytes[-1],
    }


def measure(given: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The whole run, as plain data."""
    path = given.model or fetch_model(MODEL)
    parallel = ParallelConfig(
        tp_size=given.tp,
        device=given.device,
        dtype=given.dtype,
        num_threads=given.threads or max(1, read_machine().num_cpus // given.tp),
    )
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        directories = [Path(directory) / str(number) for number in range(given.num_adapters)]
        for seed, adapter in enumerate(directories):
            save_random_adapter(
                adapter, describe(path).config, rank=given.rank, seed=seed, modules=given.modules.split(","), size=0.002
            )
        contenders = []
        with ExitStack() as stack:
            for name, num_adapters in (("no adapter", 0), ("1 adapter", 1), (f"{given.num_adapters} adapters", None)):
                group = AdaptedGroup(path, parallel, directories, given.batch)
                stack.callback(group.close)
                for ref in group.refs[:num_adapters]:
                    group.load(ref)
                contenders.append(Contender(name, group, len(group.refs) if num_adapters is None else num_adapters))
            workload = Workload(given.batch, given.prompt_tokens, given.new_tokens)
            result = compare(contenders, workload, given.rounds, console.print)
            for ref in group.refs:
                group.engine.drop_adapter(ref.digest)
            cycles = measure_cycles(group, given.cycles) if given.cycles else None
    return {
        "machine": describe_machine(machine_facts()),
        "load_average": load_average,
        "engine": shape_name(parallel),
        "kernels": sorted(group.executor.kernels_names),
        "rank": given.rank,
        "modules": given.modules,
        "mb_an_adapter": group.sizes[0] / 1e6,
        **result,
        "cycles": cycles,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="directory or GGUF file; unset, SmolLM2-135M")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--modules", default=",".join(ALL_MODULES))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--num-adapters", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of a rank; unset, the cores shared out")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cycles", type=int, default=0, help="load and unload so often afterwards")
    parser.add_argument("--json", type=Path, help="write the result here too")
    given = parser.parse_args()
    console = Console(stderr=True)
    result = measure(given, console)
    text = json.dumps(result, indent=1)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
