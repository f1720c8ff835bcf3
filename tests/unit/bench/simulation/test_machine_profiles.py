import json
from pathlib import Path

import pytest

from bench.simulation.profiles import (
    DerivedFile,
    HardwareFile,
    StepsFile,
    fit_errors,
    hardware,
    machine_for,
    read_profile,
    shipped_profiles,
)
from model_parallel.errors import ConfigError
from serving.models.known_llama import LLAMA_2

PUBLISHED = [
    # gpt-fast on A100-80G, one sequence, tokens a second (pytorch.org, "Accelerating generative AI with PyTorch II")
    ("7b", 1, "", 104.9), ("7b", 2, "", 169.0), ("7b", 4, "", 254.0), ("7b", 8, "", 328.0), ("70b", 8, "", 62.5),
    ("7b", 1, "int8", 155.6), ("70b", 8, "int8", 80.0),
]  # fmt: skip


def test_every_shipped_profile_says_where_its_figures_are_from() -> None:
    for name in shipped_profiles():
        file = read_profile(name)
        assert file.origin
        if isinstance(file, DerivedFile):
            assert file.origin.startswith("derived, nothing was timed")
    assert {"h200", "a100-80g", "h100"} <= set(shipped_profiles())


def test_the_roofline_of_the_timed_gpu_is_close_to_its_steps() -> None:
    errors = fit_errors("h200")
    assert max(abs(ratio - 1) for _, ratio in errors["bfloat16"]) < 0.05
    assert max(abs(ratio - 1) for _, ratio in errors["int8"]) < 0.20


@pytest.mark.parametrize(("size", "tp_size", "quantization", "tokens_per_s"), PUBLISHED)
def test_the_derived_gpu_is_close_to_published_speeds(
    size: str, tp_size: int, quantization: str, tokens_per_s: float
) -> None:
    machine = machine_for("a100-80g", "", LLAMA_2[size], tp_size, dtype="bfloat16", quantization=quantization)
    step_s = machine.cost.tokens_s(1) + machine.cost.row_s + machine.cost.context_s * 200
    assert 1 / step_s == pytest.approx(tokens_per_s, rel=0.07)
    assert not machine.is_measured


def test_more_ranks_are_faster_and_less_than_in_proportion() -> None:
    times = [
        machine_for("h100", "", LLAMA_2["70b"], tp_size, dtype="bfloat16", quantization="").cost.tokens_s(1)
        for tp_size in (2, 4, 8)
    ]
    assert times[0] > times[1] > times[2] > times[0] / 4


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile is 'b200'.*shipped: .*a100-80g"):
        read_profile("b200")
    with pytest.raises(ConfigError, match="nothing is known of float32"):
        machine_for("h200", "", LLAMA_2["7b"], 1, dtype="float32", quantization="")
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"kind": "steps", "origin": 3}')
    with pytest.raises(ConfigError, match="is not a profile"):
        read_profile(str(wrong))
    wrong.write_text("not json")
    with pytest.raises(ConfigError, match="is not a profile"):
        read_profile(str(wrong))
    data = json.loads((Path(fit_errors.__code__.co_filename).parent / "profiles" / "h100.json").read_text())
    wrong.write_text(json.dumps(data | {"device": "b200"}))
    with pytest.raises(ConfigError, match="device is 'b200'"):
        hardware(str(wrong))


def test_a_fitted_profile_is_of_one_shape(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps({
            "kind": "steps", "origin": "a test", "model": "mine", "tensor_parallel_size": 2, "dtype": "bfloat16",
            "quantization": "", "max_position": 2048, "knots": [[1, 0.01], [64, 0.02]], "row_s": 0, "context_s": 0,
            "pair_s": 0, "empty_s": 0, "num_steps": 99, "median_error": 0.01, "p90_error": 0.02,
        })
    )  # fmt: skip
    assert isinstance(read_profile(str(path)), StepsFile)
    machine = machine_for(str(path), "mine", None, 2, dtype="bfloat16", quantization="")
    assert machine.is_measured
    assert machine.cost.tokens_s(64) == 0.02
    with pytest.raises(ConfigError, match="fitted to mine, TP=2, bfloat16, and mine, TP=1, bfloat16"):
        machine_for(str(path), "mine", None, 1, dtype="bfloat16", quantization="")


def test_a_gpu_profile_needs_a_model() -> None:
    assert isinstance(read_profile("h200"), HardwareFile)
    with pytest.raises(ConfigError, match="needs the sizes of a model"):
        machine_for("h200", "", None, 1, dtype="bfloat16", quantization="")
