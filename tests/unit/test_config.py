"""The configuration: what is refused, and that the documentation names every key."""

import math
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from pydantic import BaseModel
from ray._common import ray_option_utils

from model_parallel.errors import ConfigError
from serving import config as config_module
from serving.config import ServingConfig, load_config, parse_config
from serving.contracts import yaml_files
from serving.contracts.yaml_files import parse_yaml

ROOT = Path(__file__).parents[2]
MODEL = {"name": "m", "source": "s"}


def _error(data: dict[Any, Any]) -> str:
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
        ({"models": [MODEL], "limits": {"max_message_bytes": 1 << 31}}, ["limits.max_message_bytes", "2147483647"]),
        ({"models": [MODEL], "gateway": {"drain_timeout_s": 1e300}}, ["gateway.drain_timeout_s", "2073600", "1e+300"]),
        ({"models": [{**MODEL, "max_waiting_requests": 1 << 31}]}, ["models.0.max_waiting_requests", "1000000"]),
        (
            {"models": [{**MODEL, "autoscaling": {"max_groups": 1, "priority": 1 << 70}}]},
            ["models.0.autoscaling.priority", "1000"],
        ),
        ({"models": [MODEL], "ray": {"address": ""}}, ["ray.address", "at least 1 character"]),
        (
            {"models": [MODEL], "ray": {"address": "auto", "num_cpus": 4}},
            ["num_cpus cannot be set with ray.address", "private cluster"],
        ),
        (
            {"models": [{**MODEL, "max_num_seqs": 1000, "max_num_batched_tokens": 10}]},
            ["models.0: max_num_batched_tokens is 10 and max_num_seqs 1000"],
        ),
        # In the words of YAML, not of Python.
        ({"models": MODEL}, ["models: must be a list (got {'name'"]),
        ({"models": [{**MODEL, "lora": True}]}, ["models.0.lora: must be a mapping (got true)"]),
        ({"models": [MODEL], "gateway": None}, ["gateway: must be a mapping; an empty one is {} (got null)"]),
        ({"models": [{**MODEL, "name": True}]}, ["models.0.name: must be a text, so in quotes (got true)"]),
        ({"models": [{**MODEL, "name": date(2026, 1, 2)}]}, ["must be a text, so in quotes (got 2026-01-02)"]),
        ({"models": [MODEL], "gateway": {"host": ""}}, ["gateway.host: String should have at least 1 character"]),
        ({"models": [MODEL], "gateway": {"resume_key_file": 5}}, ["gateway.resume_key_file: must be a path (got 5)"]),
        ({"models": [MODEL], 1: 2}, ["1: a key must be a text, so in quotes"]),
    ],
)
def test_what_is_wrong_is_named(data: dict[Any, Any], parts: list[str]) -> None:
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


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("1e6", 1e6), ("1E3", 1e3), ("-2.5e+1", -25.0), ("1e-2", 0.01), (".5", 0.5), ("5.", 5.0), ("1_000", 1000), ("0x1F", 31),
        ("0", 0), ("-7", -7), ("+7", 7), (".inf", math.inf), ("-.INF", -math.inf),
        ("010", "010"), ("08", "08"), ("12:30", "12:30"), ("1:2.5", "1:2.5"), ("1e", "1e"), ("e5", "e5"), ("1.2.3", "1.2.3"),
        ("127.0.0.1", "127.0.0.1"), ("-", [None]), (".", "."), ("1e3k", "1e3k"),
    ],
)  # fmt: skip
def test_numbers_are_read_as_yaml_1_2_has_them(text: str, read: object) -> None:
    assert parse_yaml(text, "test") == read


def test_a_whole_number_may_begin_with_zeros_or_have_an_exponent(tmp_path: Path) -> None:
    file = tmp_path / "packtrain.yaml"
    file.write_text("models: [{name: m, source: s, kv_cache_tokens: 1e6, max_num_seqs: 010}]")
    (entry,) = load_config(file).models
    assert (entry.kv_cache_tokens, entry.max_num_seqs) == (1_000_000, 10)


