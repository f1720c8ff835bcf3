"""What a figure was measured on."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from model_parallel.machine import read_machine
from serving import __version__

GIB = 1 << 30


def machine_facts() -> dict[str, Any]:
    """Date, processor, memory, versions, and how busy the machine was, as plain data."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor_name(Path("/proc/cpuinfo").read_text(encoding="utf-8")),
        "num_cores": read_machine().num_cpus,
        "memory_gib": round(read_machine().total_memory_bytes / GIB),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": version("torch"),
        "packtrain": __version__,
    }


def processor_name(cpuinfo: str) -> str:
    """The model's name, and the widest vector instructions that the kernels know."""
    fields = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in cpuinfo.splitlines()) if value
    }
    flags = fields.get("flags", "").split()
    widest = next((flag for flag in ("avx512_bf16", "avx512f", "avx2") if flag in flags), None)
    name = fields.get("model name", platform.machine())
    return f"{name} ({widest})" if widest else name


def describe_machine(facts: dict[str, Any]) -> str:
    """One line for the head of a table."""
    return (
        f"{facts['date']}, {facts['num_cores']} cores of {facts['processor']}, {facts['memory_gib']} GiB, "
        f"torch {facts['torch']}, load average {facts['load_average']} at the start"
    )
