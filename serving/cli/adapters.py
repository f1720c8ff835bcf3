"""`packtrain adapters add|remove|list`: LoRA adapters of a running server, through packtrain.v1.Admin."""

from pathlib import Path
from typing import Annotated

import typer

from model_parallel.directories import expand_home
from protos import admin_pb2 as pb
from serving.cli.operations import DEFAULT_ADMIN_ADDRESS, AdminAddress, admin_client
from serving.cli.printing import Format, print_rows
from serving.client.tls import CaFile, CertFile, KeyFile, UseTls

_COLUMNS = ("name", "model", "rank", "num_bytes", "tenants", "from", "source", "digest")

_TIMEOUT_S = 600.0
"""Adding reads and hashes the files, and loads them on every group. A server that takes longer than this hangs."""

adapters = typer.Typer(help="LoRA adapters of a running server.", no_args_is_help=True)
AdapterName = Annotated[str, typer.Argument(help="What clients ask for.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(adapters, name="adapters")


@adapters.command("add")
def add_adapter(
    name: AdapterName,
    source: Annotated[
        Path, typer.Argument(help="Directory in PEFT's format, on the server's host and wherever its ranks run.")
    ],
    model: Annotated[str, typer.Option("--model", help="Name of the model that it changes.")],
    tenant: Annotated[list[str] | None, typer.Option(help="To whom it exists; may be repeated. Unset: all.")] = None,
    address: AdminAddress = DEFAULT_ADMIN_ADDRESS,
    tls: UseTls = False,
    ca: CaFile = None,
    cert: CertFile = None,
    key: KeyFile = None,
) -> None:
    """Load an adapter on all groups of a model, and serve it under a name of its own."""
    wanted = pb.Adapter(name=name, model=model, source=str(expand_home(source).absolute()))
    if tenant:
        wanted.tenants.ids.extend(tenant)
    with admin_client(address, tls, ca, cert, key) as client:
        added = client.admin.AddAdapter(pb.AddAdapterRequest(adapter=wanted), timeout=_TIMEOUT_S).adapter
    typer.echo(f"{added.name} is served: rank {added.rank}, {added.num_bytes / 1e6:.1f} MB on a rank")


@adapters.command("remove")
def remove_adapter(
    name: AdapterName,
    address: AdminAddress = DEFAULT_ADMIN_ADDRESS,
    tls: UseTls = False,
    ca: CaFile = None,
    cert: CertFile = None,
    key: KeyFile = None,
) -> None:
    """Serve an adapter no more. Requests that run may finish."""
    with admin_client(address, tls, ca, cert, key) as client:
        client.admin.RemoveAdapter(pb.RemoveAdapterRequest(name=name), timeout=_TIMEOUT_S)
    typer.echo(f"{name} is served no more")


@adapters.command("list")
def list_adapters(
    form: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.TABLE,
    address: AdminAddress = DEFAULT_ADMIN_ADDRESS,
    tls: UseTls = False,
    ca: CaFile = None,
    cert: CertFile = None,
    key: KeyFile = None,
) -> None:
    """List the adapters that are served."""
    with admin_client(address, tls, ca, cert, key) as client:
        found = client.admin.ListAdapters(pb.ListAdaptersRequest(), timeout=_TIMEOUT_S).adapters
    rows = [
        {
            "name": each.name,
            "model": each.model,
            "rank": each.rank,
            "num_bytes": each.num_bytes,
            "tenants": list(each.tenants.ids) if each.HasField("tenants") else "all",
            "from": "configuration" if each.is_configured else "added",
            "source": each.source,
            "digest": each.digest[:12],
        }
        for each in found
    ]
    print_rows(rows, _COLUMNS, form)
