"""The peers as contenders of one run, and which of them are not there."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from bench.engine_timing import UNLIMITED_REPEATS
from bench.peers.environments import INSTALL_COMMAND, Peers
from bench.peers.process import PeerProcess
from bench.timing import ContenderFailedError

LLAMA_BF16, LLAMA_Q8_0 = "llama.cpp BF16", "llama.cpp Q8_0"
VLLM, TRANSFORMERS = "vLLM-CPU", "transformers generate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """How one peer is started."""

    name: str
    environment: str | None
    """None: it runs in the project's own."""
    arguments: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    max_repeats: int = UNLIMITED_REPEATS


def known_peers(peers: Peers, num_threads: int) -> Iterator[Peer]:
    """All that there are, installed or not."""
    threads = str(num_threads)
    for name, type_name in ((LLAMA_BF16, "bf16"), (LLAMA_Q8_0, "q8_0")):
        model = str(peers.gguf(type_name))
        yield Peer(name=name, environment="llama", arguments=("bench.peers.run_llama_cpp", model, threads))
    yield Peer(
        name=VLLM,
        environment="vllm",
        arguments=("bench.peers.run_vllm", str(peers.huggingface)),
        variables={
            # Without the first two it leaves a core idle.
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CACHE_ROOT": str(peers.directory / "cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        },
    )
    yield Peer(
        name=TRANSFORMERS,
        environment=None,
        arguments=("bench.peers.run_transformers", str(peers.huggingface), threads),
        max_repeats=1,  # it takes as long as all others together, and nothing is held against it
    )


def start_peers(
    peers: Peers, num_threads: int, wanted: Callable[[str], bool], report: Callable[[str], None]
) -> tuple[list[PeerProcess], dict[str, str]]:
    """Those that are wanted and installed, ready; and by name why the others are not there."""
    started: list[PeerProcess] = []
    missing: dict[str, str] = {}
    try:
        for peer in known_peers(peers, num_threads):
            if not wanted(peer.name):
                missing[peer.name] = "not asked for"
            elif not (peers.huggingface.exists() and (peer.environment is None or peers.has(peer.environment))):
                missing[peer.name] = f"not installed ({INSTALL_COMMAND})"
            else:
                try:
                    started.append(_start(peer, peers))
                except ContenderFailedError as error:
                    missing[peer.name] = f"did not start: {error}"
            report(f"{peer.name}: {missing[peer.name]}" if peer.name in missing else _ready(started[-1]))
    except BaseException:
        for process in started:
            process.close()
        raise
    return started, missing


def _start(peer: Peer, peers: Peers) -> PeerProcess:
    python = sys.executable if peer.environment is None else str(peers.python(peer.environment))
    return PeerProcess(
        peer.name,
        [python, "-m", *peer.arguments],
        log=peers.directory / f"{peer.name.replace(' ', '-')}.log",
        environment=peer.variables,
        max_repeats=peer.max_repeats,
    )


def _ready(process: PeerProcess) -> str:
    return f"{process.name}: ready after {process.ready_s:.1f} s ({process.detail})"
