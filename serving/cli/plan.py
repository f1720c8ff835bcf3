"""`packtrain plan`: what serving a model takes, before there are weights or machines."""

import json
import math
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from model_parallel.config import DTYPE_BYTES, QUANTIZATIONS, ModelConfig
from model_parallel.errors import ConfigError
from model_parallel.gpus import OLDEST_WITH_FP8, check_multiplies_fp8
from model_parallel.memory import (
    DEVICES,
    GIB,
    Device,
    DraftMemory,
    GroupMemory,
    Workload,
    draft_memory,
    kv_bytes_per_token,
    plan_group,
    smallest_tp_size,
)
from serving.cli.terminal import standard_output
from serving.models.known_llama import config_of
from serving.models.sizes import step_sizes

EXIT_DOES_NOT_FIT = 1


def choose_device(gpu: str | None, *, memory_gib: float | None, bandwidth_gb_per_s: float | None) -> Device:
    """A known GPU, numbers of one's own, or a known one with numbers changed. Raises ConfigError."""
    if gpu is not None and gpu.lower() not in DEVICES:
        raise ConfigError(
            f"gpu is {gpu!r}; known: {', '.join(DEVICES)}. Give --memory-gib and --bandwidth for another one"
        )
    known = DEVICES[gpu.lower()] if gpu is not None else None
    memory_bytes = known.memory_bytes if known else None
    bandwidth = known.bandwidth_bytes_per_s if known else None
    for option, value in (("--memory-gib", memory_gib), ("--bandwidth", bandwidth_gb_per_s)):
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"{option} is {value}; it must be a finite number")
    if memory_gib is not None:
        memory_bytes = int(memory_gib * GIB)
    if bandwidth_gb_per_s is not None:
        bandwidth = bandwidth_gb_per_s * 1e9
    if memory_bytes is None or bandwidth is None:
        raise ConfigError("--gpu, or both --memory-gib and --bandwidth, must be given")
    return Device(
        name=known.name if known else "given",
        memory_bytes=memory_bytes,
        bandwidth_bytes_per_s=bandwidth,
        capability=known.capability if known else None,
    )


def smallest_that_fits(
    config: ModelConfig,
    tp_size: int,
    *,
    dtype: str,
    quantization: str,
    kv_cache_dtype: str,
    device: Device,
    workload: Workload,
    utilisation: float,
    draft: DraftMemory | None,
) -> dict[str, Any]:
    """With the same devices the fewest ranks, and with as many ranks the known device with the least memory; None: none."""
    kept: dict[str, Any] = {
        "dtype": dtype, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype, "workload": workload,
        "utilisation": utilisation, "draft": draft,
    }  # fmt: skip
    devices = sorted(DEVICES.values(), key=lambda d: (d.memory_bytes, d.bandwidth_bytes_per_s))
    if "fp8" in (quantization, kv_cache_dtype):
        devices = [d for d in devices if d.capability is not None and d.capability >= OLDEST_WITH_FP8]
    fitting = (d.name for d in devices if plan_group(config, tp_size, device=d, **kept).fits)
    fewest = smallest_tp_size(config, device=device, **kept)
    return {"smallest_tp_on_this_gpu": fewest, "smallest_gpu_at_this_tp": next(fitting, None)}


