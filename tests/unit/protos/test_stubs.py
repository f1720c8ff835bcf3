import itertools
import re
import shutil
from pathlib import Path

import pytest

from protos import generate, inference_pb2
from serving.contracts.models import ModelCard


def test_the_committed_stubs_are_fresh() -> None:
    assert generate.main(["--check"]) == 0


def test_a_stale_or_missing_stub_is_named(tmp_path: Path) -> None:
    for name in generate.STUBS:
        shutil.copy(generate.ROOT / "protos" / name, tmp_path)
    assert generate.stale_stubs(tmp_path) == []
    (tmp_path / "inference_pb2.pyi").write_text("old")
    (tmp_path / "inference_pb2_grpc.py").unlink()
    (tmp_path / "admin_pb2.py").unlink()
    assert generate.stale_stubs(tmp_path) == ["admin_pb2.py", "inference_pb2.pyi", "inference_pb2_grpc.py"]


def test_check_fails_with_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(generate, "stale_stubs", lambda committed: ["inference_pb2.py"])
    assert generate.main(["--check"]) == 1
    assert "python -m protos.generate" in capsys.readouterr().err


@pytest.mark.parametrize("proto", generate.PROTOS)
def test_every_field_value_and_method_has_a_comment(proto: str) -> None:
    lines = (generate.ROOT / "protos" / f"{proto}.proto").read_text().splitlines()
    declares = re.compile(r"^\s*(rpc |message |service |enum |((optional|repeated) )?[\w.<>, ]+ = \d+;)")
    bare = [
        line.strip()
        for previous, line in itertools.pairwise(lines)
        if declares.match(line) and not previous.strip().startswith("//")
    ]
    assert bare == []


def test_enum_values_are_prefixed() -> None:
    assert list(inference_pb2.FinishReason.keys()) == [
        "FINISH_REASON_UNSPECIFIED",
        "FINISH_REASON_STOP",
        "FINISH_REASON_LENGTH",
    ]


def test_the_card_on_the_wire_has_all_but_where_the_weights_lie_and_how_chats_are_written() -> None:
    wire = {field.name for field in inference_pb2.ModelCard.DESCRIPTOR.fields}
    assert wire == set(ModelCard.__struct_fields__) - {"source", "checkpoint", "weights", "chat", "adapter", "tenants"}
