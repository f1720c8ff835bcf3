"""Adapters that come and go while a cluster runs: over packtrain.v1.Admin and the command line, to groups and record."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import msgspec
import pytest
from typer.testing import CliRunner

from bench.support.random_adapter import save_random_adapter
from model_parallel.errors import ConfigError
from protos import admin_pb2 as pb
from protos import admin_pb2_grpc
from serving.admin.service import AdminServer
from serving.cli.main import app
from serving.config import AdminConfig, parse_config
from serving.contracts.models import AdapterCard
from serving.contracts.served import Served
from serving.driver import adapter_changes
from serving.driver.changes import entry_text
from serving.driver.operations import ClusterOperations
from serving.driver.record import first_served, served_model
from serving.models.group_spec import GroupSpec, resolve_models
from serving.models.sizes import this_host
from serving.tenants.records import Tenant
from tests.unit.tenants.test_admin import Running, refused, wrong_field

KEY = "operators-key"
WRONG_TENANTS = [
    *(
        [""],
        ["ACME"],
        ["a*"],
        ["\u0430cme"],
        ["a" * 65],
        ["acme", "acme"],
        ["acme", "-a"],
        ["a-"],
        ["a_b"],
        ["a b"],
        ["acme\n"],
    ),
    ["acme", "b", "acme"],
]
"""The fourth begins with a Cyrillic letter."""


@dataclass
class Stack:
    """A driver's operations on groups that are none, and what it wrote."""

    operations: ClusterOperations
    spec: GroupSpec
    answers: list[object] = field(default_factory=lambda: ["", ""])
    """Of the groups, to what they are told."""
    told: list[tuple[str, str]] = field(default_factory=list)
    """(method, name of the adapter)."""
    written: list[Served] = field(default_factory=list)
    running: frozenset[str] = frozenset({"g1", "g2"})
    """Ids of the groups."""

    @property
    def names(self) -> list[str]:
        return [card.name for card in self.operations.adapters()]

    def broadcast(self, method: str, encoded: bytes) -> Any:
        self.told.append((method, msgspec.msgpack.decode(encoded, type=AdapterCard).name))
        answers = self.answers if method == "load_adapter" else [""]
        return SimpleNamespace(results=lambda **_: answers)


