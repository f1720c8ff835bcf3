"""Measures the real stack on this machine: how much it can do in a closed loop, and then loads at parts of that."""

import socket
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from types import MappingProxyType

import msgspec

from bench.clients import Ended, Load, Outcome, Shape, client_processes, closed_loop, open_loop
from bench.simulation.fit import read_samples
from bench.stack import on_all_cores, running, stack_config
from bench.truth.recording import LoadRecord, Sent, ShapeRecord
from protos import inference_pb2 as pb
from serving.config import ServingConfig
from serving.contracts.group_report import PERIOD_S

MIXES = MappingProxyType(
    {
        "short": Shape(prompt_tokens=tuple(range(32, 97)), new_tokens=tuple(range(32, 97))),
        "long": Shape(prompt_tokens=tuple(range(128, 385)), new_tokens=tuple(range(96, 193))),
    }
)
MAX_NUM_SEQS = 16
MAX_STEP_TOKENS = 512
KV_TOKENS = 4096
"""Less than 16 of the long sequences may need, so that some are preempted."""
MAX_WAITING = 16
TIMEOUT_S = 300.0
CLOSED_S = 12.0
"""Length of a closed loop, its beginning included; doubled until as many requests end as there are streams."""
MAX_CLOSED_S = 200.0
MIN_REQUESTS = 30
"""Arrivals that a load is expected to have at least: it takes longer where they come slowly."""
BEGINNING = 0.25
"""Part of a closed loop that does not count to the capacity."""
LEAD_S = 0.5
"""From when a load is handed to the clients' process until it begins."""


def configuration(num_groups: int, tp_size: int, metrics_port: int) -> ServingConfig:
    """What is not said is the default."""
    entry = {
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": MAX_STEP_TOKENS,
        "speculation": "off",  # as it is simulated
        "kv_cache_tokens": KV_TOKENS,
        "max_waiting_requests": MAX_WAITING,
        "prefix_caching": False,
        "quantization": "none",  # as the checkpoint has them, prompts take so long that few requests are told by
        "tensor_parallel_size": tp_size,
        "num_groups": num_groups,
    }
    threads = on_all_cores(tp_size * num_groups)["threads_per_rank"]
    return stack_config(entry | {"threads_per_rank": threads}, admin={"port": None, "metrics_port": metrics_port})


