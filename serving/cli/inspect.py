"""`packtrain inspect`: what a checkpoint is, read from its configuration and its files' headers."""

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from model_parallel.checkpoint.detect import CheckpointInfo, describe
from model_parallel.errors import CheckpointError, ConfigError
from serving.cli.terminal import standard_output
from serving.models.chat import resolve_text
from serving.models.fetch import existing_source
from serving.models.generation_defaults import RULES, default_sampling
from serving.models.known_llama import llama_2_size
from serving.models.licence import licence_of
from serving.models.verify import verify

if TYPE_CHECKING:
    from model_parallel.checkpoint.stored import Checkpoint
    from model_parallel.model.partition import Shard


def inspect_checkpoint(info: CheckpointInfo) -> dict[str, Any]:
    """Everything about a checkpoint that can be told without computing with it, after checking that it is whole.

    Raises CheckpointError naming file and tensor when one is missing, left over, or of a wrong shape or type, and ConfigError
    for a chat format that the tokenizer cannot have.
    """
    from model_parallel.checkpoint.loader import check_complete, open_checkpoint
    from model_parallel.model.partition import shard_table

    checkpoint = open_checkpoint(info)
    table = shard_table(info.config, 1, 0)
    check_complete(info, checkpoint, table)
    text = resolve_text(info) if info.tokenizer_kind else None
    chat = text.chat_format if text is not None else None
    rules = {rule: _sampling(info, rule) for rule in RULES}
    config, licence, size = info.config, licence_of(info), llama_2_size(info.config)
    return {
        "path": str(info.path),
        "format": info.format,
        "architecture": f"Llama 2 {size.upper()}" if size else "Llama",
        "parameters": config.num_parameters,
        "dtypes": sorted({checkpoint.tensors[name].type for name in table}),
        "packed_weights": _packed(checkpoint, table),
        "fp8_weights": len(config.fp8_weights),
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
        "rope_scaling": info.rope_scaling,
        "tied_embeddings": config.tie_word_embeddings,
        "tokenizer": str(info.tokenizer_path or ""),
        "bos_token_id": text.tokenizer.bos_token_id if text is not None else config.bos_token_id,
        "eos_token_ids": list(text.eos_token_ids if text is not None else config.eos_token_ids),
        "chat_format": chat.name if chat is not None else "",
        "chat_system": (chat.default_system or chat.shown_system) if chat is not None else "",
        "default_sampling": rules,
        "licence": licence.name,
        "licence_notice": licence.notice,
        "use_policy": licence.use_policy_url,
        "warnings": [*info.warnings, *checkpoint.warnings, *(text.warnings if text is not None else ())],
        "files": [{"name": path.name, "bytes": path.stat().st_size} for path in info.weight_files],
    }


def _sampling(info: CheckpointInfo, rule: str) -> dict[str, float] | str:
    """What a rule gives; the reason where it gives nothing. Raises ConfigError for the one that is taken when none is named."""
    try:
        return default_sampling(info, rule)
    except ConfigError as error:
        if rule == RULES[0]:
            raise
        return str(error)


def _packed(checkpoint: "Checkpoint", table: "dict[str, Shard]") -> dict[str, Any]:
    """What quantization: packed keeps: bytes of all weights at TP=1, the others in bfloat16; and formats. {}: nothing."""
    from model_parallel.memory import weight_bytes
    from model_parallel.model.partition import kept_formats

    formats = {name: found for name in table if (found := checkpoint.group_format(name)) is not None}
    if not (kept := kept_formats(table, formats)):
        return {}
    counts = Counter(f"{form.name}, groups of {form.group_size}" for form in kept.values())
    sizes = weight_bytes(table, dtype="bfloat16", quantization="packed", formats=formats)
    return {"bytes": sum(sizes.values()), "matrices": dict(sorted(counts.items()))}


def print_inspection(found: dict[str, Any], console: Console) -> None:
    """`inspect_checkpoint`'s result as a table."""
    console.print(found["path"], markup=False, soft_wrap=True)  # a title would be wrapped to the table's width
    table = Table(show_header=False)
    for key, value in found.items():
        if key in ("path", "files", "licence_notice", "warnings") or value in ("", None, []):
            continue
        if key == "packed_weights":
            if value:
                table.add_row("weights with quantization packed", f"{value['bytes']:,} bytes")
                for form, count in value["matrices"].items():
                    table.add_row(f"  {form}", f"{count} matrices")
            continue
        if key == "fp8_weights":
            if value:
                table.add_row("weights in fp8", f"{value} matrices, for quantization fp8")
            continue
        if key == "default_sampling":
            for rule, fields in value.items():
                told = fields if isinstance(fields, str) else ", ".join(f"{name} {n:g}" for name, n in fields.items())
                table.add_row(f"sampling, generation_config {rule}", escape(told or "neutral"))
            continue
        shown = (
            f"{value:,}"
            if key == "parameters"
            else ", ".join(map(str, value))
            if isinstance(value, list)
            else str(value)
        )
        table.add_row(key.replace("_", " "), escape(shown))
    for file in found["files"]:
        table.add_row("file", escape(f"{file['name']}  {file['bytes']:,} bytes"))
    console.print(table)
    if found["licence_notice"]:
        console.print(escape(found["licence_notice"]), soft_wrap=True)
    for warning in found["warnings"]:
        console.print(f"[bold yellow]warning:[/] {escape(warning)}", soft_wrap=True)


def inspect(
    source: Annotated[
        str, typer.Argument(help="Directory in Hugging Face's or Meta's format, GGUF file, or a fetched model's name.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint is, and check all that `serve` checks of it: files, tensors, tokenizer, control tokens."""
    info = describe(existing_source(source))
    if problems := verify(info):
        raise CheckpointError("\n".join(problems))
    found = inspect_checkpoint(info)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_inspection(found, standard_output())


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(inspect)
