"""`packtrain inspect` and `packtrain plan`, and the licence that both and the model cards name."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from rich.console import Console
from typer.testing import CliRunner

from bench.support.synthetic_llama import twin
from model_parallel.checkpoint.detect import describe
from model_parallel.errors import CheckpointError, ConfigError
from serving.cli import inspect, plan, terminal
from serving.models.known_llama import KNOWN_CONFIGS, known_config
from serving.models.licence import LLAMA_2_LICENCE, licence_of
from tests.support.quantized_llama import in_fp8, quantize_checkpoint_to_fp8
from tests.support.ranks import save_random_llama


def run(*arguments: object) -> tuple[int, str]:
    app = typer.Typer()
    plan.register(app)
    inspect.register(app)
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def run_json(*arguments: object) -> tuple[int, dict[str, Any]]:
    status, text = run(*arguments, "--json")
    data: dict[str, Any] = json.loads(text)
    return status, data


def test_plan_for_70b_without_weights() -> None:
    status, data = run_json("plan", "--model", "llama-2-70b-chat", "--tp", 8, "--gpu", "a100-80g")
    assert (status, data["fits"], data["parameters"]) == (0, True, 68_976_648_192)
    assert data["kv_bytes_per_token"] == 327_680
    assert [rank["kv_heads"] for rank in data["ranks"]] == [[i, i] for i in range(8)]
    assert data["ranks"][7]["query_heads"] == [56, 63]
    assert (data["smallest_tp_on_this_gpu"], data["smallest_gpu_at_this_tp"]) == (2, "a100-40g")
    assert 0 < data["decode_floor_s"] < data["decode_floor_largest_batch_s"]


def test_plan_takes_steps_as_large_as_serve_makes_them() -> None:
    numbers = ("--memory-gib", 80, "--bandwidth", 2000)
    for flags, sizes in (
        (("--gpu", "a100-80g"), (256, 2048)),
        (("--gpu", "a100-80g", "--max-num-batched-tokens", 100), (100, 100)),
        (numbers, (64, 512)),
    ):
        _, data = run_json("plan", "--model", "llama-2-7b", *flags)
        assert (data["max_num_seqs"], data["max_num_batched_tokens"]) == sizes
        assert f"{sizes[0]} sequences, {sizes[1]:,} tokens" in run("plan", "--model", "llama-2-7b", *flags)[1]


def test_plan_says_what_would_fit() -> None:
    status, data = run_json("plan", "--model", "meta-llama/Llama-2-70b-hf", "--gpu", "H100")
    assert (status, data["fits"], data["kv_tokens"]) == (1, False, 0)
    assert (data["smallest_tp_on_this_gpu"], data["smallest_gpu_at_this_tp"]) == (2, None)
    status, text = run("plan", "--model", "llama-2-70b", "--gpu", "h100")
    assert status == 1
    assert "smallest TP on h100" in text


def test_plan_for_given_numbers_and_a_directory(tmp_path: Path) -> None:
    path = twin("7b").write(tmp_path / "llama-2-7b", "meta")
    flags = ("--memory-gib", 0.5, "--bandwidth", 20, "--dtype", "float32", "--context", 64, "--max-num-seqs", 2)
    status, data = run_json("plan", "--model", path, "--tp", 3, *flags)
    assert (status, data["gpu"], data["max_model_len"]) == (0, "given", 64)
    assert data["kv_tokens"] == min(rank["kv_tokens"] for rank in data["ranks"])
    status, text = run("plan", "--model", path, "--tp", 3, *flags)
    assert "0-10" in text
    assert "tokens/s" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "llama-2-80b", "--gpu", "h100"], "did you mean 'llama-2-70b'"),
        (["--model", "llama-2-7b"], "--gpu, or both"),
        (["--model", "llama-2-7b", "--memory-gib", 10], "--gpu, or both"),
        (["--model", "llama-2-7b", "--gpu", "v100"], "gpu is 'v100'; known: a100-40g"),
        (["--model", "llama-2-7b", "--gpu", "h100", "--dtype", "int8"], "dtype is 'int8'"),
        (
            ["--model", "llama-2-7b", "--gpu", "h100", "--quantization", "int4"],
            "is 'int4'; allowed: int8, packed, fp8, none",
        ),
        (
            ["--model", "llama-2-7b", "--gpu", "a100-80g", "--quantization", "fp8"],
            "is fp8, .* the device is a100-80g, which has 8.0; use int8",
        ),
        (
            ["--model", "llama-2-7b", "--gpu", "a100-80g", "--kv-cache-dtype", "fp8"],
            "kv_cache_dtype is fp8, .* the device is a100-80g, which has 8.0; use auto",
        ),
        (
            ["--model", "llama-2-7b", "--gpu", "h100", "--kv-cache-dtype", "int8"],
            "kv_cache_dtype is 'int8'; allowed: auto",
        ),
        (["--model", "llama-2-7b", "--gpu", "h100", "--context", 5000], "context is 5000"),
        (
            ["--model", "llama-2-7b", "--gpu", "h100", "--max-num-seqs", 20, "--max-num-batched-tokens", 10],
            "max_num_batched_tokens is 10 and max_num_seqs 20",
        ),
        (["--model", "llama-2-7b", "--gpu", "h100", "--tp", 33], "33 and the model has 32 query heads"),
    ],
)
def test_plan_refuses(flags: list[object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run("plan", *flags)


def test_twelve_names_are_known() -> None:
    assert len(KNOWN_CONFIGS) == 12
    assert known_config("meta-llama/Llama-2-13b-chat-hf") is KNOWN_CONFIGS["llama-2-13b"]


def test_plan_in_fp8() -> None:
    """Layers in a byte a weight with a scale a channel; embedding, head and norms in bfloat16."""
    status, data = run_json("plan", "--model", "llama-2-7b", "--gpu", "h100", "--quantization", "fp8")
    channels = 32 * (4 * 4096 + 2 * 11008 + 4096)
    outside = 2 * 32000 * 4096 + (2 * 32 + 1) * 4096
    assert status == 0
    assert data["weight_bytes"] == (data["parameters"] - outside) + 4 * channels + 2 * outside
    large = run_json("plan", "--model", "llama-2-70b", "--tp", 8, "--gpu", "h100", "--quantization", "fp8")[1]
    assert large["smallest_gpu_at_this_tp"] == "h100", "an A100 40 GB would have room, and does not multiply e4m3"


def test_weights_in_fp8_are_told_and_planned_as_such_alone(tmp_path: Path) -> None:
    save_random_llama(tmp_path)
    quantize_checkpoint_to_fp8(tmp_path, in_fp8("channel", "token", ignore=("lm_head", "down_proj")), torch.bfloat16)
    found = inspect.inspect_checkpoint(describe(tmp_path))
    assert (found["fp8_weights"], found["dtypes"]) == (3 * 6, ["F32", "F8_E4M3"])
    console = Console(record=True, width=120)
    inspect.print_inspection(found, console)
    assert "18 matrices, for quantization fp8" in console.export_text()
    _, data = run_json("plan", "--model", tmp_path, "--gpu", "h100", "--quantization", "fp8")
    in_fp8_alone = 3 * (4 * 96 * 96 + 2 * 200 * 96)
    assert data["weight_bytes"] == in_fp8_alone + 4 * 3 * (4 * 96 + 2 * 200) + 2 * (data["parameters"] - in_fp8_alone)
    with pytest.raises(
        ConfigError, match=r"^quantization is none, and the checkpoint's weights are in fp8: set it to fp8"
    ):
        run("plan", "--model", tmp_path, "--gpu", "h100")


def test_plan_with_a_cache_in_fp8() -> None:
    plain, small = (
        run_json("plan", "--model", "llama-2-7b", "--gpu", "h100", "--kv-cache-dtype", kind)[1]
        for kind in ("auto", "fp8")
    )
    assert (plain["kv_cache_dtype"], small["kv_cache_dtype"]) == ("bfloat16", "fp8")
    assert plain["kv_bytes_per_token"] == 2 * small["kv_bytes_per_token"]
    assert small["ranks"][0]["kv_bytes_per_token"] == small["kv_bytes_per_token"]
    assert small["kv_tokens"] // 2 == plain["kv_tokens"]


@pytest.mark.parametrize("form", ["meta", "hf"])
def test_inspect(tmp_path: Path, form: Any) -> None:
    model = twin("70b")
    path = model.write(tmp_path / "llama-2-70b-chat", form)
    status, data = run_json("inspect", path)
    assert status == 0
    assert data["format"] == ("meta" if form == "meta" else "huggingface")
    assert data["dtypes"] == (["bfloat16"] if form == "meta" else ["F16"])
    assert data["parameters"] == sum(model.tensor(name).numel() for name in model.shapes())
    assert (data["query_heads"], data["kv_heads"], data["chat_format"]) == (64, 8, "llama-2")
    assert data["licence"] == "LLAMA 2 Community License"
    assert data["use_policy"] == "https://ai.meta.com/llama/use-policy"
    assert data["tokenizer"] == str(path / "tokenizer.model")
    assert len(data["files"]) == (8 if form == "meta" else 3)
    _, text = run("inspect", path)
    assert f"{data['parameters']:,}" in text
    assert "Copyright (c) Meta Platforms, Inc." in text


def test_packed_weights_are_told_and_planned(smollm2_path: Path) -> None:
    """The file has 96.4 MB of Q4_1 and Q8_0, of which the embedding is the head too, and 0.14 MB of norms in float32."""
    _, found = run_json("inspect", smollm2_path)
    packed = found["packed_weights"]
    assert packed["matrices"] == {"Q4_1, groups of 32": 210, "Q8_0, groups of 32": 1}
    assert packed["bytes"] == 66_355_200 + 30_081_024 + 140_544 // 2
    _, text = run("inspect", smollm2_path)
    assert "96,506,496 bytes" in text and "210 matrices" in text
    status, plan_ = run_json("plan", "--model", smollm2_path, "--gpu", "h100", "--quantization", "packed")
    assert (status, plan_["weight_bytes"]) == (0, packed["bytes"])
    _, dense = run_json("plan", "--model", smollm2_path, "--gpu", "h100")
    assert dense["weight_bytes"] == 2 * dense["parameters"] and dense["kv_tokens"] < plan_["kv_tokens"]
    with pytest.raises(ConfigError, match="llama-2-7b holds no weights that are quantised in groups"):
        run("plan", "--model", "llama-2-7b", "--gpu", "h100", "--quantization", "packed")


def test_a_fetched_model_goes_by_its_name(smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_json("inspect", "smollm2-135m-instruct")[1]["path"] == str(smollm2_path)
    of_name = run_json("plan", "--model", "smollm2-135m-instruct", "--gpu", "h100", "--quantization", "none")
    assert of_name[1] | {"model": ""} == run_json("plan", "--model", smollm2_path, "--gpu", "h100")[1] | {"model": ""}
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path))
    for command in (["inspect"], ["plan", "--gpu", "h100", "--model"]):
        with pytest.raises(ConfigError, match="has not been fetched; run: packtrain fetch smollm2-135m-instruct"):
            run(*command, "smollm2-135m-instruct")


def test_a_home_directory_is_understood_within_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin("7b").write(tmp_path / "model", "hf")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_json("inspect", "~/model")[1]["path"] == str(tmp_path / "model")
    assert run_json("plan", "--gpu", "h100", "--model", "~/model")[0] == 0


def test_a_draft_model_is_planned_on_the_first_rank() -> None:
    model = ["plan", "--model", "llama-2-70b", "--tp", 4, "--gpu", "h100"]
    _, plain = run_json(*model)
    _, with_draft = run_json(*model, "--draft-model", "llama-2-7b")
    assert with_draft["ranks"][1:] == plain["ranks"][1:]
    first, before = with_draft["ranks"][0], plain["ranks"][0]
    assert first["weight_bytes"] - before["weight_bytes"] == 2 * 6_738_415_616
    assert first["kv_bytes_per_token"] - before["kv_bytes_per_token"] == 524_288
    assert "drafts by llama-2-7b" in run(*model, "--draft-model", "llama-2-7b")[1]


def test_brackets_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "my [v2] model[" / "b]"
    save_random_llama(directory, vocab_size=640)
    told = {"licence": "[/b]", "chat_system": "say [ANSWER] and [/ANSWER]"}
    inspect.print_inspection(inspect.inspect_checkpoint(describe(directory)) | told, Console(width=4096))
    shown = capsys.readouterr().out
    assert str(directory) in shown and told["licence"] in shown and told["chat_system"] in shown


def test_texts_of_a_checkpoint_do_not_speak_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_random_llama(tmp_path, vocab_size=640)
    retitle = "\x1b]0;owned\x07\x9b31m\r"
    told = {"licence": retitle, "chat_system": f"a\n{retitle}", "warnings": [retitle], "licence_notice": retitle}
    found = inspect.inspect_checkpoint(describe(tmp_path)) | told
    capsys.readouterr()  # transformers' progress
    inspect.print_inspection(found, terminal.standard_output())
    terminal.warn(retitle)
    with pytest.raises(SystemExit):
        terminal.fail(retitle, 78)
    shown = "".join(capsys.readouterr())
    assert shown.count("\\x1b]0;owned\\x07\\x9b31m") == 6
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(shown)


def test_a_rule_that_nobody_asked_for_refuses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_random_llama(tmp_path, vocab_size=640)
    generation = tmp_path / "generation_config.json"
    generation.write_text('{"do_sample": false, "temperature": 3.0}')
    found = inspect.inspect_checkpoint(describe(tmp_path))
    assert found["default_sampling"]["auto"] == {}
    assert "temperature is 3.0; allowed: from 0 to 2" in found["default_sampling"]["vllm-like"]
    inspect.print_inspection(found, Console(width=4096))
    assert "temperature is 3.0" in capsys.readouterr().out
    generation.write_text('{"do_sample": true, "temperature": 3.0}')
    with pytest.raises(ConfigError, match=r"temperature is 3\.0"):
        inspect.inspect_checkpoint(describe(tmp_path))


@pytest.mark.parametrize("numbers", [(math.inf, 1.0), (1.0, math.inf), (math.nan, 1.0)])
def test_plan_needs_finite_numbers(numbers: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="it must be a finite number"):
        plan.choose_device(None, memory_gib=numbers[0], bandwidth_gb_per_s=numbers[1])


def test_inspect_of_something_broken(tmp_path: Path) -> None:
    path = twin("13b").write(tmp_path / "model", "meta")
    (path / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth"):
        run("inspect", path)


def test_licence_of_llama_2_by_name_or_by_size(tmp_path: Path) -> None:
    info = describe(twin("7b").write(tmp_path / "model", "hf"))
    assert licence_of(info).name == "not stated"
    assert licence_of(replace(info, path=Path("/models/Llama-2-7b-chat-hf"))) == LLAMA_2_LICENCE
    cached = Path("/cache/models--meta-llama--Llama-2-7b/snapshots/0123abc")
    assert licence_of(replace(info, path=cached)) == LLAMA_2_LICENCE
    assert licence_of(replace(info, config=known_config("llama-2-13b"))) == LLAMA_2_LICENCE
    llama_1 = replace(known_config("llama-2-13b"), max_position=2048)
    assert licence_of(replace(info, config=llama_1)).name == "not stated"
    assert licence_of(replace(info, licence="llama2")) == LLAMA_2_LICENCE
    own = replace(info, config=known_config("llama-2-7b"), licence="apache-2.0")
    assert licence_of(own).name == "apache-2.0"


def test_licence_of_the_model_card(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert describe(tmp_path).licence == ""
    (tmp_path / "README.md").write_text("---\nlanguage:\n- en\nlicense: mit\n---\nlicense: none\n")
    assert describe(tmp_path).licence == "mit"
    (tmp_path / "README.md").write_text("# A model\nlicense: none\n")
    assert describe(tmp_path).licence == ""


def test_the_notice_file_has_the_notice() -> None:
    assert LLAMA_2_LICENCE.notice in (Path(__file__).parents[3] / "NOTICE").read_text()
