"""What is called as `python -m bench.NAME`."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STARTED_BY_OTHERS = {
    "bench.loadtest.sender", "bench.peers.run_vllm", "bench.peers.run_vllm_bench", "bench.peers.run_transformers",
    "bench.peers.run_llama_cpp", "bench.peers.convert_gguf", "bench.peers.convert_huggingface",
}  # fmt: skip
"""With arguments by their places, some in environments of their own."""
DOORS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "bench").rglob("*.py")
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", [name for name in DOORS if name not in STARTED_BY_OTHERS])
def test_help_is_given_and_nothing_is_done(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    door = importlib.import_module(name)
    for arguments, status, stream in ((["--help"], 0, "out"), (["--what-nobody-knows"], 2, "err")):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as ended:
            door.main()
        assert ended.value.code == status
        assert "usage:" in getattr(capsys.readouterr(), stream)


def test_there_are_doors_and_none_is_excused_that_is_not_there() -> None:
    assert len(DOORS) > 30 and set(DOORS) >= STARTED_BY_OTHERS
