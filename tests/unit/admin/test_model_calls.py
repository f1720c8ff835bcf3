"""The calls of the Admin service that change what is served, over a real port; what they do is the test's."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from model_parallel.errors import ConfigError
from protos import admin_pb2 as pb
from protos import admin_pb2_grpc
from serving.admin.operator_key import (
    KeyHolder,
    check_operator_key,
    make_operator_key,
    operator_key_file,
    read_operator_key,
)
from serving.admin.service import AdminServer
from serving.config import AdminConfig
from serving.contracts.accounts import OPEN
from serving.contracts.errors import ChangeError, UnauthenticatedError, ValidationError
from serving.contracts.operations import ModelStatus, Progress, Report
from tests.support.waiting import PATIENCE_S

KEY = "the-operators"


class Operations:
    """Keeps what was asked for; `act` is what a change does."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.act: Callable[[Report], None] = lambda report: report(Progress(stage="done", text="done"))

    def status(self) -> Sequence[ModelStatus]:
        return [ModelStatus(name="m", state="replacing", num_groups=3, num_running=2, config="{}", change="1 of 3")]

    def deploy(self, entry: str, max_unavailable: int, report: Report, *, only_check: bool) -> None:
        self._do(report, "deploy", entry, max_unavailable, only_check)

    def undeploy(self, model: str, report: Report) -> None:
        self._do(report, "undeploy", model)

    def scale(
        self, model: str, report: Report, *, num_groups: int | None, min_groups: int | None, max_groups: int | None
    ) -> None:
        self._do(report, "scale", model, num_groups, min_groups, max_groups)

    def restart(self, model: str, max_unavailable: int, report: Report) -> None:
        self._do(report, "restart", model, max_unavailable)

    def drain(self, group: str, grace_s: float | None, report: Report) -> None:
        self._do(report, "drain", group, grace_s)

    def _do(self, report: Report, *asked: Any) -> None:
        self.asked.append(asked)
        self.act(report)


class Admin:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub = admin_pb2_grpc.AdminStub(channel)

    def call(self, method: str, request: Any, key: str = KEY) -> Any:
        return getattr(self.stub, method)(request, metadata=[("authorization", f"Bearer {key}")], timeout=PATIENCE_S)

    async def texts(self, method: str, request: Any) -> list[str]:
        return [progress.text async for progress in self.call(method, request)]


@pytest.fixture
def operations() -> Operations:
    return Operations()


@pytest.fixture
async def admin(operations: Operations) -> AsyncIterator[Admin]:
    server = AdminServer(AdminConfig(port=0), None, refresh_s=1.0, operations=operations, operator_key=KEY)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{await server.start()}") as channel:
            yield Admin(channel)
    finally:
        await server.stop(0)


@pytest.mark.parametrize(
    ("method", "request_", "asked"),
    [
        ("DeployModel", pb.DeployModelRequest(config="{}"), ("deploy", "{}", 1, False)),
        (
            "DeployModel",
            pb.DeployModelRequest(config="{}", max_unavailable=3, only_check=True),
            ("deploy", "{}", 3, True),
        ),
        ("UndeployModel", pb.UndeployModelRequest(name="m"), ("undeploy", "m")),
        ("ScaleModel", pb.ScaleModelRequest(name="m", num_groups=2), ("scale", "m", 2, None, None)),
        ("ScaleModel", pb.ScaleModelRequest(name="m", min_groups=0, max_groups=4), ("scale", "m", None, 0, 4)),
        ("RestartModel", pb.RestartModelRequest(name="m"), ("restart", "m", 1)),
        ("DrainGroup", pb.DrainGroupRequest(group="g"), ("drain", "g", None)),
        ("DrainGroup", pb.DrainGroupRequest(group="g", grace={"seconds": 0}), ("drain", "g", 0.0)),
    ],
)
async def test_calls_arrive_as_they_were_made(
    admin: Admin, operations: Operations, method: str, request_: Any, asked: tuple[Any, ...]
) -> None:
    assert await admin.texts(method, request_) == ["done"]
    assert operations.asked == [asked]


async def test_progress_comes_as_it_is_made(admin: Admin, operations: Operations) -> None:
    next_ = threading.Semaphore(0)

    def act(report: Report) -> None:
        for number in range(3):
            report(Progress(stage="replacing", text=f"{number} of 3", num_done=number, num_total=3))
            assert next_.acquire(timeout=PATIENCE_S)

    operations.act = act
    seen = []
    async for progress in admin.call("RestartModel", pb.RestartModelRequest(name="m")):
        seen.append((progress.stage, progress.num_done, progress.num_total))
        next_.release()
    assert seen == [("replacing", number, 3) for number in range(3)]


