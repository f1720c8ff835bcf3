"""The `packtrain` command, which is also `python -m serving.cli`. Ctrl-C ends it as later while it still imports."""

import os
import sys


def main() -> None:
    """Entry point."""
    if sys.stdout is None:  # closed by who has started us
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        from serving.cli.main import main as command

        command()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
