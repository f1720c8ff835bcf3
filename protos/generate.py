"""Make the stubs of the protos: `python -m protos.generate`; `--check` only tells whether they are fresh."""

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ("admin", "inference")
STUBS = tuple(f"{proto}{suffix}" for proto in PROTOS for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"))


def generate(out: Path) -> None:
    """Write the stubs to `out`/protos. Raises RuntimeError when protoc refuses the source (it explains on stderr)."""
    well_known = files("grpc_tools") / "_proto"
    plugins = [f"--{plugin}={out}" for plugin in ("python_out", "pyi_out", "grpc_python_out")]
    sources = [f"protos/{proto}.proto" for proto in PROTOS]
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *plugins, *sources]) != 0:
        raise RuntimeError(f"protoc refused {' or '.join(sources)}")


def stale_stubs(committed: Path) -> list[str]:
    """Names of the stubs in the directory `committed` that differ from freshly made ones, or are missing."""
    with tempfile.TemporaryDirectory() as fresh:
        generate(Path(fresh))
        return [
            name
            for name in STUBS
            if not (committed / name).exists()
            or (committed / name).read_bytes() != (Path(fresh, "protos", name)).read_bytes()
        ]


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 when --check finds stale stubs."""
    parser = argparse.ArgumentParser(prog="python -m protos.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a committed stub is stale")
    if not parser.parse_args(arguments).check:
        generate(ROOT)
        return 0
    if stale := stale_stubs(ROOT / "protos"):
        print(
            f"stale: {', '.join(stale)} in protos/. Run `python -m protos.generate` and commit the result.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
