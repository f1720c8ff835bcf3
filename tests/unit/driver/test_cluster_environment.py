"""What the environment may not decide."""

import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.guard import MAX_PARENT_BYTES
from model_parallel.directories import cache_directory, temporary_parents
from model_parallel.errors import ConfigError
from serving.driver.environment import (
    CLUSTER_VARIABLES,
    OBJECT_STORE_BYTES,
    cluster_environment,
    cluster_parent,
    object_store_directory,
    prepare_environment,
    without_proxy,
)


@pytest.mark.parametrize("address", ["auto", "local", "10.1.1.1:6379", "http://127.0.0.1:8265", "ray://h:10001", ""])
def test_ray_variables_do_not_reach_a_private_cluster(address: str) -> None:
    environment = {
        "RAY_ADDRESS": address,
        "RAY_NAMESPACE": "other",
        "RAY_memory_usage_threshold": "0.01",
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",
        "RAY_ENABLE_AUTO_CONNECT": "1",
        "RAYON_NUM_THREADS": "1",
    }
    removed = prepare_environment(environment=environment)
    assert removed == ["RAY_ADDRESS", "RAY_NAMESPACE", "RAY_memory_usage_threshold"]
    assert environment["RAY_SERVE_USE_GRPC_BY_DEFAULT"] == "1" and environment["RAY_ENABLE_AUTO_CONNECT"] == "0"
    assert environment["RAYON_NUM_THREADS"] == "1", "not one of Ray's"
    assert "RAY_ADDRESS" not in environment


def test_a_private_cluster_lies_on_loopback() -> None:
    environment = dict(os.environ)
    prepare_environment(environment=environment)
    # What `ray.init` makes of the address that it is given, and what its processes take where they are given none.
    program = "from ray._private.services import *; print(resolve_ip_for_localhost('127.0.0.1'), get_node_ip_address())"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=280, check=True
    )
    assert done.stdout.split() == ["127.0.0.1", "127.0.0.1"]


