"""`packtrain serve` and `packtrain demo`: the whole stack on this machine."""

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from model_parallel.directories import expand_home
from model_parallel.errors import ConfigError
from protos import inference_pb2 as pb
from serving.cli.asking import print_speed, print_stream
from serving.cli.terminal import console, fetch_progress, leaving_at_once, leaving_on_signals, say, stage, warn
from serving.client.client import Client, chat_prompt
from serving.config import MAX_GROUPS, ServingConfig, load_config, parse_config
from serving.driver.environment import prepare_environment
from serving.models.fetch import KNOWN_MODELS, fetch_model

if TYPE_CHECKING:
    from serving.driver.app import RunningApp

DEFAULT_MODEL = "smollm2-135m-instruct"
DEMO_QUESTION = "What is the capital of France?"
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+")
"""Where Hugging Face's tools keep a repository's files."""
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._/-]+")

# Options of a model, which `packtrain deploy` has too.
Source = Annotated[
    str | None, typer.Option("--model", help="Serve this instead: a known name, directory or GGUF file.")
]
ModelName = Annotated[
    str | None, typer.Option("--name", help="What clients call the model; unset, what its directory is called.")
]
Ranks = Annotated[int | None, typer.Option("--tp", min=1, help="Tensor-parallel ranks of each group.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
Quantization = Annotated[str | None, typer.Option(help="int8, fp8, packed or none; see docs/quantization.md.")]
DeviceName = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
Threads = Annotated[str | None, typer.Option(help="Threads of each rank on a CPU, or auto.")]
CacheTokens = Annotated[str | None, typer.Option(help="Tokens that a KV cache holds, or auto.")]


def serve(
    config: Annotated[
        Path | None,
        typer.Argument(help="YAML file, or a model's directory or GGUF file; without it, one small model is served."),
    ] = None,
    source: Source = None,
    name: ModelName = None,
    tp: Ranks = None,
    groups: Annotated[int | None, typer.Option(min=1, max=MAX_GROUPS, help="Replica groups of each model.")] = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    device: DeviceName = None,
    threads: Threads = None,
    kv_cache_tokens: CacheTokens = None,
    generation_config: Annotated[
        str | None,
        typer.Option(help="What unset sampling fields get of generation_config.json: auto, vllm-like or none."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of gRPC; 0 picks a free one.")] = None,
    http_port: Annotated[int | None, typer.Option(help="Port of HTTP; 0 picks a free one.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Port of /metrics; 0 picks a free one.")] = None,
    admin_port: Annotated[int | None, typer.Option(help="Port of packtrain.v1.Admin; 0 picks a free one.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow listening beyond loopback without keys.")] = False,
    ray_address: Annotated[
        str | None, typer.Option(help='Ray cluster to join ("auto"); a private one is started if unset.')
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="The YAML file, as other commands take it.")
    ] = None,
) -> None:
    """Serve until Ctrl-C, SIGTERM or SIGHUP, then drain and stop."""
    if config is not None and config_file is not None:
        raise ConfigError(f"{config} is given, and --config {config_file} too; give one of the two")
    model_flags: dict[str, Any] = {
        "name": name,
        "tensor_parallel_size": tp,
        "num_groups": groups,
        "dtype": dtype,
        "quantization": quantization,
        "device": device,
        "threads_per_rank": threads,
        "kv_cache_tokens": kv_cache_tokens,
        "generation_config": generation_config,
    }
    final = configured(
        config or config_file,
        source,
        models=model_flags,
        gateway={"host": host, "port": port, "http_port": http_port, "insecure": insecure or None},
        ray={"address": ray_address},
        admin={"metrics_port": metrics_port, "port": admin_port},
    )
    with running(final) as app:
        _tell(app)
        _wait_for_signal(app)


def demo(
    question: Annotated[str, typer.Argument(help="What to ask.")] = DEMO_QUESTION,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel ranks.")] = 2,
) -> None:
    """Start the whole stack on this machine, ask one question over gRPC, print the streamed answer, stop."""
    started_s = time.perf_counter()
    config = overridden(
        default_config(),
        models={"tensor_parallel_size": tp},
        gateway={"port": 0, "http_port": 0},
        admin={"metrics_port": 0},
    )
    with running(config) as app, Client(app.address) as client:
        say(f"up after {time.perf_counter() - started_s:.1f} s; {tp} tensor-parallel ranks, gRPC at {app.address}")
        console.print(f"[bold]{question}[/]")
        request = pb.GenerateRequest(
            model=DEFAULT_MODEL,
            prompt=chat_prompt([("user", question)]),
            sampling=pb.Sampling(temperature=0.0, max_tokens=128),
        )
        _, times, usage = print_stream(client, request)
        print_speed(times, usage)
        say("stopping")
    say(f"done after {time.perf_counter() - started_s:.1f} s")


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(serve)
    app.command()(demo)


def configured(config: Path | None, source: str | None, **sections: dict[str, Any]) -> ServingConfig:
    """What a file, a model or neither of them says, with the flags of each section in place. Raises ConfigError."""
    if config is not None and is_model(config):
        if source is not None:
            raise ConfigError(f"{config} is a model, and --model names another one; give one of the two")
        say(f"{config} is a model: taken as --model {config}")
        config, source = None, str(config)
    if config is not None:
        if not config.exists() and config.suffix.lower() not in (".yaml", ".yml", ".json"):
            raise ConfigError(missing_source(str(config), "config"))
        loaded = load_config(config)
    else:
        loaded = default_config() if source is None else model_config(source)
    models = sections.pop("models", {})
    if source is not None:
        models = models | {"source": source, "name": models.get("name") or served_name(source)}
    return overridden(loaded, models=models, **sections)


def is_model(path: Path) -> bool:
    """Whether what was given in a configuration's place is a model."""
    return str(path) in KNOWN_MODELS or path.is_dir() or path.suffix.lower() in (".gguf", ".safetensors")


def served_name(source: str) -> str:
    """What a model is called when nobody names it: a repository of Hugging Face's cache by org/name, a directory by its whole
    name, a GGUF file without its ending."""
    if source in KNOWN_MODELS:
        return source
    path = expand_home(source)
    if not path.exists():
        raise ConfigError(missing_source(source))
    whole = path.resolve()
    if snapshot := _SNAPSHOT.search(f"{path.absolute()}/".rstrip("/")) or _SNAPSHOT.search(str(whole)):
        return f"{snapshot[1]}/{snapshot[2]}"
    name = whole.stem if whole.is_file() and whole.suffix.lower() == ".gguf" else whole.name
    return _NOT_IN_A_NAME.sub("-", name).lstrip("._/-") or "model"


def missing_source(source: str, setting: str = "--model") -> str:
    """What to do about a model, or a configuration file, that is not there."""
    looks_like_path = source.startswith((".", "/", "~")) or source.endswith((".gguf", "/"))
    if not looks_like_path and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return (
            f"{setting}: there is no directory {source!r} here, and Packtrain does not download from Hugging Face; fetch it "
            f"(hf download {source} --local-dir DIR) and give its directory"
        )
    if looks_like_path or "/" in source:
        wanted = (
            "a YAML file, or a model's directory or GGUF file"
            if setting == "config"
            else "a model's directory or GGUF file"
        )
        return f"{setting}: {source} does not exist; give {wanted}"
    import difflib

    near = difflib.get_close_matches(source, KNOWN_MODELS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known models: {', '.join(KNOWN_MODELS)}"
    return f"{setting}: {source!r} is neither a known model nor an existing directory or GGUF file; {hint}"


def default_config() -> ServingConfig:
    """One small model on this machine, as `make serve` and `make demo` run it."""
    entry = {
        "name": DEFAULT_MODEL, "source": DEFAULT_MODEL, "tensor_parallel_size": 2, "dtype": "bfloat16", "device": "cpu",
        "kv_cache_tokens": 16384,
    }  # fmt: skip
    return parse_config({"models": [entry]}, origin="the default configuration")


def model_config(source: str) -> ServingConfig:
    """One model with every default, as a YAML file that names nothing else would have it."""
    return parse_config({"models": [{"name": served_name(source), "source": source}]}, origin="the flags given")


def overridden(config: ServingConfig, **sections: dict[str, Any]) -> ServingConfig:
    """`config` with the given flags in place; None leaves a field alone. What nobody sets stays unset."""
    data = config.model_dump(exclude_unset=True)
    for section, flags in sections.items():
        given = {key: value for key, value in flags.items() if value is not None}
        if section == "models":
            for entry in data["models"]:
                entry.update(given)
        elif given:
            data.setdefault(section, {}).update(given)
    return parse_config(data, origin="the configuration with the flags given")


@contextmanager
def running(config: ServingConfig) -> "Iterator[RunningApp]":
    """The whole stack, stopped when the block is left, also by SIGTERM, SIGHUP and Ctrl-C."""
    with leaving_on_signals():
        for entry in config.models:
            if entry.source in KNOWN_MODELS:
                with fetch_progress(entry.source) as progress:
                    fetch_model(entry.source, progress)
        ignored = prepare_environment(joins=config.ray.address is not None)
        if "RAY_ADDRESS" in ignored:
            say("RAY_ADDRESS is set and not used: a private cluster is started (--ray-address joins one)")
        _quiet_ray()
        with stage("checking") as shown:
            from serving.driver.preflight import begin

            preflight = begin(config)
            try:
                for line in preflight.notes:
                    say(line)
                for line in preflight.warnings:
                    warn(line)
                shown.report("importing Ray")
                from serving.driver.app import start

                app = start(preflight.config, shown.report, shown.on_load, preflight, leaving_at_once)
            finally:
                preflight.close()
        try:
            yield app
        finally:
            with stage("draining and stopping"):
                app.stop()


def _quiet_ray() -> None:
    """What Ray and Serve say by the way does not stand between our lines; `--debug` lets it through."""
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        return
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # what matters of its errors, our own line tells
    for name in ("ray.serve", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: record.levelno > logging.ERROR)


def _tell(app: "RunningApp") -> None:
    """Addresses, as they can be pasted."""
    config = app.config
    names = ", ".join(entry.name for entry in config.models)
    http = "" if app.http_url is None else f" and [bold]{app.http_url}/v1[/] (HTTP)"
    console.print(f"[bold green]serving[/] {names} at [bold]{app.address}[/] (gRPC){http}. Ctrl-C stops.")
    if app.metrics_url is not None:
        say(f"metrics at {app.metrics_url}")
    if app.admin is not None:
        say(f"packtrain.v1.Admin at {app.admin_address}, for packtrain deploy, scale, restart and other changes")
    say(f"try: {first_question(config, app.address)}")


def first_question(config: ServingConfig, address: str) -> str:
    """A command that asks this server, from this machine."""
    key = "" if config.tenancy is None else "PACKTRAIN_API_KEY=KEY "
    tls = "" if config.gateway.tls is None else "--tls "
    model = "" if len(config.models) == 1 else f"--model {config.models[0].name} "
    return f'{key}packtrain generate {tls}--address {address} {model}"{DEMO_QUESTION}"'


def _wait_for_signal(app: "RunningApp") -> None:
    try:
        app.wait()
    except KeyboardInterrupt:
        say("stopping: no new requests, running ones may finish")