@pytest.fixture(scope="module")
def spec(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> GroupSpec:
    path = tmp_path_factory.mktemp("adapter")
    entry = {"name": "small", "source": str(smollm2_path), "lora": {}, "kv_cache_tokens": 1024, "max_model_len": 512}
    (first,) = resolve_models(parse_config({"models": [entry]}, origin="test").models, this_host())
    save_random_adapter(path, first.model, rank=2, modules=["q_proj"])
    entry["lora"] = {"adapters": [{"name": "small-own", "source": str(path)}]}
    return resolve_models(parse_config({"models": [entry]}, origin="test").models, this_host())[0]


@pytest.fixture
def stack(spec: GroupSpec, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    config = parse_config({"models": [spec.entry.model_dump(exclude_unset=True)]}, origin="test")
    operations = ClusterOperations(config, first_served([spec.entry], [spec], None), this_host)
    made = Stack(operations, spec)
    monkeypatch.setattr("serving.driver.operations.read_served", lambda: made.written[-1] if made.written else None)
    monkeypatch.setattr("serving.driver.operations.write_served", made.written.append)
    monkeypatch.setattr(operations, "_handle", lambda name: made)
    monkeypatch.setattr(operations, "_deployed", lambda name: made)
    monkeypatch.setattr(operations, "_spec_of", lambda served: spec)  # reading the model anew takes a while
    monkeypatch.setattr(operations._waits, "gateways", lambda *_: None)
    yield made


@pytest.fixture
async def admin(stack: Stack) -> AsyncIterator[Running]:
    server = AdminServer(AdminConfig(port=0), None, refresh_s=0.02, operations=stack.operations, operator_key=KEY)
    target = f"127.0.0.1:{await server.start()}"
    try:
        async with grpc.aio.insecure_channel(target) as channel:
            yield Running(admin_pb2_grpc.AdminStub(channel), channel, target, KEY)
    finally:
        await server.stop(0)


@pytest.fixture
def directory(spec: GroupSpec, tmp_path: Path) -> Path:
    save_random_adapter(tmp_path, spec.model, rank=4, seed=1, modules=["q_proj", "down_proj"])
    return tmp_path


def _add(name: str, source: Path, /, **fields: Any) -> pb.AddAdapterRequest:
    return pb.AddAdapterRequest(adapter=pb.Adapter(**{"name": name, "model": "small", "source": str(source)} | fields))


async def test_an_adapter_comes_and_goes(admin: Running, stack: Stack, directory: Path) -> None:
    request = _add("small-sql", directory, tenants=pb.TenantIds(ids=["acme"]))
    added = (await admin.call("AddAdapter", request)).adapter
    assert (added.name, added.model, added.rank, list(added.tenants.ids)) == ("small-sql", "small", 4, ["acme"])
    assert stack.told == [("load_adapter", "small-sql")]
    assert [card.name for card in stack.written[-1].adapters] == ["small-own", "small-sql"]
    listed = (await admin.call("ListAdapters", pb.ListAdaptersRequest())).adapters
    assert [(each.name, each.is_configured) for each in listed] == [("small-own", True), ("small-sql", False)]

    assert (await admin.call("RemoveAdapter", pb.RemoveAdapterRequest(name="small-sql"))).adapter == added
    assert stack.told[-1] == ("unload_adapter", "small-sql")
    assert [card.name for card in stack.written[-1].adapters] == ["small-own"]
    assert stack.written[-1].generation > stack.written[0].generation
    error = await refused(admin.call("RemoveAdapter", pb.RemoveAdapterRequest(name="small-sql")))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_a_broken_directory_changes_nothing(admin: Running, stack: Stack, directory: Path) -> None:
    (directory / "adapter_model.safetensors").write_bytes(b"no")
    error = await refused(admin.call("AddAdapter", _add("small-sql", directory)))
    assert (error.code(), wrong_field(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "adapter.source")
    assert f"{directory}/adapter_model.safetensors" in (error.details() or "")
    assert (stack.told, stack.written, stack.names) == ([], [], ["small-own"])


@pytest.mark.parametrize("answers", [["", "rank 1: no such file"], [RuntimeError("dead"), ""]], ids=["told", "lost"])
async def test_one_that_a_group_cannot_load_is_unloaded_everywhere(
    admin: Running, stack: Stack, directory: Path, answers: list[object]
) -> None:
    stack.answers = answers
    error = await refused(admin.call("AddAdapter", _add("small-sql", directory)))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert (error.details() or "").startswith("1 of 2 groups could not load the adapter: ")
    assert stack.told == [("load_adapter", "small-sql"), ("unload_adapter", "small-sql")]
    assert (stack.written, stack.names) == ([], ["small-own"])


async def test_one_of_a_model_that_sleeps_is_written_down(admin: Running, stack: Stack, directory: Path) -> None:
    """No group is there to load it; the next one does for the first request that names it."""
    stack.running = frozenset()
    await admin.call("AddAdapter", _add("small-sql", directory))
    assert (stack.told, stack.names) == ([], ["small-own", "small-sql"])


async def test_names_are_taken_once_and_files_may_have_two(admin: Running, stack: Stack, directory: Path) -> None:
    await admin.call("AddAdapter", _add("small-sql", directory))
    for name in ("small", "small-own", "small-sql"):
        error = await refused(admin.call("AddAdapter", _add(name, directory)))
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    error = await refused(admin.call("RemoveAdapter", pb.RemoveAdapterRequest(name="small-own")))
    assert (error.code(), wrong_field(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "name")
    await admin.call("AddAdapter", _add("small-too", directory))
    await admin.call("RemoveAdapter", pb.RemoveAdapterRequest(name="small-sql"))
    assert ("unload_adapter", "small-sql") not in stack.told, "the same files are served under another name"


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"name": ""}, "adapter.name"),
        ({"name": "a b"}, "adapter.name"),
        ({"name": "x" * 129}, "adapter.name"),
        ({"source": "relative/path"}, "adapter.source"),
        ({"source": "/nowhere"}, "adapter.source"),
        ({"tenants": pb.TenantIds()}, "adapter.tenants"),
        *(({"tenants": pb.TenantIds(ids=ids)}, "adapter.tenants") for ids in WRONG_TENANTS),
        ({"rank": 8}, "adapter.rank"),
        ({"digest": "ab"}, "adapter.digest"),
    ],
)
async def test_wrong_fields(admin: Running, fields: dict[str, Any], wrong: str, directory: Path) -> None:
    error = await refused(admin.call("AddAdapter", _add("small-sql", directory, **fields)))
    assert (error.code(), wrong_field(error)) == (grpc.StatusCode.INVALID_ARGUMENT, wrong)


