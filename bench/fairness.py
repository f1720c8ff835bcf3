"""How long a small tenant waits for its first token beside one that sends a hundred times more, and alone, on the served stack.

Both have a key of their own and send the same kind of requests: prompts whose lengths are log-normal, short answers. The small
tenant's requests come at the same moments, with the same prompts, in both phases. The large one's rate is many times what the
stack can serve, so most of its requests are refused, and none is sent again.

    python -m bench.fairness [--rate 2] [--times 100] [--seconds 150] [--json FILE]
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.clients import Ended, Load, Metadata, Outcome, Shape, client_processes, open_loop, percentile
from bench.machine import machine_facts
from bench.peers.environments import MODEL
from bench.stack import NO_ADMIN, on_all_cores, running, stack_config
from serving.config import ServingConfig
from serving.driver.environment import prepare_environment
from serving.tenants.records import KeyGrant, Tenant
from serving.tenants.store.database import Database
from serving.tenants.store.store import Store

RESULT = Path(__file__).parent / "results" / "fairness.json"
SMALL, LARGE = "small", "large"
MEDIAN_PROMPT_TOKENS, SIGMA, MAX_PROMPT_TOKENS = 148, 0.8, 1500
NUM_LENGTHS = 200
NEW_TOKENS = 32
TIMEOUT_S = 60.0
WARM_UP_S = 10.0
START_S = 5.0
"""Within which a client process has its requests ready."""
MAX_NUM_SEQS, MAX_PREFILL_TOKENS = 16, 32
"""A newcomer waits for the step that runs and for the next, so steps are kept short; its own prompt may fill a step. With the
defaults the stack makes about as many tokens, and the ratio is larger (docs/performance.md)."""
MAX_RATIO = 1.3
PERCENTS = (50, 90, 99)


def prompt_lengths() -> tuple[int, ...]:
    """Quantiles of the log-normal distribution, each as likely as the others."""
    normal = statistics.NormalDist(math.log(MEDIAN_PROMPT_TOKENS), SIGMA)
    lengths = (math.exp(normal.inv_cdf((index + 0.5) / NUM_LENGTHS)) for index in range(NUM_LENGTHS))
    return tuple(min(MAX_PROMPT_TOKENS, round(length)) for length in lengths)


SHAPE = Shape(prompt_tokens=prompt_lengths(), new_tokens=(NEW_TOKENS,))


@contextmanager
def tenants_database() -> Iterator[tuple[str, dict[str, Metadata]]]:
    """URL of a temporary database, and what each of the two tenants sends with its requests."""
    with tempfile.TemporaryDirectory() as directory:
        url = f"sqlite:///{directory}/tenants.db"
        database = Database(url)
        store = Store(database)
        credentials: dict[str, Metadata] = {}
        for name in (SMALL, LARGE):
            store.create_tenant(Tenant(id=name, plan="unlimited"))
            credentials[name] = (("authorization", f"Bearer {store.create_key(name, KeyGrant()).text}"),)
        database.close()
        yield url, credentials


def first_tokens(requests: Sequence[Ended]) -> list[float]:
    """Seconds to the first token of those that had one."""
    return [request.first_s - request.sent_s for request in requests if request.first_s is not None]


def phase(
    pool: ProcessPoolExecutor,
    address: str,
    credentials: Mapping[str, Metadata],
    rates: Mapping[str, float],
    seconds: float,
) -> dict[str, Outcome]:
    """Each tenant sends from a process of its own. The large one begins first, so that the small one meets a full group."""
    start_s = time.monotonic() + START_S
    futures = {}
    for tenant, rate in rates.items():
        is_small = tenant == SMALL
        load = Load(
            address=address,
            shape=SHAPE,
            seconds=seconds if is_small else seconds + WARM_UP_S,
            timeout_s=TIMEOUT_S,
            seed=1 if is_small else 2,
            start_s=start_s + (WARM_UP_S if is_small else 0.0),
            metadata=credentials[tenant],
            is_streamed=True,
        )
        futures[tenant] = pool.submit(open_loop, load, rate)
    deadline_s = START_S + WARM_UP_S + seconds + 2 * TIMEOUT_S
    return {tenant: future.result(timeout=deadline_s) for tenant, future in futures.items()}


def summarise(requests: Sequence[Ended]) -> dict[str, Any]:
    """Of the small tenant's requests in one phase."""
    ttfts_s = first_tokens(requests)
    return {
        "num_requests": len(requests),
        "codes": Counter(request.code for request in requests),
        "ttft_s": {str(percent): percentile(ttfts_s, percent) for percent in PERCENTS},
        "mean_ttft_s": statistics.fmean(ttfts_s),
    }


