"""`packtrain plans|tenants|keys|usage`: work on the database itself, whether a server runs or not.

A running server sees what was changed within `tenancy.refresh_s`.
"""

import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.markup import escape

from model_parallel.errors import ConfigError
from serving.cli.durations import duration_s
from serving.cli.printing import Format, Row, print_rows
from serving.config import TenancyConfig, load_config
from serving.contracts.accounts import UsageRecord
from serving.contracts.errors import TenancyError, ValidationError
from serving.tenants.records import LIMITS, IssuedKey, Key, KeyGrant, Plan, Tenant, UsageFilter, iso_time

if TYPE_CHECKING:
    from serving.tenants.store.store import Store

NO_VALUE = "none"
"""What is typed where a limit, a weight or a priority is to be taken away."""
_PLAN_COLUMNS = ("name", "weight", "priority", *LIMITS)
_TENANT_COLUMNS = ("id", "name", "plan", "created", "disabled", "weight", "priority", *LIMITS)
_KEY_COLUMNS = (
    "id", "tenant_id", "label", "state", "models", "is_admin", "created", "expires", "revoked", *LIMITS,
)  # fmt: skip
_SUM_COLUMNS = (
    "tenant_id", "key_id", "model", "num_requests", "num_prompt_tokens", "num_cached_tokens", "num_completion_tokens",
)  # fmt: skip

ConfigFile = Annotated[Path | None, typer.Option("--config", help="The server's YAML file, which names the database.")]
DatabaseUrl = Annotated[
    str | None, typer.Option("--database", help="SQLAlchemy URL, without a password; overrides it.")
]
Output = Annotated[Format, typer.Option("--format", help="How to print.")]
OwnCount = Annotated[str | None, typer.Option(metavar=f"N|{NO_VALUE}", help="Limit; no limit of its own if unset.")]
Count = Annotated[str | None, typer.Option(metavar=f"N|{NO_VALUE}", help="Limit; unset leaves it as it is.")]
PlanName = Annotated[str, typer.Argument(help="Name of the plan.")]
PlanWeight = Annotated[
    float | None, typer.Option(help="Share of a busy group, relative to other tenants; 1 in a new plan.")
]
PlanPriority = Annotated[int | None, typer.Option(help="Lower numbers are served first; 0 in a new plan.")]
TenantId = Annotated[str, typer.Argument(help="Id of the tenant.")]
TenantName = Annotated[str | None, typer.Option("--name", help="Name for people.")]
TenantWeight = Annotated[str | None, typer.Option(metavar=f"X|{NO_VALUE}", help="In place of the plan's.")]
TenantPriority = Annotated[str | None, typer.Option(metavar=f"N|{NO_VALUE}", help="In place of the plan's.")]
KeyId = Annotated[str, typer.Argument(help="Id of the key: the part between the underscores. Never type a whole key.")]

plans = typer.Typer(help="Limits and shares that tenants have in common.", no_args_is_help=True)
tenants = typer.Typer(help="Those who may send requests.", no_args_is_help=True)
keys = typer.Typer(help="The keys that requests come with.", no_args_is_help=True)
console = Console(stderr=True, highlight=False)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(plans, name="plans")
    app.add_typer(tenants, name="tenants")
    app.add_typer(keys, name="keys")
    app.command()(usage)


@plans.command("create")
def create_plan(
    name: PlanName,
    requests_per_minute: OwnCount = None,
    tokens_per_minute: OwnCount = None,
    max_concurrent_requests: OwnCount = None,
    token_budget: OwnCount = None,
    weight: PlanWeight = None,
    priority: PlanPriority = None,
    config: ConfigFile = None,
    database: DatabaseUrl = None,
) -> None:
    """Make a plan. Limits that are not given do not apply."""
    limits = _limits(requests_per_minute, tokens_per_minute, max_concurrent_requests, token_budget)
    with _store(config, database) as store:
        store.create_plan(Plan(name=name, **limits, **_given(weight=weight, priority=priority)))


@plans.command("update")
def update_plan(
    name: PlanName,
    requests_per_minute: Count = None,
    tokens_per_minute: Count = None,
    max_concurrent_requests: Count = None,
    token_budget: Count = None,
    weight: PlanWeight = None,
    priority: PlanPriority = None,
    config: ConfigFile = None,
    database: DatabaseUrl = None,
) -> None:
    """Change what is given, for all tenants on the plan."""
    limits = _limits(requests_per_minute, tokens_per_minute, max_concurrent_requests, token_budget)
    with _store(config, database) as store:
        store.update_plan(name, _some({**limits, **_given(weight=weight, priority=priority)}))


@plans.command("list")
def list_plans(form: Output = Format.TABLE, config: ConfigFile = None, database: DatabaseUrl = None) -> None:
    """List all plans."""
    with _store(config, database) as store:
        print_rows(map(asdict, store.list_plans()), _PLAN_COLUMNS, form)


