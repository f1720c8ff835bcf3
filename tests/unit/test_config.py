"""The configuration: what is refused, and that the documentation names every key."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from model_parallel.errors import ConfigError
from serving import config as config_module
from serving.config import ServingConfig, load_config, parse_config

ROOT = Path(__file__).parents[2]
MODEL = {"name": "m", "source": "s"}


def _error(data: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(data, origin="test")
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (
            {"models": [{**MODEL, "tensor_parallel_sise": 2}]},
            ["models.0.tensor_parallel_sise", "'tensor_parallel_size'"],
        ),
        ({"models": [MODEL], "gatway": {}}, ["gatway", "'gateway'"]),
        ({"models": [MODEL], "gateway": {"prot": 1}}, ["gateway.prot", "'port'"]),
        ({"models": [MODEL], "limits": {"zzz": 1}}, ["limits.zzz", "max_choices"]),
        ({"models": []}, ["models", "at least 1"]),
        ({}, ["models", "required"]),
        ({"models": [{**MODEL, "tensor_parallel_size": 0}]}, ["models.0.tensor_parallel_size", "0"]),
        ({"models": [{**MODEL, "dtype": "int4"}]}, ["models.0.dtype", "int4", "bfloat16"]),
        ({"models": [MODEL, MODEL]}, ["'m'", "2 times"]),
        ({"models": [MODEL], "gateway": {"port": 70000}}, ["gateway.port", "70000", "65535"]),
        ({"models": [{**MODEL, "autoscaling": {}}]}, ["models.0.autoscaling.max_groups", "required"]),
        (
            {"models": [{**MODEL, "autoscaling": {"max_groups": 2, "mode": "of"}}]},
            ["models.0.autoscaling.mode", "'off'"],
        ),
        (
            {"models": [{**MODEL, "autoscaling": {"max_groups": 2, "min_groups": 3}}]},
            ["min_groups is 3", "max_groups 2"],
        ),
        (
            {"models": [{**MODEL, "num_groups": 5, "autoscaling": {"max_groups": 2}}]},
            ["num_groups is 5", "max_groups 2"],
        ),
        ({"models": [{**MODEL, "chat": {"format": "jinja"}}]}, ["models.0.chat.format", "jinja", "llama-2"]),
    ],
)
def test_what_is_wrong_is_named(data: dict[str, object], parts: list[str]) -> None:
    message = _error(data)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "mode", "most"),
    [("off", "off", 1), ("on", "on", 3), ("'on'", "on", 3), ("advise", "advise", 1)],
)
def test_off_and_on_may_be_written_without_quotes(text: str, mode: str, most: int, tmp_path: Path) -> None:
    """YAML 1.1 reads them as false and true."""
    file = tmp_path / "packtrain.yaml"
    file.write_text(f"models: [{{name: m, source: s, autoscaling: {{mode: {text}, max_groups: 3}}}}]")
    (entry,) = load_config(file).models
    assert entry.autoscaling is not None
    assert (entry.autoscaling.mode, entry.most_groups) == (mode, most)


def test_one_mistake_is_one_message() -> None:
    assert ";" not in _error({"models": [{"name": "m", "source": "s", "tensor_parallel_size": -1}]})


@pytest.mark.parametrize("text", ["", "- a", "models: [", "3", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "packtrain.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(file))):
        load_config(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_the_example_is_valid() -> None:
    assert [entry.name for entry in load_config(ROOT / "examples/two-models.yaml").models] == ["small", "small-exact"]


def test_every_key_is_documented() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    sections = [s for s in vars(config_module).values() if isinstance(s, type) and issubclass(s, BaseModel)]
    keys = {key for section in sections if section is not ServingConfig for key in section.model_fields}
    assert sorted(key for key in keys if f"`{key}" not in page and f"{key}`" not in page) == []
