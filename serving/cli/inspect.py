"""`packtrain inspect`: what a checkpoint is, read from its configuration and its files' headers."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from model_parallel.checkpoint.detect import CheckpointInfo, describe
from serving.models.known_llama import llama_2_size
from serving.models.licence import licence_of


def inspect_checkpoint(info: CheckpointInfo) -> dict[str, Any]:
    """Everything about a checkpoint that can be told without reading its weights, after checking that it is whole.

    Raises CheckpointError naming file and tensor when one is missing, left over, or of a wrong shape or type.
    """
    from model_parallel.checkpoint.loader import check_complete, open_checkpoint
    from model_parallel.model.partition import shard_table

    checkpoint = open_checkpoint(info)
    table = shard_table(info.config, 1, 0)
    check_complete(info, checkpoint, table)
    config, licence, size = info.config, licence_of(info), llama_2_size(info.config)
    return {
        "path": str(info.path),
        "format": info.format,
        "architecture": f"Llama 2 {size.upper()}" if size else "Llama",
        "parameters": config.num_parameters,
        "dtypes": sorted({checkpoint.tensors[name].type for name in table}),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "query_heads": config.num_query_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "context": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tied_embeddings": config.tie_word_embeddings,
        "tokenizer": str(info.tokenizer_path or ""),
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": list(config.eos_token_ids),
        "chat_format": info.chat_format,
        "licence": licence.name,
        "licence_notice": licence.notice,
        "use_policy": licence.use_policy_url,
        "files": [{"name": path.name, "bytes": path.stat().st_size} for path in info.weight_files],
    }


def print_inspection(found: dict[str, Any], console: Console) -> None:
    """`inspect_checkpoint`'s result as a table."""
    table = Table(show_header=False, title=found["path"])
    for key, value in found.items():
        if key in ("path", "files") or value in ("", None, []):
            continue
        shown = (
            f"{value:,}"
            if key == "parameters"
            else ", ".join(map(str, value))
            if isinstance(value, list)
            else str(value)
        )
        table.add_row(key.replace("_", " "), shown)
    for file in found["files"]:
        table.add_row("file", f"{file['name']}  {file['bytes']:,} bytes")
    console.print(table)


def inspect(
    source: Annotated[Path, typer.Argument(help="Directory in Hugging Face's or Meta's format, or GGUF file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint is, and check that nothing of it is missing or left over. Weights are not read."""
    found = inspect_checkpoint(describe(source))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_inspection(found, Console())


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(inspect)