@tenants.command("create")
def create_tenant(
    tenant: TenantId,
    plan: Annotated[str, typer.Option(help="Name of the tenant's plan.")] = "unlimited",
    name: TenantName = None,
    requests_per_minute: OwnCount = None,
    tokens_per_minute: OwnCount = None,
    max_concurrent_requests: OwnCount = None,
    token_budget: OwnCount = None,
    weight: TenantWeight = None,
    priority: TenantPriority = None,
    config: ConfigFile = None,
    database: DatabaseUrl = None,
) -> None:
    """Make a tenant. Limits, weight and priority that are given replace the plan's."""
    own = _limits(requests_per_minute, tokens_per_minute, max_concurrent_requests, token_budget)
    with _store(config, database) as store:
        store.create_tenant(Tenant(id=tenant, plan=plan, **own, **_given(name=name), **_share(weight, priority)))


@tenants.command("update")
def update_tenant(
    tenant: TenantId,
    plan: Annotated[str | None, typer.Option(help="Name of the tenant's plan.")] = None,
    name: TenantName = None,
    requests_per_minute: Count = None,
    tokens_per_minute: Count = None,
    max_concurrent_requests: Count = None,
    token_budget: Count = None,
    weight: TenantWeight = None,
    priority: TenantPriority = None,
    config: ConfigFile = None,
    database: DatabaseUrl = None,
) -> None:
    """Change what is given; "none" goes back to the plan's."""
    own = _limits(requests_per_minute, tokens_per_minute, max_concurrent_requests, token_budget)
    with _store(config, database) as store:
        store.update_tenant(tenant, _some({**own, **_given(name=name, plan=plan), **_share(weight, priority)}))


@tenants.command("list")
def list_tenants(form: Output = Format.TABLE, config: ConfigFile = None, database: DatabaseUrl = None) -> None:
    """List all tenants, with the limits that they have in place of their plans'."""
    with _store(config, database) as store:
        print_rows(map(_tenant_row, store.list_tenants()), _TENANT_COLUMNS, form)


@tenants.command("show")
def show_tenant(
    tenant: TenantId, form: Output = Format.TABLE, config: ConfigFile = None, database: DatabaseUrl = None
) -> None:
    """Show one tenant."""
    with _store(config, database) as store:
        print_rows([_tenant_row(store.get_tenant(tenant))], _TENANT_COLUMNS, form)


@tenants.command("disable")
def disable_tenant(tenant: TenantId, config: ConfigFile = None, database: DatabaseUrl = None) -> None:
    """Refuse all keys of a tenant."""
    with _store(config, database) as store:
        store.set_tenant_disabled(tenant, True)


@tenants.command("enable")
def enable_tenant(tenant: TenantId, config: ConfigFile = None, database: DatabaseUrl = None) -> None:
    """Accept the keys of a tenant again."""
    with _store(config, database) as store:
        store.set_tenant_disabled(tenant, False)


@keys.command("create")
def create_key(
    tenant: TenantId,
    label: Annotated[str, typer.Option(help="What it is for.")] = "",
    model: Annotated[list[str] | None, typer.Option(help="A model that it may use; may be repeated.")] = None,
    all_models: Annotated[
        bool, typer.Option("--all-models", help="It may use every model; so it is without --model and --admin.")
    ] = False,
    admin: Annotated[bool, typer.Option("--admin", help="It may manage tenants, keys and plans.")] = False,
    expires_in: Annotated[
        str | None, typer.Option(help="How long it is good for, such as 90d; no end if unset.")
    ] = None,
    requests_per_minute: OwnCount = None,
    tokens_per_minute: OwnCount = None,
    max_concurrent_requests: OwnCount = None,
    token_budget: OwnCount = None,
    config: ConfigFile = None,
    database: DatabaseUrl = None,
) -> None:
    """Make a key and print it, this once. Its limits hold besides its tenant's."""
    if model and all_models:
        raise typer.BadParameter("give either --model or --all-models")
    is_for_all = all_models or not (model or admin)
    limits = _limits(requests_per_minute, tokens_per_minute, max_concurrent_requests, token_budget)
    expires_unix_s = None if expires_in is None else time.time() + duration_s(expires_in, "--expires-in")
    with _store(config, database) as store:
        models = None if is_for_all else tuple(model or ())
        grant = KeyGrant(models=models, is_admin=admin, label=label, expires_unix_s=expires_unix_s, **limits)
        _print_issued(store.create_key(tenant, grant))


@keys.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    form: Output = Format.TABLE,
    config: ConfigFile = None,
    database: DatabaseUrl = None,
) -> None:
    """List keys, with expired and revoked ones."""
    now_unix_s = time.time()
    with _store(config, database) as store:
        print_rows((_key_row(key, now_unix_s) for key in store.list_keys(tenant_id=tenant)), _KEY_COLUMNS, form)


