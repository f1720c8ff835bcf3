"""The documentation's site builds without a warning, and its reference comes from comments and docstrings."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_site_builds_and_holds_the_reference(tmp_path: Path) -> None:
    """Strict: a link to a page or heading that is not there fails it."""
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    inference = (tmp_path / "reference/grpc-inference/index.html").read_text()
    for words in ("GenerateStream", "stop_token_ids", "Answers a prompt as it is made."):
        assert words in inference
    client = (tmp_path / "reference/python/index.html").read_text()
    assert "wait_until_connected" in client and "Time to first token." not in inference
    assert "make demo" in (tmp_path / "index.html").read_text()
    fetched = [page for page in tmp_path.rglob("*.html") if 'src="http' in page.read_text()]
    assert fetched == [], "a page loads something from the network"