def compare(alone: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """The ratio at each percentile, and whether the last is within the bound and nobody was refused."""
    ratios = {percent: beside["ttft_s"][percent] / alone["ttft_s"][percent] for percent in alone["ttft_s"]}
    all_served = all(set(part["codes"]) == {"OK"} for part in (alone, beside))
    return {"ratios": ratios, "all_served": all_served, "holds": all_served and ratios["99"] <= MAX_RATIO}


def measure(
    address: str,
    credentials: Mapping[str, Metadata],
    rate: float,
    times: float,
    seconds: float,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Both phases against a running stack, which serves nobody else."""
    with client_processes(2) as pool:
        phase(pool, address, credentials, {SMALL: rate}, WARM_UP_S)
        alone = summarise(phase(pool, address, credentials, {SMALL: rate}, seconds)[SMALL].requests)
        report(f"alone: p99 {alone['ttft_s']['99'] * 1e3:.0f} ms of {alone['num_requests']} requests")
        report(f"now beside {times * rate:g} requests/s of another tenant")
        outcomes = phase(pool, address, credentials, {LARGE: times * rate, SMALL: rate}, seconds)
    beside, large = summarise(outcomes[SMALL].requests), outcomes[LARGE]
    return {
        "alone": alone,
        "beside": beside,
        "large": {
            "num_requests": len(large.requests),
            "codes": Counter(request.code for request in large.requests),
            "client_cores": large.cpu_s / (seconds + WARM_UP_S),
            "latest_s": large.late_s,
        },
        **compare(alone, beside),
    }


def describe(result: Mapping[str, Any]) -> list[str]:
    """What was found, for people."""
    lines = []
    for name in ("alone", "beside"):
        part = result[name]
        at = ", ".join(f"p{percent} {seconds * 1e3:.0f} ms" for percent, seconds in part["ttft_s"].items())
        lines.append(f"{name}: {at} of {part['num_requests']} requests, {dict(part['codes'])}")
    large = result["large"]
    lines.append(
        f"the large tenant: {large['num_requests']} requests, {dict(large['codes'])}; its client took "
        f"{large['client_cores']:.2f} cores and was {large['latest_s'] * 1e3:.0f} ms late at most"
    )
    ratios = ", ".join(f"p{percent} {ratio:.2f}" for percent, ratio in result["ratios"].items())
    lines.append(
        f"first token beside / alone: {ratios}; p99 at most {MAX_RATIO}, and none refused: "
        f"{'holds' if result['holds'] else 'does not hold'}"
    )
    return lines


def configuration(database_url: str, tp_size: int) -> ServingConfig:
    """What is not said here is the default."""
    entry = {"max_num_seqs": MAX_NUM_SEQS, "max_prefill_tokens": MAX_PREFILL_TOKENS}
    return stack_config(entry | on_all_cores(tp_size), tenancy={"database": database_url}, admin=NO_ADMIN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second of the small tenant")
    parser.add_argument("--times", type=float, default=100.0, help="how many times more the large one sends")
    parser.add_argument("--seconds", type=float, default=150.0, help="of each of the two phases")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULT, help="write the result here")
    arguments = parser.parse_args()
    prepare_environment()
    console = Console(width=130, highlight=False)
    facts = machine_facts()
    with (
        tenants_database() as (url, credentials),
        running(configuration(url, arguments.tp), console.print) as app,
    ):
        result = measure(app.address, credentials, arguments.rate, arguments.times, arguments.seconds, console.print)
    result = {
        "machine": facts,
        "model": MODEL,
        "tp_size": arguments.tp,
        "rate": arguments.rate,
        "times": arguments.times,
        "seconds": arguments.seconds,
        "max_num_seqs": MAX_NUM_SEQS,
        "max_prefill_tokens": MAX_PREFILL_TOKENS,
        **result,
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for line in describe(result):
        console.print(line)
    sys.exit(not result["holds"])


if __name__ == "__main__":
    main()
