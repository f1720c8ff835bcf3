"""Sets up the engines that Packtrain is compared with, and says which are there.

python -m bench.peers install [llama] [vllm] [--peers DIR]     environments of 0.3 GB (compiled, 10 minutes) and 3 GB
python -m bench.peers list [--peers DIR]
"""

import argparse
from pathlib import Path

from bench.peers.environments import ENVIRONMENTS, INSTALL_COMMAND, Peers, default_directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("install", "list"))
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ENVIRONMENTS)}; all if none is given")
    parser.add_argument("--peers", type=Path, default=default_directory(), help="where they live")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(ENVIRONMENTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(ENVIRONMENTS)}")
    peers = Peers(arguments.peers)
    if arguments.action == "install":
        peers.install(arguments.names or list(ENVIRONMENTS), print)
    for name, environment in ENVIRONMENTS.items():
        state = "installed" if peers.has(name) else f"not installed; {INSTALL_COMMAND} {name}"
        print(f"{environment.requirement}: {state}")


if __name__ == "__main__":
    main()
