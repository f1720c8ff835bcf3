"""What clients of the served stack see when a part of it is killed, and how soon a cancelled request's KV blocks are free.

Of two groups on a private Ray, with streams from one client each: a random process of a random group, leader or rank, is killed,
and each stream's longest pause from then on is taken. The router gives each group half of the streams, so the longer half of the
pauses are those of the lost group's; the gateway's metrics say where these went. Then of one group alone: the time until its only
stream goes on, and what part of it passes until the new group answers. Then requests are cancelled in their middle, and the group
is asked again and again whether it holds any block; asking takes a few milliseconds, which are part of the time.

Kills come when the spare processes of the last one are back (`cluster/spares.py`), as they do where groups are seldom lost.

    python -m bench.served_recovery [--kills 20] [--only-kills 20] [--cancels 200] [--streams 16]
        [--tokens 200] [--rest 25] [--json FILE]
"""

import argparse
import json
import os
import random
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from bench.machine import machine_facts
from bench.peers.environments import MODEL
from bench.recovery import percentiles
from bench.stack import NO_ADMIN, running, stack_config
from protos import inference_pb2 as pb
from serving.client.client import Client
from serving.contracts.served import app_name, deployment_name
from serving.driver.environment import prepare_environment

if TYPE_CHECKING:
    from serving.driver.app import RunningApp

RESULT = Path(__file__).parent / "results" / "served_recovery.json"
ENTRY = {"tensor_parallel_size": 2, "threads_per_rank": 1}
STAGE_SUM, STAGE_COUNT = (f"packtrain_resumption_stage_seconds_{what}" for what in ("sum", "count"))
TIMEOUT_S = 900.0
ASK_TIMEOUT_S = 5.0
POLL_S = 0.1


def request(seed: int, num_tokens: int) -> pb.GenerateRequest:
    sampling = pb.Sampling(max_tokens=num_tokens, seed=seed, temperature=float(seed % 2), ignore_eos=True)
    return pb.GenerateRequest(model=MODEL, prompt=pb.Prompt(text="Once upon a time"), sampling=sampling)


class Reading:
    """One stream, and its longest pause since a fault."""

    def __init__(self, address: str, seed: int, num_tokens: int) -> None:
        self.has_begun = threading.Event()
        self.fault_s: float | None = None
        self.pause_s = 0.0
        self.pause_began_s = 0.0
        """After the fault."""
        self.num_tokens = 0
        self._address, self._request = address, request(seed, num_tokens)

    def run(self) -> None:
        """Read all of it. Raises grpc.RpcError."""
        with Client(self._address) as client:
            last_s = time.perf_counter()
            for chunk in client.stub.GenerateStream(self._request, timeout=TIMEOUT_S):
                now_s = time.perf_counter()
                if self.fault_s is not None:
                    began_s = max(last_s, self.fault_s)
                    if now_s - began_s > self.pause_s:
                        self.pause_s, self.pause_began_s = now_s - began_s, began_s - self.fault_s
                last_s = now_s
                self.num_tokens += len(chunk.token_ids)
                self.has_begun.set()


class Groups:
    """The replica groups, as their processes tell."""

    def __init__(self) -> None:
        from ray import serve  # noqa: PLC0415  # after prepare_environment
        from ray.exceptions import RayError  # noqa: PLC0415
        from ray.serve.exceptions import RayServeException  # noqa: PLC0415

        self._lost = (RayError, RayServeException, TimeoutError)
        self._handle: Any = serve.get_deployment_handle(deployment_name(MODEL), app_name(MODEL))

    def pids(self) -> list[tuple[int, ...]]:
        """Of each group that answers: leader and ranks."""
        try:
            answers = self._handle.broadcast("pids").results(timeout_s=ASK_TIMEOUT_S, return_exceptions=True)
        except self._lost:
            return []
        return [answer for answer in answers if isinstance(answer, tuple)]

    def usage(self) -> float:
        """Part of the KV blocks of the only group that sequences hold."""
        return float(self._handle.stats.remote().result(timeout_s=ASK_TIMEOUT_S)["kv_usage"])

    def await_groups(self, num_groups: int, without: Sequence[int] = ()) -> float:
        """When so many groups answer that have none of these processes. Raises TimeoutError."""
        found: list[tuple[int, ...]] = []

        def are_there() -> bool:
            found[:] = self.pids()
            return len(found) == num_groups and not {pid for group in found for pid in group} & set(without)

        return wait_until(are_there)


