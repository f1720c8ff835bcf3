"""A process that sends: `python -m bench.loadtest.sender HOST PORT`, with the run's secret in its environment.

It joins the process that leads, gets its part of the work, and hands over what it measured. It ends when the leader is gone.
"""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import uvloop

from bench.loadtest.grpc_transport import GrpcTransport
from bench.loadtest.http_transport import HttpTransport
from bench.loadtest.replies import Outcome, Transport
from bench.loadtest.runner import Runner, Share
from bench.loadtest.scenario import Tenant, has_turns, parse_scenario
from bench.loadtest.targets import check_allowed
from bench.loadtest.wire import (
    RECORDS_A_FRAME,
    Begin,
    Connected,
    Done,
    Failed,
    FromLeader,
    Halt,
    Peer,
    Plan,
    Progress,
    Records,
    join,
)
from model_parallel.errors import ConfigError
from model_parallel.python_process import module_command
from model_parallel.transport.frames import LinkError
from serving.client.tls import ClientTls
from serving.config import LOAD_SECRET_VARIABLE, api_key, environment_key, load_test_secret

PROGRESS_S = 0.5
CONNECT_TIMEOUT_S = 10.0
SENDERS_GROUP = 0
"""Each sender has a process group of its own: Ctrl-C, and `timeout`, signal a whole group, and what to do then is the leader's to
say."""
_ORDER = (Outcome.FINISHED, Outcome.REFUSED, Outcome.FAILED, Outcome.CANCELLED)


def key_of(tenant: Tenant) -> str:
    """The tenant's key, from where the scenario says; else that of the command line. Raises ConfigError."""
    if tenant.api_key_env:
        return environment_key(tenant.api_key_env, f"tenants.{tenant.name}.api_key_env")
    if tenant.api_key_file:
        try:
            return tenant.api_key_file.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"tenants.{tenant.name}.api_key_file: {tenant.api_key_file}: {error}") from error
    return api_key()


def transport_of(tenant: Tenant, model: str, tls: ClientTls | None) -> Transport:
    """Not connected yet. Raises ConfigError."""
    keep, target = has_turns(tenant.work), tenant.parsed_target
    if target.is_grpc:
        return GrpcTransport(tenant, model, key_of(tenant), tls, keep_answers=keep)
    context = (tls or ClientTls(None, None, None)).context("http/1.1") if target.is_secure else None
    return HttpTransport(tenant, model, key_of(tenant), context, keep_answers=keep)


async def _one_run(peer: Peer[FromLeader], plan: Plan, tls: ClientTls | None, *, owns_targets: bool) -> None:
    """This process's part of one run. Raises LinkError when the leader is gone."""
    try:
        scenario = parse_scenario(json.loads(plan.scenario), origin="the leader's scenario")
        check_allowed([tenant.parsed_target for tenant in scenario.tenants], owns_targets)
        transports = [
            transport_of(tenant, known.facts.model, tls)
            for tenant, known in zip(scenario.tenants, plan.resolved, strict=True)
        ]
        runner = Runner(scenario, plan.resolved, transports, Share(plan.index, plan.count))
        try:
            await runner.open(CONNECT_TIMEOUT_S)
            await peer.send(Connected())
            await _run(peer, runner)
            for begin in range(0, len(runner.records), RECORDS_A_FRAME):
                await peer.send(Records(runner.records[begin : begin + RECORDS_A_FRAME]))
            await peer.send(Done(runner.health(plan.index)))
        finally:
            await runner.close()
    except (ConfigError, ConnectionError) as error:
        await peer.send(Failed(str(error), is_connection=isinstance(error, ConnectionError)))


async def _run(peer: Peer[FromLeader], runner: Runner) -> None:
    begin = await peer.receive()
    if not isinstance(begin, Begin):
        raise LinkError(f"the leader sent {type(begin).__name__} instead of Begin")
    stop = asyncio.Event()
    running = asyncio.create_task(runner.run(time.monotonic() + begin.after_s, stop))
    orders = asyncio.create_task(_await_halt(peer))
    progress = asyncio.create_task(_tell(peer, runner))
    try:
        await asyncio.wait({running, orders}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            stop.set()
        if orders.done():
            orders.result()  # raises LinkError when the leader is gone
        await running
    finally:
        running.cancel()
        for task in (orders, progress):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, LinkError):
                await task


async def _await_halt(peer: Peer[FromLeader]) -> None:
    while not isinstance(await peer.receive(), Halt):
        pass


async def _tell(peer: Peer[FromLeader], runner: Runner) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        tenants = [
            [source.counts.sent, *(source.counts.outcomes[name] for name in _ORDER), source.counts.output_tokens]
            for source in runner.sources
        ]
        ttfts_s, runner.recent_ttfts_s = runner.recent_ttfts_s, []
        await peer.send(Progress(tenants, ttfts_s, runner.health(0).max_lag_s, time.process_time()))


async def run_sender(host: str, port: int, secret: bytes, tls: ClientTls | None, *, owns_targets: bool) -> None:
    """Join a load test and do this process's part of every run, until the leader goes away. Raises LinkError where that is before
    the first run."""
    peer = await join(host, port, secret)
    try:
        try:
            plan = await peer.receive()
        except LinkError as error:
            raise LinkError(
                f"the load test at {host}:{port} has all processes that it waits for, or it ended before it began"
            ) from error
        with contextlib.suppress(LinkError):  # the leader is gone, and nobody is left to tell
            while True:
                if isinstance(plan, Plan):  # an order to halt may come after its run has ended
                    await _one_run(peer, plan, tls, owns_targets=owns_targets)
                plan = await peer.receive()
    finally:
        peer.close()


def command(host: str, port: int, tls: ClientTls | None, *, owns_targets: bool) -> list[str]:
    """That starts a sender. The secret goes by its environment."""
    files = [] if tls is None else [str(file or "") for file in (tls.ca, tls.certificate, tls.private_key)]
    flags = ["owned" if owns_targets else "", "" if tls is None else "tls"]
    return module_command("bench.loadtest.sender", host, str(port), *flags, *files)


def join_with(
    host: str, port: int, secret: str, tls: ClientTls | None, num_processes: int, *, owns_targets: bool
) -> int:
    """Senders for a test that is led elsewhere, until it is over. The status: 0 when all could join. Raises ConfigError."""
    if not secret:
        raise ConfigError(f"${LOAD_SECRET_VARIABLE} is not set; it must be that of the machine that leads")

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, leave)
    parts = [
        subprocess.Popen(
            command(host, port, tls, owns_targets=owns_targets), stdin=subprocess.DEVNULL, process_group=SENDERS_GROUP
        )
        for _ in range(num_processes)
    ]
    try:
        return max(part.wait() for part in parts)
    except KeyboardInterrupt:
        return 130
    finally:
        for part in parts:
            part.kill()
            part.wait()


def main() -> None:
    """host port owns tls [ca cert key]; "" for a file that is not there."""
    host, port, owns, use_tls, *files = sys.argv[1:]
    tls = ClientTls(*(Path(name) if name else None for name in files)) if use_tls == "tls" else None
    part = run_sender(host, int(port), load_test_secret().encode(), tls, owns_targets=owns == "owned")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
            loop.run(part)
    except LinkError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