def measure_shape(
    num_groups: int,
    tp_size: int,
    shares: Sequence[float],
    seconds: float,
    repeats: int,
    report: Callable[[str], None],
    keep: Callable[[ShapeRecord], None],
) -> ShapeRecord:
    """Starts the stack, measures, and stops it. `keep` is given what there is after each load."""
    port = free_port()
    calibration: list[LoadRecord] = []
    cells: list[LoadRecord] = []
    capacity: dict[str, float] = {}
    shape = ShapeRecord(num_groups=num_groups, tp_size=tp_size, capacity=capacity, calibration=calibration, cells=cells)
    streams = sorted({1, *(number * num_groups for number in (1, MAX_NUM_SEQS // 4, MAX_NUM_SEQS + 4))})
    with running(configuration(num_groups, tp_size, port), report) as app, client_processes(1) as pool:
        stack = _Stack(app.address, port, pool)
        for index, mix in enumerate(MIXES):
            for num_streams in streams:
                calibration.append(stack.long_enough(mix, num_streams, seed=900 + index))
                keep(shape)
            capacity[mix] = throughput(calibration[-1])
            report(f"capacity, {mix}: {capacity[mix]:.2f} requests/s")
        for _ in range(repeats):
            for number, share in enumerate(shares):
                for mix in MIXES:
                    seed = 100 * number + len(mix)
                    rate = share * capacity[mix]
                    cells.append(stack.open(mix, share, rate, max(seconds, MIN_REQUESTS / rate), seed))
                    keep(shape)
                    report(f"groups {num_groups}, TP {tp_size}, {mix}, {share:.0%}: {len(cells[-1].requests)} requests")
    return shape


def num_finished(record: LoadRecord) -> int:
    """Requests that ended in a closed loop after its beginning."""
    return sum(sent.code == "OK" and BEGINNING <= sent.ended_s / record.seconds < 1 for sent in record.requests)


def throughput(record: LoadRecord) -> float:
    """Requests a second that a closed loop finished after its beginning."""
    return num_finished(record) / ((1 - BEGINNING) * record.seconds)


class _Stack:
    """One that runs."""

    def __init__(self, address: str, metrics_port: int, pool: ProcessPoolExecutor) -> None:
        self._address = address
        self._url = f"http://127.0.0.1:{metrics_port}"
        self._pool = pool

    def closed(self, mix: str, num_streams: int, seconds: float, seed: int) -> LoadRecord:
        """So many clients, each with one request after another."""
        began_s, before = time.monotonic() + LEAD_S, self._counters()
        outcome = self._pool.submit(closed_loop, self._load(mix, seconds, seed, began_s), num_streams).result()
        return self._record(outcome, mix, seconds, began_s, before, num_streams=num_streams)

    def long_enough(self, mix: str, num_streams: int, seed: int) -> LoadRecord:
        """A closed loop in which as many requests end after its beginning as there are streams. Raises RuntimeError."""
        seconds = CLOSED_S
        while num_finished(record := self.closed(mix, num_streams, seconds, seed)) < num_streams:
            seconds *= 2
            if seconds > MAX_CLOSED_S:
                raise RuntimeError(f"{num_streams} streams of mix {mix} are too many for this machine")
        return record

    def open(self, mix: str, share: float, rate: float, seconds: float, seed: int) -> LoadRecord:
        """Poisson arrivals."""
        began_s, before = time.monotonic() + LEAD_S, self._counters()
        outcome = self._pool.submit(open_loop, self._load(mix, seconds, seed, began_s), rate).result()
        return self._record(outcome, mix, seconds, began_s, before, share=share, rate=rate)

    def _load(self, mix: str, seconds: float, seed: int, start_s: float) -> Load:
        return Load(
            address=self._address, shape=MIXES[mix], seconds=seconds, timeout_s=TIMEOUT_S, seed=seed, start_s=start_s,
            is_streamed=True,
        )  # fmt: skip

    def _record(
        self,
        outcome: Outcome,
        mix: str,
        seconds: float,
        began_s: float,
        before: dict[str, float],
        *,
        num_streams: int | None = None,
        share: float | None = None,
        rate: float | None = None,
    ) -> LoadRecord:
        reports = [
            msgspec.structs.replace(
                report, samples=tuple(sample for sample in report.samples if sample.ended_s - sample.seconds > began_s)
            )
            for report in read_samples(f"{self._url}/steps")
        ]
        time.sleep(PERIOD_S + 0.5)  # until the gateway has the groups' numbers
        after = self._counters()
        requests = [_sent(ended, began_s) for ended in sorted(outcome.requests, key=lambda ended: ended.sent_s)]
        if unexpected := {sent.code for sent in requests} - {"OK", "RESOURCE_EXHAUSTED"}:
            raise RuntimeError(f"requests ended with {', '.join(sorted(unexpected))}")
        return LoadRecord(
            mix=mix,
            num_streams=num_streams,
            share=share,
            rate=rate,
            began_s=began_s,
            seconds=seconds,
            late_s=outcome.late_s,
            client_cpu_s=outcome.cpu_s,
            gateway_cpu_s=after["process_cpu_seconds_total"] - before["process_cpu_seconds_total"],
            num_preempted=round(after["vllm:num_preemptions_total"] - before["vllm:num_preemptions_total"]),
            requests=requests,
            steps=reports,
        )

    def _counters(self) -> dict[str, float]:
        """The gateway's, summed over labels."""
        found = {"process_cpu_seconds_total": 0.0, "vllm:num_preemptions_total": 0.0}
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                name = line.partition(" ")[0].partition("{")[0]
                if name in found:
                    found[name] += float(line.rsplit(" ", 1)[1])
        return found


def _sent(ended: Ended, began_s: float) -> Sent:
    asked = pb.GenerateRequest.FromString(ended.asked)
    return Sent(
        at_s=ended.sent_s - began_s,
        num_prompt_tokens=len(asked.prompt.token_ids.ids),
        num_output_tokens=asked.sampling.max_tokens,
        code=ended.code,
        first_s=None if ended.first_s is None else ended.first_s - began_s,
        ended_s=ended.ended_s - began_s,
    )


def free_port() -> int:
    """One that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