async def test_a_change_goes_on_when_its_client_leaves(admin: Admin, operations: Operations) -> None:
    has_left, is_done = threading.Event(), threading.Event()

    def act(report: Report) -> None:
        report(Progress(stage="starting", text="begun"))
        assert has_left.wait(PATIENCE_S)
        report(Progress(stage="done", text="nobody hears this"))
        is_done.set()

    operations.act = act
    call = admin.call("RestartModel", pb.RestartModelRequest(name="m"))
    assert (await call.read()).text == "begun"
    call.cancel()
    has_left.set()
    assert await asyncio.to_thread(is_done.wait, PATIENCE_S)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValidationError("config", "models.m.dtype: wrong"), grpc.StatusCode.INVALID_ARGUMENT),
        (ChangeError("m is served as before"), grpc.StatusCode.FAILED_PRECONDITION),
        (ZeroDivisionError("a bug"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_a_change_that_is_not_made_says_why(
    admin: Admin, operations: Operations, error: Exception, code: grpc.StatusCode
) -> None:
    def act(report: Report) -> None:
        report(Progress(stage="checking", text="looking"))
        raise error

    operations.act = act
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await admin.texts("DeployModel", pb.DeployModelRequest(config="{}"))
    assert caught.value.code() is code
    assert (str(error) in str(caught.value.details())) is (code is not grpc.StatusCode.INTERNAL)


async def test_what_is_served_is_listed(admin: Admin) -> None:
    (model,) = (await admin.call("ListDeployedModels", pb.ListDeployedModelsRequest())).models
    assert (model.name, model.state, model.num_groups, model.num_running_groups) == ("m", "replacing", 3, 2)
    assert model.change == "1 of 3"


async def test_nobody_else_is_let_in(admin: Admin, operations: Operations) -> None:
    for key in ("", "wrong", KEY + " x"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin.call("UndeployModel", pb.UndeployModelRequest(name="m"), key).read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert operations.asked == []


async def test_there_are_no_tenants_without_tenancy(admin: Admin) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="no tenancy") as caught:
        await admin.call("ListPlans", pb.ListPlansRequest())
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_negative_number_is_named(admin: Admin) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="max_unavailable must be 1 or more"):
        await admin.texts("RestartModel", pb.RestartModelRequest(name="m", max_unavailable=-1))


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER   {KEY} "])
def test_the_operators_key_is_sent_as_those_of_tenants(header: str) -> None:
    assert KeyHolder(KEY).authenticate([header]) == OPEN


@pytest.mark.parametrize(
    "credentials",
    [
        *(
            [],
            [""],
            ["Bearer "],
            [KEY],
            [f"Basic {KEY}"],
            [f"Bearer {KEY}x"],
            [f"Bearer {KEY.upper()}"],
            [f"Bearer\t{KEY}"],
        ),
        *([f"Bearer {KEY}"] * 2, [f"Bearer {KEY} {KEY}"], [f"Bearer{KEY}"], ["Bearer \xff"], ["Bearer " + "k" * 5000]),
    ],
    ids=range(13),
)
def test_nothing_else_is_the_operators_key(credentials: list[str]) -> None:
    with pytest.raises(UnauthenticatedError):
        KeyHolder(KEY).authenticate(credentials)


def test_where_the_cache_is_read_only_the_key_lies_in_a_private_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The image's cache can be read and not written, and without tenancy no server started there."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path / "file" / "cache"))
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("model_parallel.directories._TEMPORARY_PARENTS", ())
    assert read_operator_key() == ""
    assert list(temporary.iterdir()) == []  # a command that looks for a key makes nothing
    check_operator_key()
    key = make_operator_key()
    assert make_operator_key() == read_operator_key() == key
    assert operator_key_file().parent.parent == temporary
    assert operator_key_file().stat().st_mode & 0o777 == 0o600
    # Found again when the cache can be written by then.
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path / "cache"))
    assert make_operator_key() == read_operator_key() == key
    operator_key_file().unlink()
    assert make_operator_key() == read_operator_key() != key
    assert operator_key_file().parent == tmp_path / "cache"


@pytest.mark.parametrize("kind", ["bytes", "directory", "empty"])
def test_what_is_no_key_at_its_place_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path))
    path = tmp_path / "operator.key"
    if kind == "directory":
        path.mkdir(mode=0o700)
    else:
        path.touch(mode=0o600)
        path.write_bytes(b"\xff\xfe\0" if kind == "bytes" else b"")
    for function in (check_operator_key, make_operator_key):
        with pytest.raises(ConfigError, match=r"admin\.port: .*operator\.key .*remove it, and a new"):
            function()
    assert read_operator_key() == ""


def test_a_key_that_can_be_kept_nowhere_is_told_before_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))
    monkeypatch.setattr("model_parallel.directories._TEMPORARY_PARENTS", ())
    with pytest.raises(ConfigError, match="the operator's key cannot be kept"):
        check_operator_key()
    with pytest.raises(ConfigError, match="the operator's key cannot be kept"):
        make_operator_key()


def test_the_operators_key_is_made_once_for_its_user_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a server without a cache may have left one in /tmp
    monkeypatch.setattr("model_parallel.directories._TEMPORARY_PARENTS", ())
    assert read_operator_key() == ""
    key = make_operator_key()
    assert len(key) > 40
    assert make_operator_key() == read_operator_key() == key
    assert operator_key_file().stat().st_mode & 0o777 == 0o600
    operator_key_file().chmod(0o644)
    with pytest.raises(ConfigError, match="others can read it"):
        make_operator_key()
    operator_key_file().chmod(0o600)
    operator_key_file().write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        make_operator_key()
