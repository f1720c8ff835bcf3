"""The served stack, as the benchmarks of it start it. `prepare_environment` comes first."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bench.peers.environments import MODEL
from model_parallel.machine import read_machine
from serving.config import ServingConfig, parse_config

if TYPE_CHECKING:
    from serving.driver.app import RunningApp

NO_ADMIN = {"port": None, "metrics_port": None}


def stack_config(entry: Mapping[str, Any], **sections: Any) -> ServingConfig:
    """The benchmarks' model with `entry` over it, gRPC on a free port, and `sections`. What is not said is the default."""
    model = {"name": MODEL, "source": MODEL, "device": "cpu", "dtype": "bfloat16", "kv_cache_tokens": 16384}
    data = {"models": [model | dict(entry)], "gateway": {"port": 0, "http_port": None}} | sections
    return parse_config(data, origin="the benchmark's configuration")


def on_all_cores(tp_size: int) -> dict[str, int]:
    """Ranks that share out the cores, for a model's entry."""
    return {"tensor_parallel_size": tp_size, "threads_per_rank": max(1, read_machine().num_cpus // tp_size)}


@contextmanager
def running(config: ServingConfig, report: Callable[[str], Any]) -> Iterator["RunningApp"]:
    """Serves within the block. `report` is told of the stages of the start."""
    from serving.driver.app import start  # noqa: PLC0415  # after prepare_environment

    app = start(config, report)
    try:
        yield app
    finally:
        app.stop()
