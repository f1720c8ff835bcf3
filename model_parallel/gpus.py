"""Which GPUs this process may use, asked of the driver's own command: importing torch for it would take seconds."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from model_parallel.errors import ConfigError

_FIELDS = ("index", "uuid", "name", "memory.total", "memory.free", "compute_cap")
_COMMAND = ("nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits")
_LINE = re.compile(r"(\d+), *(\S+), *(.+), *(\d+), *(\d+), *(\d+)\.(\d+)")
OLDEST_WITH_FP8 = (8, 9)
"""Compute capability: Ada, the first that multiplies e4m3 numbers."""
_TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One device, as the driver tells of it."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    """Compute capability."""


def check_multiplies_fp8(
    setting: str, device: str, capability: tuple[int, int] | None, *, instead: str = "int8"
) -> None:
    """Raise ConfigError where `setting` is fp8 and the device, or kind of device, does not compute with e4m3 numbers.

    `capability`: None of what is no GPU. `instead`: another value of the setting.
    """
    if capability is None or capability < OLDEST_WITH_FP8:
        has = "" if capability is None else f", which has {'.'.join(map(str, capability))}"
        raise ConfigError(
            f"{setting} is fp8, which needs GPUs of compute capability {'.'.join(map(str, OLDEST_WITH_FP8))} or newer, and the "
            f"device is {device}{has}; use {instead}"
        )


def _run(command: tuple[str, ...]) -> str:
    """ "" when the command is not there or fails: then there is no GPU that could be used."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def visible_gpus(
    environment: Mapping[str, str] = os.environ, run: Callable[[tuple[str, ...]], str] = _run
) -> tuple[Gpu, ...]:
    """Those of this machine that $CUDA_VISIBLE_DEVICES does not hide, in its order."""
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None and not wanted.strip():
        return ()
    by_name: dict[str, Gpu] = {}
    for line in run(_COMMAND).splitlines():
        if match := _LINE.fullmatch(line.strip()):
            index, uuid, name, total, free, major, minor = match.groups()
            gpu = Gpu(
                index=int(index),
                name=name,
                total_bytes=int(total) << 20,
                free_bytes=int(free) << 20,
                capability=(int(major), int(minor)),
            )
            by_name[index] = by_name[uuid] = gpu
    if wanted is None:
        return tuple(dict.fromkeys(by_name.values()))
    found = []
    for name in (part.strip() for part in wanted.split(",")):
        # As CUDA has it: a shortened UUID will do, and what is unknown hides everything after it.
        matches = [gpu for known, gpu in by_name.items() if known == name or (len(name) > 4 and known.startswith(name))]
        if not matches:
            break
        found.append(matches[0])
    return tuple(found)


def torch_has_cuda() -> bool:
    """Whether the torch that is installed was built for CUDA, read without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^cuda(?::[^=]*)? *= *['\"]", text, re.MULTILINE) is not None