@pytest.mark.parametrize("ids", WRONG_TENANTS)
def test_tenants_in_a_file_have_the_same_rule(ids: list[str]) -> None:
    entry = {"name": "small", "source": "/m", "lora": {"adapters": [{"name": "a", "source": "/a", "tenants": ids}]}}
    with pytest.raises(ConfigError, match=r"models\.0\.lora\.adapters\.0\.tenants"):
        parse_config({"models": [entry]}, origin="test")


@pytest.mark.parametrize("ids", [["a"], ["default"], ["acme-2", "0"], ["a" * 64]])
def test_what_can_be_the_id_of_a_tenant(ids: list[str]) -> None:
    entry = {"name": "small", "source": "/m", "lora": {"adapters": [{"name": "a", "source": "/a", "tenants": ids}]}}
    (model,) = parse_config({"models": [entry]}, origin="test").models
    assert model.lora is not None and model.lora.adapters[0].tenants == tuple(ids)
    assert adapter_changes.checked_entry("a", "/a", tuple(ids)) == model.lora.adapters[0]
    assert all(Tenant(id=tenant, plan="unlimited") for tenant in ids)


async def test_a_model_that_is_not_served(admin: Running, directory: Path) -> None:
    error = await refused(admin.call("AddAdapter", _add("small-sql", directory, model="other")))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_there_are_not_too_many(admin: Running, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_changes, "MAX_ADAPTERS", 1)
    error = await refused(admin.call("AddAdapter", _add("small-sql", directory)))
    assert "there are 1 adapters already, which is the most" in (error.details() or "")


async def test_what_was_added_outlives_a_change_of_its_model(admin: Running, stack: Stack, directory: Path) -> None:
    """A change writes the model's entry anew, which does not know of it; one that has its name takes its place."""
    await admin.call("AddAdapter", _add("small-sql", directory))
    text, spec = entry_text(stack.spec.entry), stack.spec
    stack.operations._write("small", served_model(spec, text, 7, "replacing"))
    assert stack.names == ["small-own", "small-sql"]
    own = msgspec.structs.replace(spec.adapters[0], name="small-sql")
    stack.operations._write("small", msgspec.structs.replace(served_model(spec, text, 8, "serving"), adapters=(own,)))
    assert [(card.name, card.is_configured) for card in stack.operations.adapters()] == [("small-sql", True)]


async def test_the_command_line(admin: Running, stack: Stack, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKTRAIN_API_KEY", KEY)

    async def run(*arguments: str) -> str:
        result = await asyncio.to_thread(CliRunner().invoke, app, ["adapters", *arguments, "--address", admin.target])
        assert result.exit_code == 0, result.output
        return result.output

    said = await run("add", "small-sql", str(directory), "--model", "small", "--tenant", "acme")
    assert said.startswith("small-sql is served: rank 4, ")
    listed = await run("list", "--format", "json")
    assert '"name": "small-sql"' in listed and '"tenants": ["acme"]' in listed
    assert await run("remove", "small-sql") == "small-sql is served no more\n"
    assert stack.names == ["small-own"]