def as_data(
    config: ModelConfig,
    group: GroupMemory,
    *,
    model: str,
    dtype: str,
    quantization: str,
    kv_cache_dtype: str,
    smallest: dict[str, Any],
) -> dict[str, Any]:
    """The plan as plain data, in bytes, tokens and seconds."""
    batch = group.largest_batch
    return {
        "model": model,
        "dtype": dtype,
        "quantization": quantization,
        "gpu": group.device.name,
        "tensor_parallel_size": len(group.ranks),
        "parameters": config.num_parameters,
        "weight_bytes": plan_group(
            config, 1, dtype=dtype, quantization=quantization, device=group.device, workload=group.workload
        )
        .ranks[0]
        .weight_bytes,
        "kv_cache_dtype": kv_cache_dtype or dtype,
        "kv_bytes_per_token": kv_bytes_per_token(config, config.num_kv_heads, kv_cache_dtype or dtype),
        "max_model_len": group.workload.max_model_len,
        "max_num_seqs": group.workload.max_num_seqs,
        "max_num_batched_tokens": group.workload.max_num_batched_tokens,
        "fits": group.fits,
        "kv_tokens": group.kv_tokens,
        "largest_batch": batch,
        "decode_floor_s": group.decode_floor_s(0),
        "decode_floor_largest_batch_s": group.decode_floor_s(batch),
        **smallest,
        "ranks": [
            {
                "rank": r.rank,
                "query_heads": [r.heads.query_heads.start, r.heads.query_heads.stop - 1],
                "kv_heads": [r.heads.kv_heads.start, r.heads.kv_heads.stop - 1],
                "weight_bytes": r.weight_bytes,
                "activation_bytes": r.activation_bytes,
                "kv_bytes_per_token": r.kv_bytes_per_token,
                "kv_tokens": r.kv_tokens,
                "budget_bytes": r.budget_bytes,
            }
            for r in group.ranks
        ],
    }


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """`as_data`'s result as tables."""

    def gib(num_bytes: int) -> str:
        return f"{num_bytes / GIB:.2f} GiB"

    numbers = f"{plan['dtype']} {plan['quantization']}".rstrip()
    draft = f", drafts by {plan['draft_model']}" if plan["draft_model"] else ""
    title = f"{plan['model']}, {numbers}{draft}, TP={plan['tensor_parallel_size']} on {plan['gpu']}"
    console.print(title, markup=False, soft_wrap=True)  # as a title it would be wrapped to the table's width
    table = Table("rank", "query heads", "kv heads", "weights", "activations", "KV / token", "KV tokens that fit")
    for r in plan["ranks"]:
        heads = (f"{first}-{last}" if first < last else str(first) for first, last in (r["query_heads"], r["kv_heads"]))
        table.add_row(
            str(r["rank"]), *heads, gib(r["weight_bytes"]), gib(r["activation_bytes"]),
            f"{r['kv_bytes_per_token']:,} B", f"{r['kv_tokens']:,}",
        )  # fmt: skip
    console.print(table)
    group = Table(show_header=False)
    group.add_row("parameters", f"{plan['parameters']:,}")
    group.add_row("weights, once", gib(plan["weight_bytes"]))
    group.add_row("KV cache of a token, once", f"{plan['kv_bytes_per_token']:,} bytes")
    group.add_row("largest step", f"{plan['max_num_seqs']} sequences, {plan['max_num_batched_tokens']:,} tokens")
    group.add_row("may be used of a rank's memory", gib(plan["ranks"][0]["budget_bytes"]))
    if plan["fits"]:
        floor_s, batch, batch_s = plan["decode_floor_s"], plan["largest_batch"], plan["decode_floor_largest_batch_s"]
        group.add_row("KV cache of the group", f"{plan['kv_tokens']:,} tokens")
        group.add_row(f"largest batch of {plan['max_model_len']:,} tokens", str(batch))
        group.add_row(
            "decode floor, one short sequence", f"{floor_s * 1e3:.2f} ms a token, {1 / floor_s:,.0f} tokens/s"
        )
        group.add_row("decode floor, largest batch", f"{batch_s * 1e3:.2f} ms a step, {batch / batch_s:,.0f} tokens/s")
    fewest, gpu = plan["smallest_tp_on_this_gpu"], plan["smallest_gpu_at_this_tp"]
    group.add_row("fits", "yes" if plan["fits"] else "[bold red]no[/]")
    group.add_row(f"smallest TP on {plan['gpu']}", str(fewest) if fewest else "none")
    group.add_row(f"smallest GPU at TP={plan['tensor_parallel_size']}", gpu or "none")
    console.print(group)


