"""Load on a running gateway over gRPC streams, with the measures and names of `vllm bench serve`, so that results compare.

Times are the client's: to the first token (ttft), per output token after it (tpot), between the arrivals of two (itl), and of
the whole answer (e2el).
"""

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import grpc.aio
import numpy as np

from bench.timing import Workload
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from serving.client.client import Client
from serving.client.tls import ClientTls

GOODPUT_MEASURES = ("ttft", "tpot", "e2el")
MS = 1e3


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPlan:
    """What is sent, and when."""

    model: str
    vocab_size: int
    num_prompts: int
    input_len: int
    output_len: int
    request_rate: float
    """Requests a second on average; infinity sends all at once."""
    burstiness: float
    """1 is a Poisson process; below it requests come in bursts, above it more evenly."""
    max_concurrency: int | None
    seed: int
    timeout_s: float

    def arrivals_s(self) -> Iterator[float]:
        """When each request is sent, from the start: gaps are gamma-distributed with a mean of 1 / request_rate."""
        draw = random.Random(self.seed)
        at_s = 0.0
        for _ in range(self.num_prompts):
            yield at_s
            if math.isfinite(self.request_rate):
                at_s += draw.gammavariate(self.burstiness, 1 / (self.request_rate * self.burstiness))

    def requests(self) -> Iterator[pb.GenerateRequest]:
        """Random prompts; answers of exactly `output_len` tokens."""
        sampling = pb.Sampling(temperature=0.0, max_tokens=self.output_len, ignore_eos=True)
        for ids in Workload(self.num_prompts, self.input_len, self.output_len).prompts(self.vocab_size, self.seed):
            prompt = pb.Prompt(token_ids=pb.TokenIds(ids=ids))
            yield pb.GenerateRequest(model=self.model, prompt=prompt, sampling=sampling)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """How one request went."""

    num_input_tokens: int
    arrivals: tuple[tuple[float, int], ...] = ()
    """(seconds since it was sent, tokens) of every chunk that brought tokens."""
    ended_s: float = 0.0
    status: str = ""
    """The gRPC status that it failed with; "" when it did not."""

    @property
    def num_output_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens in self.arrivals)

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0][0]

    @property
    def tpot_s(self) -> float | None:
        """None of an answer of one token."""
        more = self.num_output_tokens - 1
        return (self.ended_s - self.ttft_s) / more if more else None

    @property
    def itls_s(self) -> list[float]:
        return [after_s - before_s for (before_s, _), (after_s, _) in pairwise(self.arrivals)]


def served_models(address: str, api_key: str, tls: ClientTls | None = None) -> dict[str, pb.ModelCard]:
    """By name. Raises ConnectionError, grpc.RpcError."""
    with Client(address, api_key=api_key, tls=tls) as client:
        client.wait_until_connected()
        return {card.name: card for card in client.models()}


async def run_load(
    address: str, plan: LoadPlan, api_key: str, tls: ClientTls | None = None
) -> tuple[list[Answer], float]:
    """Send everything; the answers, and the seconds from the first request to the end of the last."""
    metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
    slots = asyncio.Semaphore(plan.max_concurrency or plan.num_prompts)
    channel = grpc.aio.insecure_channel(address) if tls is None else grpc.aio.secure_channel(address, tls.credentials())
    async with channel:
        stub = InferenceStub(channel)
        began_s = time.perf_counter()

        async def ask(request: pb.GenerateRequest, at_s: float) -> Answer:
            await asyncio.sleep(max(0.0, began_s + at_s - time.perf_counter()))
            async with slots:
                sent_s = time.perf_counter()
                arrivals = []
                try:
                    async for chunk in stub.GenerateStream(request, timeout=plan.timeout_s, metadata=metadata):
                        if chunk.token_ids:
                            arrivals.append((time.perf_counter() - sent_s, len(chunk.token_ids)))
                except grpc.aio.AioRpcError as error:
                    return Answer(num_input_tokens=plan.input_len, status=error.code().name)
                ended_s = time.perf_counter() - sent_s
                return Answer(num_input_tokens=plan.input_len, arrivals=tuple(arrivals), ended_s=ended_s)

        pairs = zip(plan.requests(), plan.arrivals_s(), strict=True)
        answers = await asyncio.gather(*(ask(request, at_s) for request, at_s in pairs))
        return answers, time.perf_counter() - began_s


def summarise(answers: Sequence[Answer], duration_s: float, goodput_ms: Mapping[str, float]) -> dict[str, Any]:
    """The result under the names of `vllm bench serve`; `goodput_ms` are the bounds that a request must keep to count as good."""
    completed = [answer for answer in answers if not answer.status and answer.arrivals]
    num_input = sum(answer.num_input_tokens for answer in completed)
    num_output = sum(answer.num_output_tokens for answer in completed)
    good = sum(_keeps(answer, goodput_ms) for answer in completed) if goodput_ms else None
    return {
        "duration": duration_s,
        "completed": len(completed),
        "failed": len(answers) - len(completed),
        "rejects": dict(Counter(answer.status for answer in answers if answer.status)),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(completed) / duration_s,
        "request_goodput": None if good is None else good / duration_s,
        "output_throughput": num_output / duration_s,
        "total_token_throughput": (num_input + num_output) / duration_s,
        **_distribution("ttft", [answer.ttft_s for answer in completed]),
        **_distribution("tpot", [tpot_s for answer in completed if (tpot_s := answer.tpot_s) is not None]),
        **_distribution("itl", [itl_s for answer in completed for itl_s in answer.itls_s]),
        **_distribution("e2el", [answer.ended_s for answer in completed]),
    }


def _keeps(answer: Answer, goodput_ms: Mapping[str, float]) -> bool:
    measured = {"ttft": answer.ttft_s, "tpot": answer.tpot_s or 0.0, "e2el": answer.ended_s}
    return all(measured[name] * MS <= bound_ms for name, bound_ms in goodput_ms.items())


def _distribution(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Zeros where nothing was measured, as `vllm bench serve` has it."""
    values = np.array(seconds or [0.0]) * MS
    return {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
        f"p99_{name}_ms": float(np.percentile(values, 99)),
    }