def _numbers(section: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all fields that are numbers."""
    for name, field in section.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)}
        kinds |= {get_args(kind)[0] for kind in kinds if get_origin(kind) is Annotated}
        if kinds & {int, float}:
            yield *path, name
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _numbers(
                    kind, (*path, name, "0") if get_origin(field.annotation) is tuple else (*path, name)
                )


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("path", sorted(_numbers(ServingConfig)), ids=".".join)
def test_a_truth_value_is_no_number(path: tuple[str, ...], value: bool) -> None:
    """`http_port: off` does not mean port 0, nor `max_num_seqs: yes` one sequence."""
    data: dict[Any, Any] = {"models": [dict(MODEL)]}
    section: Any = data
    for name in path[:-1]:
        section = section[0] if name == "0" else section.setdefault(name, {})
    section[path[-1]] = value
    assert re.search(
        rf"{re.escape('.'.join(path))}: .* valid (integer|number).*\(got '{str(value).lower()}'\)", _error(data)
    )


@pytest.mark.parametrize("num_cpus", [0.0, 0.0001, 0.00011, 0.33333, 1.0, 1.5, 0.00009999, 0.00001, 1e-300])
def test_cpus_are_those_that_ray_counts(num_cpus: float) -> None:
    data = {"models": [{**MODEL, "cpus_per_rank": num_cpus}]}
    if ray_option_utils._common_options["num_cpus"].value_constraint(num_cpus) is None:
        assert parse_config(data, origin="test").models[0].cpus_per_rank == num_cpus
    else:
        assert all(part in _error(data) for part in ("models.0.cpus_per_rank", str(num_cpus), "0.0001"))


def test_one_mistake_is_one_message() -> None:
    assert ";" not in _error({"models": [{"name": "m", "source": "s", "tensor_parallel_size": -1}]})


def test_files_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    data = {
        "models": [{**MODEL, "lora": {"adapters": [{"name": "x", "source": "~/x"}]}}],
        "gateway": {
            "resume_key_file": "~/key",
            "tls": {"certificate": "~/c", "private_key": "~no-such-user/k", "client_ca": "~/ca"},
        },
    }
    config = parse_config(data, origin="test")
    assert config.models[0].lora is not None and config.gateway.tls is not None
    assert (
        config.models[0].lora.adapters[0].source == tmp_path / "x"
        and config.gateway.resume_key_file == tmp_path / "key"
    )
    assert config.gateway.tls.certificate == tmp_path / "c" and config.gateway.tls.client_ca == tmp_path / "ca"
    assert config.gateway.tls.private_key == Path("~no-such-user/k"), "opening it tells that it is not there"


@pytest.mark.parametrize("text", ["", "- a", "models: [", "3", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "packtrain.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(file))):
        load_config(file)


BOMB = "a: &a0 [1, 2]\n" + "".join(f"b{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "models:\n- name: a\nmodels:\n- name: b\n",
            "line 3, column 1: the key 'models' stands here for the second time",
        ),
        ("models: [{name: a, name: b}]", "line 1, column 20: the key 'name' stands"),
        ("models: [", "line 1, column 10: while parsing a flow node"),
        ("a: 1\n---\nb: 2", "line 2, column 1: expected a single document"),
        ("a: 2026-13-45", "line 1, column 4: '2026-13-45': month must be in 1..12"),
        ("a: 0x_", "line 1, column 4: '0x_'"),
        ("a: !!int b", "line 1, column 4: 'b'"),
        ("models: !!bool x", "line 1, column 9: 'x': this is no bool"),
        ("models: !!timestamp x", "line 1, column 9: 'x': this is no timestamp"),
        ('models: !!int ""', "line 1, column 9: '': this is no int"),
        ('models: !!float ""', "line 1, column 9: '': this is no float"),
        ("a: !!python/object:os.system b", "line 1, column 4: could not determine a constructor"),
        ("? [a]\n: 1", "line 1, column 3"),
        ("[" * 10_000, "it is nested too deeply"),
        ("a: &a [*a]", "line 1, column 8: this alias stands for something that it is a part of"),
        (BOMB, "there are more than 1000000 values in it"),
        ("a: \x07", "unacceptable character"),
        ('gateway: {host: "a\\0b"}', r"line 1, column 17: 'a\x00b': a text cannot hold the character NUL"),
    ],
)
def test_yaml_that_is_wrong_is_one_line_with_the_place(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "f.yaml")
    message = str(caught.value)
    assert message.startswith("f.yaml is not valid YAML: ")
    assert told in message
    assert "\n" not in message


def test_aliases_and_merged_keys_are_taken() -> None:
    text = "base: &base {a: 1, b: 2}\nx: {<<: *base, b: 3}\ny: [*base, *base]\nz:\n"
    assert parse_yaml(text, "f.yaml") == {
        "base": {"a": 1, "b": 2},
        "x": {"a": 1, "b": 3},
        "y": [{"a": 1, "b": 2}, {"a": 1, "b": 2}],
        "z": None,
    }


def test_a_file_of_another_encoding_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "packtrain.yaml"
    file.write_bytes("models: ä".encode("latin-1"))
    with pytest.raises(ConfigError, match="byte 8 is not UTF-8"):
        load_config(file)


def test_a_file_as_large_as_weights_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`packtrain serve consolidated.00.pth` read all of it, and /dev/zero until memory was full."""
    monkeypatch.setattr(yaml_files, "MAX_FILE_BYTES", 32)
    file = tmp_path / "consolidated.00.pth"
    file.write_bytes(b"models:" + bytes(25))
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(file)
    for path in (tmp_path / "larger", Path("/dev/zero")):
        (tmp_path / "larger").write_bytes(bytes(33))
        with pytest.raises(ConfigError, match=f"{path} has more than 32 bytes, and no YAML file has so many"):
            load_config(path)


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
