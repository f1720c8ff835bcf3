"""The `packtrain bench` commands. What they measure with is imported when they run: torch takes seconds."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from model_parallel.errors import ConfigError
from serving.cli.terminal import standard_output

DEFAULT_MODEL = "smollm2-135m-instruct"
NUM_KV_TOKENS = 16_384

app = typer.Typer(help="Measure an engine. (A running server: packtrain load.)", no_args_is_help=True)
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the result here, too.")]


@app.command()
def engine(
    model: Annotated[str, typer.Option(help="A known name, a directory, or a GGUF file.")] = DEFAULT_MODEL,
    tp: Annotated[
        int | None, typer.Option("--tp", min=1, help="Tensor-parallel ranks; unset, 1 and 2 on the same cores.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of a CPU rank; unset, all cores are shared out.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    quantization: Annotated[str, typer.Option(help="int8, on GPUs fp8, or nothing.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="Of every workload.")] = 3,
    profile: Annotated[
        bool, typer.Option("--profile", help="Instead: where a decode step's time goes, operation by operation.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Time the engine on fixed work, without Ray and gateway, beside the limit that a CPU sets.

    Work is named sequences × prompt tokens→new tokens. Medians of runs in turn.
    """
    from bench.engine_timing import default_shapes
    from bench.json_files import check_can_be_written, write_json
    from bench.machine import describe_machine
    from bench.timing import Timing, as_table
    from model_parallel.machine import read_machine

    check_can_be_written(json_file, "--json")
    num_cores = read_machine().num_cpus
    if tp is None and threads is None:
        shapes = default_shapes(num_cores)
    else:
        shapes = [(tp or 1, threads or max(1, num_cores // (tp or 1)))]
    console = standard_output()
    if profile:
        profile_shapes(model, shapes, dtype=dtype, quantization=quantization, device=device, console=console)
        return
    result = time_shapes(
        model, shapes, dtype=dtype, quantization=quantization, device=device, repeats=repeats, console=console
    )
    timings = [Timing.from_data(row) for row in result["timings"]]
    console.print(as_table(timings, f"{model}; {describe_machine(result['machine'])}"))
    if json_file is not None:
        write_json(result, json_file)
    if result["failures"]:
        raise typer.Exit(1)


def profile_shapes(
    model: str,
    shapes: Sequence[tuple[int, int]],
    *,
    dtype: str,
    quantization: str,
    device: str,
    console: Console,
) -> None:
    """Print the profile of each of `shapes` on the work that decodes. Raises ConfigError, CheckpointError, GroupFailedError."""
    from bench.engine_profile import as_table, profile_decode
    from bench.engine_timing import Limit, shape_name
    from bench.timing import WORKLOADS
    from model_parallel.checkpoint.detect import describe
    from model_parallel.config import DTYPE_BYTES, ParallelConfig
    from serving.models.fetch import resolve_source

    path = resolve_source(model)
    config = describe(path).config
    if device != "cpu":
        raise ConfigError(f"device is {device!r}; floors of operations are known for cpu alone")
    for tp_size, num_threads in shapes:
        parallel = ParallelConfig(tp_size=tp_size, num_threads=num_threads, dtype=dtype, quantization=quantization)
        limit = Limit(config, bytes_per_weight=DTYPE_BYTES[dtype], num_threads=tp_size * num_threads, name="limit")
        limit.measure()
        # A rank has its part of the machine's cores, and so of their bandwidth and arithmetic.
        bandwidth, rate = limit.bandwidths[0] / tp_size, limit.rates[0] / tp_size
        for work in (work for work in WORKLOADS if not work.is_prefill):
            profile = profile_decode(path, parallel, work, vocab_size=config.vocab_size)
            rows = profile.rows(bandwidth=bandwidth, rate=rate)
            console.print(as_table(rows, f"{shape_name(parallel)}, {work}"))
        console.print(f"means over the decode steps of rank 0; {limit.detail}, shared by {tp_size} ranks")


def time_shapes(
    model: str,
    shapes: Sequence[tuple[int, int]],
    *,
    dtype: str,
    quantization: str,
    device: str,
    repeats: int,
    console: Console,
) -> dict[str, Any]:
    """Each of `shapes` (ranks, threads of each) on the fixed work, as plain data. Raises ConfigError, CheckpointError."""
    from bench.engine_timing import EngineContender, Limit
    from bench.machine import machine_facts
    from bench.timing import WORKLOADS, Contender, time_in_turn
    from model_parallel.checkpoint.detect import describe
    from model_parallel.config import DTYPE_BYTES, ParallelConfig
    from serving.models.fetch import resolve_source

    facts, path = machine_facts(), resolve_source(model)
    config = describe(path).config
    longest = max(work.num_prompt_tokens + work.num_new_tokens for work in WORKLOADS)
    if longest > config.max_position:
        raise ConfigError(f"{model} is made for {config.max_position} tokens, and the work takes {longest}")
    contenders: list[Contender] = []
    with contextlib.ExitStack() as stack:
        for tp_size, num_threads in shapes:
            parallel = ParallelConfig(
                tp_size=tp_size, num_threads=num_threads, dtype=dtype, quantization=quantization, device=device
            )
            parallel.check_fits(config)
            started = EngineContender(path, parallel, num_kv_tokens=NUM_KV_TOKENS, max_model_len=longest)
            stack.callback(started.close)
            console.print(f"{started.name}: ready after {started.ready_s:.1f} s ({started.detail})")
            contenders.append(started)
        if device == "cpu":
            bytes_per_weight = 1 if quantization else DTYPE_BYTES[dtype]
            cores = max(tp_size * num_threads for tp_size, num_threads in shapes)
            name = f"limit, {8 * bytes_per_weight} bits a weight"
            contenders.append(Limit(config, bytes_per_weight=bytes_per_weight, num_threads=cores, name=name))
        timings, failures = time_in_turn(contenders, WORKLOADS, repeats, console.print)
    return {
        "machine": facts,
        "model": model,
        "num_repeats": repeats,
        "failures": failures,
        "timings": [timing.as_data() for timing in timings],
    }


def register(parent: typer.Typer) -> None:
    """Add the commands to the command line."""
    parent.add_typer(app, name="bench")