def wait_until(condition: Callable[[], bool]) -> float:
    """When it held. Raises TimeoutError."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError("what must come has not come")
        time.sleep(POLL_S)
    return time.perf_counter()


def stages(app: "RunningApp") -> tuple[float, dict[str, float]]:
    """How many requests have gone on in another group, and seconds of all of them in each stage of that."""
    assert app.metrics_url is not None
    with urllib.request.urlopen(app.metrics_url, timeout=ASK_TIMEOUT_S) as response:
        families = text_string_to_metric_families(response.read().decode())
        samples = [sample for family in families for sample in family.samples]
    sums = {sample.labels["stage"]: sample.value for sample in samples if sample.name == STAGE_SUM}
    return max((sample.value for sample in samples if sample.name == STAGE_COUNT), default=0.0), sums


def kill_one(
    address: str, groups: Groups, num_streams: int, num_tokens: int, draw: random.Random
) -> tuple[list[Reading], tuple[int, ...], float]:
    """Streams through a kill; what was killed, and when."""
    readings = [Reading(address, seed, num_tokens) for seed in range(num_streams)]
    with ThreadPoolExecutor(num_streams) as threads:
        futures = [threads.submit(reading.run) for reading in readings]
        for reading in readings:
            if not reading.has_begun.wait(TIMEOUT_S):
                raise TimeoutError("a stream does not begin")
        time.sleep(draw.uniform(0.0, 1.0))
        group = draw.choice(groups.pids())
        fault_s = time.perf_counter()
        for reading in readings:
            reading.fault_s = fault_s
        os.kill(draw.choice(group), signal.SIGKILL)
        for future in futures:
            future.result()
    if lost := [reading.num_tokens for reading in readings if reading.num_tokens != num_tokens]:
        raise RuntimeError(f"streams have {lost} tokens instead of {num_tokens}")
    return readings, group, fault_s


def with_a_peer(num_kills: int, num_streams: int, num_tokens: int, rest_s: float, console: Console) -> dict[str, Any]:
    """Pauses where another group goes on."""
    draw, pauses_s, begins_s = random.Random(1), list[float](), list[float]()
    admin = NO_ADMIN | {"metrics_port": 0}
    with running(stack_config(ENTRY | {"num_groups": 2}, admin=admin), lambda stage: None) as app:
        groups = Groups()
        groups.await_groups(2)
        for turn in range(num_kills):
            time.sleep(rest_s)
            readings, group, _ = kill_one(app.address, groups, num_streams, num_tokens, draw)
            lost = sorted(readings, key=lambda reading: reading.pause_s, reverse=True)[: num_streams // 2]
            longest = [reading.pause_s for reading in lost]
            pauses_s += longest
            begins_s += [reading.pause_began_s for reading in lost]
            groups.await_groups(2, without=group)
            console.print(
                f"kill {turn} of one of two groups: pauses of {min(longest):.2f} to {max(longest):.2f} s, which began "
                f"{max(begins_s[-len(lost) :]):.2f} s after it at the latest"
            )
        num_resumed, sums = stages(app)
    means = {stage: seconds / num_resumed for stage, seconds in sums.items()}
    console.print(f"{num_resumed:.0f} streams went on elsewhere; seconds of each by stage: {means}")
    settings = {"num_kills": num_kills, "num_streams": num_streams, "num_tokens": num_tokens}
    return percentiles(pauses_s) | settings | {"seconds": pauses_s, "began_after_s": begins_s, "stages": means}


def alone(num_kills: int, num_cancels: int, num_tokens: int, rest_s: float, console: Console) -> dict[str, Any]:
    """The same where no other group is there; and cancels."""
    draw, pauses_s, rebuilt_s = random.Random(2), list[float](), list[float]()
    with running(stack_config(ENTRY, admin=NO_ADMIN), lambda stage: None) as app:
        groups = Groups()
        cancels_s = [free_after_cancel(app.address, groups, seed, draw) for seed in range(num_cancels)]
        if cancels_s:
            console.print(f"blocks free after a cancel: {percentiles(cancels_s)}")
        for turn in range(num_kills):
            time.sleep(rest_s)
            (before,) = groups.pids()
            with ThreadPoolExecutor(1) as threads:
                waiting = threads.submit(groups.await_groups, 1, before)
                (reading,), _, fault_s = kill_one(app.address, groups, 1, num_tokens, draw)
                rebuilt_s.append(waiting.result() - fault_s)
            pauses_s.append(reading.pause_s)
            console.print(
                f"kill {turn} of the only group: back after {rebuilt_s[-1]:.1f} s, pause {pauses_s[-1]:.1f} s"
            )
    result: dict[str, Any] = {}
    if pauses_s:
        result["only_group"] = percentiles(pauses_s) | {"seconds": pauses_s, "rebuilt": percentiles(rebuilt_s)}
    if cancels_s:
        result["cancel"] = percentiles(cancels_s) | {"seconds": cancels_s}
    return result


def free_after_cancel(address: str, groups: Groups, seed: int, draw: random.Random) -> float:
    """Seconds from a cancel until the group holds no block."""
    with Client(address) as client:
        call = client.stub.GenerateStream(request(seed, 900), timeout=TIMEOUT_S)
        for _ in range(draw.randrange(1, 12)):
            next(call)
        began_s = time.perf_counter()
        call.cancel()
        while groups.usage() > 0:
            if time.perf_counter() - began_s > ASK_TIMEOUT_S:
                raise TimeoutError("blocks of a cancelled request are held")
        return time.perf_counter() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of one of two groups")
    parser.add_argument("--only-kills", type=int, default=20, help="of the only group")
    parser.add_argument("--cancels", type=int, default=200)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200, help="of each stream")
    parser.add_argument("--rest", type=float, default=25.0, help="seconds from a group that is back to the next kill")
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    arguments = parser.parse_args()
    prepare_environment()
    console = Console(width=130, highlight=False)
    load = os.getloadavg()[0]
    result: dict[str, Any] = {"machine": machine_facts(), "model": MODEL, "load_before": load}
    if arguments.only_kills or arguments.cancels:
        result |= alone(arguments.only_kills, arguments.cancels, arguments.tokens, arguments.rest, console)
    if arguments.kills:
        result["one_of_two"] = with_a_peer(
            arguments.kills, arguments.streams, arguments.tokens, arguments.rest, console
        )
    result["load_after"] = os.getloadavg()[0]
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for what, figures in result.items():
        if isinstance(figures, dict) and "p50_s" in figures:
            console.print(
                f"{what}: p50 {figures['p50_s']:.3f} s, p99 {figures['p99_s']:.3f} s, longest {figures['max_s']:.3f} s"
            )


if __name__ == "__main__":
    main()