def plan(
    model: Annotated[str, typer.Option(help="A known name (llama-2-70b-chat), or a checkpoint's directory or file.")],
    tp: Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel ranks.")] = 1,
    gpu: Annotated[str | None, typer.Option(help=f"One of {', '.join(DEVICES)}.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    quantization: Annotated[
        str,
        typer.Option(
            help="int8: weight matrices in eight bits; fp8: layers in e4m3; packed: as the checkpoint has quantised them; none."
        ),
    ] = "none",
    kv_cache_dtype: Annotated[str, typer.Option("--kv-cache-dtype", help="auto: as --dtype; fp8: e4m3.")] = "auto",
    draft_model: Annotated[
        str | None, typer.Option(help="A draft model, which rank 0 holds besides: a known name, or a checkpoint.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt plus answer; the model's own if unset.")
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="Sequences that may run at the same time; as serve chooses if unset.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens computed in one step; as serve chooses if unset.")
    ] = None,
    memory_gib: Annotated[float | None, typer.Option(min=0.001, help="Memory of a rank's device, in GiB.")] = None,
    bandwidth: Annotated[float | None, typer.Option(min=0.001, help="Its bandwidth, in GB/s.")] = None,
    utilisation: Annotated[
        float,
        typer.Option(
            "--memory-utilization", "--utilisation", min=0.01, max=1.0, help="Part of that memory that may be used."
        ),
    ] = 0.9,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a model takes: memory, heads of each rank, KV cache, and whether it fits. No weights are needed.

    Ends with status 1 when it does not fit.
    """
    config = config_of(model)
    quantization = "" if quantization == "none" else quantization
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPE_BYTES)}")
    if quantization not in QUANTIZATIONS:
        raise ConfigError(f"quantization is {quantization!r}; allowed: {', '.join(filter(None, QUANTIZATIONS))}, none")
    if quantization == "packed" and not config.weight_formats:
        raise ConfigError(f"quantization is 'packed', and {model} holds no weights that are quantised in groups")
    config.check_fp8("quantization", quantization)
    if context is not None and context > config.max_position:
        raise ConfigError(f"context is {context}, and the model's own length is {config.max_position} tokens")
    device = choose_device(gpu, memory_gib=memory_gib, bandwidth_gb_per_s=bandwidth)
    if kv_cache_dtype not in ("auto", "fp8"):
        raise ConfigError(f"kv_cache_dtype is {kv_cache_dtype!r}; allowed: auto, fp8")
    kept_kv = "" if kv_cache_dtype == "auto" else kv_cache_dtype
    if device.capability is not None:
        if quantization == "fp8":
            check_multiplies_fp8("quantization", device.name, device.capability)
        if kept_kv:
            check_multiplies_fp8("kv_cache_dtype", device.name, device.capability, instead="auto")
    # A device that is told by its numbers alone may be a CPU, on which steps are smaller.
    sizes = step_sizes("cpu" if gpu is None else "cuda", max_num_seqs, max_num_batched_tokens)
    workload = Workload(max_model_len=context or config.max_position, **sizes._asdict())
    numbers: dict[str, Any] = {"dtype": dtype, "quantization": quantization, "kv_cache_dtype": kept_kv}
    draft = None
    if draft_model is not None:
        guessing = config_of(draft_model)
        kept = "packed" if guessing.weight_formats else ""
        draft = draft_memory(guessing, dtype=dtype, quantization=kept, max_num_seqs=sizes.max_num_seqs)
    rest: dict[str, Any] = numbers | {
        "device": device, "workload": workload, "utilisation": utilisation, "draft": draft,
    }  # fmt: skip
    group = plan_group(config, tp, **rest)
    smallest = smallest_that_fits(config, tp, **rest)
    data = as_data(config, group, model=model, smallest=smallest, **numbers) | {"draft_model": draft_model}
    if as_json:
        typer.echo(json.dumps(data, indent=2))
    else:
        print_plan(data, standard_output())
    if not group.fits:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(plan)
