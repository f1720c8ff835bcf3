"""The program that matches regular expressions against names. It is run as a file, so it imports nothing of Packtrain's.

    python -I -S pattern_process.py SECONDS

Reads {"patterns": […], "names": […], "whole": true} from stdin and writes {"matched": […]}, the names that any of them matches,
or {"error": …, "pattern": …} to stdout. Python's
matcher holds the interpreter's lock and can take years for a short expression: the kernel ends the process when it has used
SECONDS of processor time, or when it asks for more memory than it may have.
"""

import json
import re
import resource
import sys

MAX_BYTES = 1 << 30
"""Address space. The interpreter itself takes a few dozen MB."""


def main() -> None:
    """See above."""
    most_s = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CPU, (most_s, most_s))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    asked = json.load(sys.stdin)
    matched: set[str] = set()
    for text in asked["patterns"]:
        try:
            pattern = re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            json.dump({"error": str(error), "pattern": text}, sys.stdout)
            return
        match = pattern.fullmatch if asked["whole"] else pattern.match
        matched.update(name for name in asked["names"] if match(name))
    json.dump({"matched": sorted(matched)}, sys.stdout)


if __name__ == "__main__":
    main()
