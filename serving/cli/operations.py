"""`packtrain deploy|undeploy|scale|restart|drain`: changing what is served while it runs, through packtrain.v1.Admin."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.duration_pb2 import Duration

from model_parallel.directories import expand_home
from model_parallel.errors import ConfigError
from protos import admin_pb2 as pb
from serving.admin.operator_key import operator_key_file, read_operator_key
from serving.cli.durations import duration_s
from serving.cli.serve import (
    CacheTokens,
    DeviceName,
    Dtype,
    ModelName,
    Quantization,
    Ranks,
    Source,
    Threads,
    is_model,
    missing_source,
    served_name,
)
from serving.cli.terminal import say
from serving.client.client import Client
from serving.client.tls import CaFile, CertFile, KeyFile, UseTls, client_tls
from serving.config import MAX_GROUPS, MODEL_SOURCES, api_key, load_config
from serving.contracts.yaml_files import read_mapping
from serving.models.fetch import KNOWN_MODELS

DEFAULT_ADMIN_ADDRESS = "127.0.0.1:50052"

AdminAddress = Annotated[
    str, typer.Option("--address", help="Where packtrain.v1.Admin listens (admin.port): HOST:PORT or a port.")
]
Model = Annotated[str, typer.Argument(help="Name of the model, as clients call it.")]
MaxUnavailable = Annotated[
    int,
    typer.Option(
        min=1, max=MAX_GROUPS, help="Groups that may be away at a time while they are replaced; at most all but one."
    ),
]


def deploy(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="YAML file: its models are added or changed, others stay. Or a model's directory or GGUF file."
        ),
    ] = None,
    source: Source = None,
    name: ModelName = None,
    tp: Ranks = None,
    groups: Annotated[int | None, typer.Option(min=1, max=MAX_GROUPS, help="Replica groups.")] = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    device: DeviceName = None,
    threads: Threads = None,
    kv_cache_tokens: CacheTokens = None,
    max_unavailable: MaxUnavailable = 1,
    check: Annotated[bool, typer.Option("--check", help="Only check whether it could be served.")] = False,
    address: AdminAddress = DEFAULT_ADMIN_ADDRESS,
    tls: UseTls = False,
    ca: CaFile = None,
    cert: CertFile = None,
    key: KeyFile = None,
) -> None:
    """Serve more models, or the same ones in another way, while the server runs. Each is checked whole before anything of it
    is changed; those of a file are deployed one after the other."""
    flags = {
        "name": name,
        "tensor_parallel_size": tp,
        "num_groups": groups,
        "dtype": dtype,
        "quantization": quantization,
        "device": device,
        "threads_per_rank": threads,
        "kv_cache_tokens": kv_cache_tokens,
    }
    entries = _entries(file, source, {field: value for field, value in flags.items() if value is not None})
    with admin_client(address, tls, ca, cert, key) as client:
        for entry in entries:
            request = pb.DeployModelRequest(config=json.dumps(entry), max_unavailable=max_unavailable, only_check=check)
            _follow(client.admin.DeployModel(request))


def undeploy(
    model: Model,
    address: AdminAddress = DEFAULT_ADMIN_ADDRESS,
    tls: UseTls = False,
    ca: CaFile = None,
    cert: CertFile = None,
    key: KeyFile = None,
) -> None:
    """Serve a model no more. Requests that run may finish; new ones are answered like those for an unknown model."""
    with admin_client(address, tls, ca, cert, key) as client:
        _follow(client.admin.UndeployModel(pb.UndeployModelRequest(name=model)))


def scale(
    model: Model,
    groups: Annotated[
        int | None, typer.Option(min=1, max=MAX_GROUPS, help="Replica groups that there are to be.")
    ] = None,
    min_groups: Annotated[
        int | None, typer.Option("--min", min=0, max=MAX_GROUPS, help="Fewest groups that the autoscaler may leave.")
    ] = None,
    max_groups: Annotated[
        int | None, typer.Option("--max", min=1, max=MAX_GROUPS, help="Most groups that the autoscaler may start.")
    ] = None,
    address: AdminAddress = DEFAULT_ADMIN_ADDRESS,
    tls: UseTls = False,
    ca: CaFile = None,
    cert: CertFile = None,
    key: KeyFile = None,
) -> None:
    """Have another number of replica groups, or with autoscaling other bounds."""
    request = pb.ScaleModelRequest(name=model, num_groups=groups, min_groups=min_groups, max_groups=max_groups)
    with admin_client(address, tls, ca, cert, key) as client:
        _follow(client.admin.ScaleModel(request))


def restart(
    model: Model,
    max_unavailable: MaxUnavailable = 1,
    address: AdminAddress = DEFAULT_ADMIN_ADDRESS,
    tls: UseTls = False,
    ca: CaFile = None,
    cert: CertFile = None,
    key: KeyFile = None,
) -> None:
    """Replace all groups of a model by new ones, one after the other, without losing a request."""
    request = pb.RestartModelRequest(name=model, max_unavailable=max_unavailable)
    with admin_client(address, tls, ca, cert, key) as client:
        _follow(client.admin.RestartModel(request))


def drain(
    group: Annotated[str, typer.Option("--group", help="Id of the group, as `packtrain status` shows it.")],
    grace: Annotated[
        str | None,
        typer.Option(help="How long its requests may go on there: 0s, 20s, 1m. Unset: gateway.drain_timeout_s."),
    ] = None,
    address: AdminAddress = DEFAULT_ADMIN_ADDRESS,
    tls: UseTls = False,
    ca: CaFile = None,
    cert: CertFile = None,
    key: KeyFile = None,
) -> None:
    """Replace one group: it takes nothing new, and what it runs ends within the grace or goes on in another group."""
    request = pb.DrainGroupRequest(group=group)
    if grace is not None:
        message = Duration()
        message.FromMilliseconds(round(1000 * duration_s(grace, "--grace")))
        request.grace.CopyFrom(message)
    with admin_client(address, tls, ca, cert, key) as client:
        _follow(client.admin.DrainGroup(request))


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (deploy, undeploy, scale, restart, drain):
        app.command()(command)


def _entries(file: Path | None, source: str | None, flags: dict[str, Any]) -> list[dict[str, Any]]:
    """What is to be deployed, as entries of `models`. Raises ConfigError."""
    if file is not None and is_model(file):
        file, source = None, str(file)
    if (file is None) == (source is None):
        raise ConfigError("deploy: give either a YAML file, or --model")
    if source is not None:
        entries = [{"name": flags.get("name") or served_name(source), "source": source}]
    else:
        assert file is not None, "checked above"
        if not file.exists() and file.suffix.lower() not in (".yaml", ".yml", ".json"):
            raise ConfigError(missing_source(str(file), "deploy"))
        load_config(file)  # names each wrong field of the whole file
        data = read_mapping(file, "models")
        entries = data["models"]
        if others := sorted(data.keys() - {"models"}):
            say(f"{', '.join(others)} of {file}: not changed while a server runs; they hold from its next start")
    if len(entries) > 1 and "name" in flags:
        raise ConfigError(f"--name: {file} has {len(entries)} models; give the name of one in the file")
    return [_with_whole_path({**entry, **flags}) for entry in entries]


def _with_whole_path(entry: dict[str, Any]) -> dict[str, Any]:
    """The server may run in another directory."""
    lora = entry.get("lora") or {}
    if "adapters" in lora:
        adapters = [each | {"source": str(expand_home(each["source"]).absolute())} for each in lora["adapters"]]
        entry = entry | {"lora": lora | {"adapters": adapters}}
    for field in MODEL_SOURCES:
        source = entry.get(field)
        if source is not None and source not in KNOWN_MODELS and (path := expand_home(source)).exists():
            entry = entry | {field: str(path.absolute())}
    return entry


@contextmanager
def admin_client(address: str, tls: bool, ca: Path | None, cert: Path | None, key: Path | None) -> Iterator[Client]:
    given = api_key() or read_operator_key()
    with Client(address, api_key=given, tls=client_tls(tls, ca, cert, key)) as client:
        client.wait_until_connected()
        try:
            yield client
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise ConnectionError(
                    f"{error.details()}: set PACKTRAIN_API_KEY to a key with administration, or, where the server has no "
                    f"tenancy, run this as the user who runs it ({operator_key_file()} has the key)"
                ) from error
            if isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise ConfigError(error.details() or "") from error  # which `serve` would have refused too
            raise


def _follow(progress: Any) -> None:
    for step in progress:
        say(step.text)