@pytest.mark.parametrize("joins", [True, False])
def test_what_breaks_the_imports_of_libraries_reaches_no_process(joins: bool) -> None:
    broken = {"PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "ignore,error::FutureWarning", "TORCH_LOGS": "foo"}
    environment = dict(broken)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("error", FutureWarning)
        assert prepare_environment(joins=joins, environment=environment) == sorted(broken)
        warnings.warn("Ray Serve's", FutureWarning, stacklevel=1)
    assert not environment.keys() & broken.keys()
    kept = {"PYTHONWARNINGS": "ignore"}
    assert prepare_environment(joins=joins, environment=kept) == [] and kept["PYTHONWARNINGS"] == "ignore"


def test_a_cluster_that_is_joined_keeps_its_variables() -> None:
    environment = {"RAY_ADDRESS": "10.1.1.1:6379", "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_AUTO_CONNECT": "1"}
    assert prepare_environment(joins=True, environment=environment) == []
    assert environment["RAY_ADDRESS"] == "10.1.1.1:6379" and environment["RAY_AUTH_MODE"] == "disabled"
    assert environment["RAY_ENABLE_AUTO_CONNECT"] == "0"


def test_the_driver_of_a_joined_cluster_calls_gateways_from_plain_threads() -> None:
    environment = dict(CLUSTER_VARIABLES)  # as a container has them that runs the driver and a node's image
    prepare_environment(joins=True, environment=environment)
    assert environment["RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"] == "1"
    assert environment["RAY_task_events_report_interval_ms"] == "0"


@pytest.mark.parametrize("name", ["http_proxy", "HTTPS_PROXY", "grpc_proxy", "All_Proxy"])
def test_calls_to_this_machine_take_no_proxy(name: str) -> None:
    environment = {name: "http://proxy:3128", "no_proxy": ".internal,localhost"}
    changes = without_proxy(environment)
    assert changes["no_proxy"] == ".internal,localhost,127.0.0.1,::1" == changes["NO_PROXY"]
    assert name not in changes, "what goes elsewhere still takes it"


def test_a_list_of_grpcs_own_is_kept_and_extended() -> None:
    changes = without_proxy({"grpc_proxy": "http://proxy:3128", "no_grpc_proxy": "db"})
    assert changes["no_grpc_proxy"] == "db,localhost,127.0.0.1,::1"


def test_without_a_proxy_nothing_changes() -> None:
    assert without_proxy({"no_proxy": "x"}) == {}


def test_processes_of_a_cluster_write_below_its_directory_and_the_cache(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    cache, directory = tmp_path / "cache", tmp_path / "run"
    directory.mkdir()
    environment = {"HOME": str(home), "USER": "u", "PACKTRAIN_CACHE": str(cache), "TMPDIR": "/nowhere"}
    variables = cluster_environment(directory, environment)
    assert variables.items() >= CLUSTER_VARIABLES.items()
    for name in ("TMPDIR", "RAY_AUTH_TOKEN_PATH"):
        assert Path(variables[name]).is_relative_to(directory)
    for name in ("PACKTRAIN_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH"):
        assert Path(variables[name]).is_relative_to(cache)
    assert "HOME" not in variables and "USER" not in variables


def test_a_directory_that_a_user_chose_is_kept(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "TRITON_CACHE_DIR": "/kernels"}
    assert cluster_environment(tmp_path, environment)["TRITON_CACHE_DIR"] == "/kernels"


def test_compilers_write_elsewhere_when_the_cache_is_only_read(tmp_path: Path) -> None:
    variables = cluster_environment(tmp_path, {"PACKTRAIN_CACHE": "/proc/cache", "TMPDIR": str(tmp_path)})
    assert variables["PACKTRAIN_CACHE"] == "/proc/cache"  # what is compiled there already is taken
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH"):
        assert Path(variables[name]).is_relative_to(tmp_path)


@pytest.mark.parametrize("shared", ["nowhere", "/proc"])
def test_objects_lie_with_the_cluster_where_shared_memory_cannot_be_written(shared: str, tmp_path: Path) -> None:
    assert object_store_directory(tmp_path, tmp_path / shared) == tmp_path


def test_objects_lie_with_the_cluster_where_shared_memory_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = OBJECT_STORE_BYTES
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    assert object_store_directory(Path("/cluster"), tmp_path) == tmp_path
    free -= 1
    assert object_store_directory(Path("/cluster"), tmp_path) == Path("/cluster")


@pytest.mark.parametrize("home", ["", "/proc/nowhere"])
def test_without_a_home_and_a_name_both_are_made_up(home: str, tmp_path: Path) -> None:
    variables = cluster_environment(tmp_path, {"HOME": home, "PACKTRAIN_CACHE": str(tmp_path)})
    assert variables["HOME"] == str(tmp_path / "tmp")
    assert variables["USER"]


def test_the_token_is_its_owners_alone(tmp_path: Path) -> None:
    path = Path(cluster_environment(tmp_path, {"HOME": str(tmp_path)})["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_text()) == 64
    assert Path(cluster_environment(tmp_path, {"HOME": str(tmp_path)})["RAY_AUTH_TOKEN_PATH"]) == path


def test_a_relative_directory_is_that_of_where_the_command_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray takes absolute paths alone, and its processes may be started elsewhere."""
    monkeypatch.chdir(tmp_path)
    assert next(temporary_parents({"TMPDIR": "."})) == tmp_path
    assert cache_directory({"PACKTRAIN_CACHE": "c"}) == tmp_path / "c"
    assert cache_directory({"XDG_CACHE_HOME": "x"}) == tmp_path / "x" / "packtrain"


def test_a_directory_with_a_long_path_is_passed_over(tmp_path: Path) -> None:
    long = tmp_path / ("x" * MAX_PARENT_BYTES)
    long.mkdir()
    assert cluster_parent({"TMPDIR": str(long)}) in (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))


def test_a_directory_whose_path_is_not_ascii_is_passed_over() -> None:
    other = Path("/tmp/tëmp")
    with pytest.raises(ConfigError, match=rf"{other} has characters beyond ASCII.*set TMPDIR"):
        cluster_parent({}, [other])
    assert cluster_parent({}, [other, Path("/tmp")]) == Path("/tmp")


def test_why_no_directory_can_be_used_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"TMPDIR.*too long for Ray's sockets.*set TMPDIR"):
        cluster_parent({}, [tmp_path / ("x" * MAX_PARENT_BYTES)])
    with pytest.raises(ConfigError, match="TMPDIR, /tmp"):
        cluster_parent({}, [])


def test_the_settings_of_a_cluster_that_is_joined_are_written_down() -> None:
    page = (Path(__file__).parents[3] / "docs/starting.md").read_text()
    _, _, listed = page.partition("## A cluster that was there before")
    block = listed.split("```")[1].split()
    assert block == [f"{name}={value}" for name, value in CLUSTER_VARIABLES.items()]