@keys.command("rotate")
def rotate_key(
    key: KeyId,
    overlap: Annotated[str, typer.Option(help="How long the old key stays good, such as 24h; 0s ends it now.")],
    config: ConfigFile = None,
    database: DatabaseUrl = None,
) -> None:
    """Make a key that allows the same, print it, and let the old one end."""
    with _store(config, database) as store:
        _print_issued(store.rotate_key(key, overlap_s=duration_s(overlap, "--overlap")))


@keys.command("revoke")
def revoke_key(key: KeyId, config: ConfigFile = None, database: DatabaseUrl = None) -> None:
    """End a key for good."""
    with _store(config, database) as store:
        store.revoke_key(key)


def usage(
    tenant: Annotated[str, typer.Option(help="Only this tenant's.")] = "",
    key: Annotated[str, typer.Option(help="Only this key's, by its id.")] = "",
    model: Annotated[str, typer.Option(help="Only this model's.")] = "",
    since: Annotated[
        str | None, typer.Option(help="From then on: a time (2026-01-31T12:00, UTC) or how long ago (24h).")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Before then, in the same form.")] = None,
    records: Annotated[bool, typer.Option("--records", help="Every request by itself, not sums.")] = False,
    form: Output = Format.TABLE,
    config: ConfigFile = None,
    database: DatabaseUrl = None,
) -> None:
    """Say what was used, by tenant, key and model."""
    from serving.tenants.store.usage import all_usage, sum_usage

    with _store(config, database) as store:
        wanted = UsageFilter(
            tenant_id=tenant,
            key_id=key,
            model=model,
            since_unix_s=_moment(since, "--since"),
            until_unix_s=_moment(until, "--until"),
        )
        if records:
            rows = map(msgspec.structs.asdict, all_usage(store.database, wanted))
            print_rows(rows, UsageRecord.__struct_fields__, form)
        else:
            print_rows(map(asdict, sum_usage(store.database, wanted)), _SUM_COLUMNS, form)


@contextmanager
def _store(config: Path | None, url: str | None) -> "Iterator[Store]":
    """The database that is meant. What a user can mend ends the command with one line and status 1."""
    from serving.tenants.store.database import Database
    from serving.tenants.store.store import Store, database_url
    from serving.tenants.store.url import secrets_of

    if url is not None and secrets_of(url):
        raise ConfigError(
            "--database holds a password, which every user of this machine can read in the process list; "
            "put the URL into the configuration file, or the password into ~/.pgpass"
        )
    tenancy = load_config(config).tenancy if config is not None else TenancyConfig()
    if tenancy is None:
        raise ConfigError(f"{config} has no section `tenancy`, so its server has no tenants")
    try:
        with closing(Database(url or database_url(tenancy))) as database:
            yield Store(database)
    except (TenancyError, ValidationError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error


def _print_issued(issued: IssuedKey) -> None:
    """The key alone goes to standard output, so that a script can catch it."""
    console.print(f"key {issued.key.id} of tenant {issued.key.tenant_id}; it is shown this once:")
    typer.echo(issued.text)


def _tenant_row(tenant: Tenant) -> Row:
    return asdict(tenant) | {"created": _time(tenant.created_unix_s), "disabled": _time(tenant.disabled_unix_s)}


def _key_row(key: Key, now_unix_s: float) -> Row:
    is_expired = key.expires_unix_s is not None and key.expires_unix_s <= now_unix_s
    return asdict(key) | {
        "state": "revoked" if key.revoked_unix_s is not None else "expired" if is_expired else "live",
        "models": "all" if key.models is None else list(key.models),
        "created": _time(key.created_unix_s),
        "expires": _time(key.expires_unix_s),
        "revoked": _time(key.revoked_unix_s),
    }


def _time(unix_s: float | None) -> str | None:
    return None if unix_s is None else iso_time(unix_s)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _some(changes: dict[str, Any]) -> dict[str, Any]:
    if not changes:
        raise typer.BadParameter("give at least one option to change")
    return changes


def _limits(*values: str | None) -> dict[str, Any]:
    return {name: _number(name, value, int) for name, value in zip(LIMITS, values, strict=True) if value is not None}


def _share(weight: str | None, priority: str | None) -> dict[str, Any]:
    share = {"weight": (weight, float), "priority": (priority, int)}
    return {name: _number(name, value, kind) for name, (value, kind) in share.items() if value is not None}


def _number(name: str, text: str, kind: type[int] | type[float]) -> int | float | None:
    if text == NO_VALUE:
        return None
    try:
        return kind(text)
    except ValueError:
        raise typer.BadParameter(f"{name} must be a number or {NO_VALUE!r}, not {text!r}") from None


def _moment(text: str | None, option: str) -> float | None:
    """UNIX seconds of a point in time; UTC where it names no zone."""
    if text is None:
        return None
    if re.fullmatch(r"\d{1,9}[smhd]", text, re.ASCII):
        return time.time() - duration_s(text, option)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"a time is written 2026-01-31, 2026-01-31T12:00, or as how long ago: 24h; not {text!r}", param_hint=option
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
