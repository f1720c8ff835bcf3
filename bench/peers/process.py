"""The bench's side of a peer: a process that is stopped (SIGSTOP) whenever it is not being timed."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.peers.environments import ROOT
from bench.timing import ContenderFailedError, Workload

READY_TIMEOUT_S = 600.0
"""vLLM compiles for two minutes."""
RUN_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 15.0
LOG_TAIL = 600
VOCAB_SIZE = 49_152
"""Of the model that all peers run; it decides which token ids prompts are drawn from."""


class PeerProcess:
    """A contender in a process of its own. It starts when it is made, and is stopped between runs."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        max_repeats: int,
    ) -> None:
        """Waits until the engine is ready. Raises ContenderFailedError."""
        self.name = name
        self.max_repeats = max_repeats
        self._log = log
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        began_s = time.perf_counter()
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | dict(environment or {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                # One signal reaches it and what it starts. Of this session: when the bench is killed, the system sends
                # SIGHUP and SIGCONT to a group of it that is left stopped.
                process_group=0,
            )
        self._reader = threading.Thread(target=self._read, name=f"bench-{name}", daemon=True)
        self._reader.start()
        try:
            self.detail = str(self._answer(READY_TIMEOUT_S)["detail"])
        except BaseException:  # a signal may end the bench while this one still starts
            self.close()
            raise
        self.ready_s = time.perf_counter() - began_s
        self._signal(signal.SIGSTOP)

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, workload: Workload, seed: int) -> float:
        work = {"prompts": workload.prompts(VOCAB_SIZE, seed), "num_new_tokens": workload.num_new_tokens}
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(work) + "\n")
            self._process.stdin.flush()
            took_s = float(self._answer(RUN_TIMEOUT_S)["seconds"])
        except OSError as error:
            raise ContenderFailedError(f"its process has ended: {self._last_words()}") from error
        except ContenderFailedError:
            self._signal(signal.SIGKILL)  # it may still be computing, while others are timed
            raise
        self._signal(signal.SIGSTOP)
        return took_s

    def close(self) -> None:
        """Let it end by itself, and see that it does."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended already
            self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._signal(signal.SIGKILL)
            self._process.wait(STOP_TIMEOUT_S)
            self._reader.join(STOP_TIMEOUT_S)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._answers.put(line)
        self._answers.put(None)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty as error:
            raise ContenderFailedError(f"no answer within {timeout_s:g} s: {self._last_words()}") from error
        if line is None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it tells why after it has closed its standard output
                self._process.wait(STOP_TIMEOUT_S)
            raise ContenderFailedError(f"its process has ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace").strip()[-LOG_TAIL:]
