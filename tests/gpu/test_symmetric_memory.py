"""Sums through symmetric memory. Ranks share one device here, which torch allows when told so; NCCL would not."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

_NO_SYMMETRIC_MEMORY = 3


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_are_added_in_rank_order(size: int, tmp_path: Path) -> None:
    """Both ways of summing, and more than the workspace holds; between 3 ranks torch's kernel is another than between 2 or 4."""
    store = tmp_path / "store"
    command = [sys.executable, "-m", "tests.support.symmetric_rank", str(store), str(size)]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(size)
    ]
    try:
        outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode == _NO_SYMMETRIC_MEMORY for rank in ranks):
        pytest.skip(f"no symmetric memory here: {outputs[0].strip()}")
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(outputs)
