"""The rules of changing what is served."""

import json

import pytest

from bench.support.fake_backend import card
from model_parallel.errors import ConfigError
from serving.config import ModelEntry, ServingConfig, parse_config
from serving.driver.applications import rollout_share
from serving.driver.changes import (
    check_max_unavailable,
    check_same_files,
    difference,
    entry_of,
    entry_text,
    parse_entry,
    rollout,
    scaled,
    with_models,
    with_sizes_kept,
)


def running(*entries: dict[str, object]) -> ServingConfig:
    models = [{"name": "a", "source": "/a"}, *entries]
    return parse_config({"models": models, "limits": {"max_choices": 3}}, origin="test")


def entry(**fields: object) -> ModelEntry:
    return running({"name": "m", "source": "/m", **fields}).models[1]


@pytest.mark.parametrize(
    "text", ["name: b\nsource: /b\nnum_groups: 2\n", '{"name": "b", "source": "/b", "num_groups": 2}']
)
def test_an_entry_is_yaml_or_json(text: str) -> None:
    assert parse_entry(text, running(), "the model") == ModelEntry(name="b", source="/b", num_groups=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "not valid YAML"),
        ("a", "must be one entry of models"),
        ("{}", "name: Field required"),
        ("{name: b, source: /b, tensor_parralel_size: 2}", "did you mean 'tensor_parallel_size'"),
        ("{name: b, source: /b, dtype: bf16}", "did you mean 'bfloat16'"),
        ("{name: b, source: /b, num_groups: 0}", "greater than or equal to 1 (got 0)"),
        ("{name: 7, source: /b}", "models.0.name"),
    ],
)
def test_what_is_wrong_with_an_entry_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_entry(text, running(), "the model")
    assert str(caught.value).startswith("the model")
    assert said in str(caught.value)


def test_an_entry_takes_the_place_of_one_of_its_name() -> None:
    assert parse_entry("{name: a, source: /a, block_size: 32}", running(), "the model").block_size == 32


def test_the_last_model_cannot_go() -> None:
    with pytest.raises(ConfigError, match="models"):
        with_models(running(), [], "what is served")
    assert with_models(running(), [entry()], "what is served").limits.max_choices == 3


def test_entries_survive_being_written_down() -> None:
    given = entry(autoscaling={"max_groups": 3}, chat={"format": "llama-2"})
    assert entry_of(entry_text(given)) == given
    assert json.loads(entry_text(given)).keys() == {"name", "source", "autoscaling", "chat"}, (
        "what is unset stays unset"
    )


@pytest.mark.parametrize(
    ("fields", "replaces"),
    [
        ({}, False),
        ({"block_size": 16}, False),  # the default, written out
        ({"num_groups": 2}, False),
        ({"autoscaling": {"max_groups": 2}}, False),
        ({"chat": {"format": "llama-2"}}, False),
        ({"allow_parse_special": True, "generation_config": "none"}, False),
        ({"max_num_seqs": 8}, True),
        ({"num_groups": 2, "dtype": "float32"}, True),
    ],
)
def test_groups_are_replaced_for_what_they_are_made_of_alone(fields: dict[str, object], replaces: bool) -> None:
    assert difference(entry(), entry(**fields)).replaces_groups is replaces


def test_every_field_but_a_few_replaces_groups() -> None:
    """A field that is added later is one that groups are made of, unless somebody says otherwise."""
    stays = {"name", "source", "num_groups", "autoscaling", "chat", "generation_config", "allow_parse_special"}
    other = {"name": "z", "source": "/z", "chat": {"format": "llama-2"}, "autoscaling": {"max_groups": 2}}
    base = entry()
    for field, about in ModelEntry.model_fields.items():
        value = other.get(field, f"not {about.default}")
        found = difference(base, base.model_copy(update={field: value}))
        assert found.fields.keys() == {field}
        assert found.replaces_groups is (field not in stays) or field == "name"


def test_a_difference_is_told_by_its_values() -> None:
    found = difference(entry(max_num_seqs=4), entry(kv_cache_tokens=512))
    assert str(found) == "kv_cache_tokens: unset → 512, max_num_seqs: 4 → unset"


def test_sizes_that_were_left_to_us_stay_as_they_were_chosen() -> None:
    before = entry(dtype="float32")
    chosen = before.model_copy(update={"device": "cpu", "threads_per_rank": 2, "kv_cache_tokens": 4096})
    kept = with_sizes_kept(entry(max_num_seqs=8, dtype="bfloat16"), before, chosen)
    assert (kept.device, kept.threads_per_rank, kept.kv_cache_tokens) == ("cpu", 2, 4096)
    assert (kept.dtype, kept.max_num_seqs) == ("bfloat16", 8)
    assert with_sizes_kept(entry(kv_cache_tokens=64), before, chosen).kv_cache_tokens == 64
    assert with_sizes_kept(entry(), entry(kv_cache_tokens=64), chosen).kv_cache_tokens is None, "chosen anew"


def test_a_running_model_keeps_its_files() -> None:
    one = card("m")
    check_same_files(one, one)
    with pytest.raises(ConfigError, match=r"models\.m\.source is /other .* another name"):
        check_same_files(one, card("m", source="/other"))


def test_numbers_of_groups() -> None:
    assert scaled(entry(), num_groups=3)["num_groups"] == 3
    follows = entry(num_groups=2, autoscaling={"min_groups": 1, "max_groups": 4})
    found = scaled(follows, min_groups=3)
    assert (found["autoscaling"], found["num_groups"]) == ({"min_groups": 3, "max_groups": 4}, 3)
    found = scaled(follows, max_groups=1)
    assert (found["autoscaling"]["max_groups"], found["num_groups"]) == (1, 1)
    assert scaled(entry(autoscaling={"mode": "advise", "max_groups": 4}), num_groups=2)["num_groups"] == 2


@pytest.mark.parametrize(
    ("fields", "numbers", "said"),
    [
        ({}, {}, "is missing"),
        ({}, {"min_groups": 1}, "no autoscaling"),
        ({}, {"num_groups": 1, "max_groups": 1}, "either"),
        ({"autoscaling": {"max_groups": 2}}, {"num_groups": 1}, "the autoscaler decides"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(fields: dict[str, object], numbers: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        scaled(entry(**fields), **numbers)


@pytest.mark.parametrize(
    ("most", "num_groups", "is_good"), [(1, 1, True), (1, 8, True), (7, 8, True), (8, 8, False), (0, 2, False)]
)
def test_some_group_always_stays(most: int, num_groups: int, is_good: bool) -> None:
    if is_good:
        return check_max_unavailable(most, num_groups)
    with pytest.raises(ConfigError, match="may be replaced at a time"):
        check_max_unavailable(most, num_groups)


def test_serve_takes_as_many_at_a_time_as_it_is_told() -> None:
    for num_groups in range(1, 200):
        for most in range(1, num_groups + 1):
            share = rollout_share(most, num_groups)
            assert 0 < share <= 1
            assert max(int(share * num_groups), 1) == most  # what Serve computes


def test_a_rollout_is_over_when_no_old_group_is_left() -> None:
    old = frozenset({"a", "b"})
    story = [
        ({"a": "RUNNING", "b": "RUNNING"}, "0 of 2 groups replaced"),
        ({"a": "STOPPING", "b": "RUNNING"}, "0 of 2 groups replaced, 1 draining"),
        ({"a": "STOPPING", "b": "RUNNING", "c": "STARTING"}, "0 of 2 groups replaced, 1 draining, 1 starting"),
        ({"b": "RUNNING", "c": "RUNNING"}, "1 of 2 groups replaced"),
        ({"b": "STOPPING", "c": "RUNNING"}, "1 of 2 groups replaced, 1 draining"),
        ({"c": "RUNNING", "d": "STARTING"}, "1 of 2 groups replaced, 1 starting"),
    ]
    for states, said in story:
        state = rollout(old, states, 2)
        assert (state.told("replaced"), state.is_over) == (said, False)
    assert rollout(old, {"c": "RUNNING", "d": "RUNNING"}, 2).is_over
    assert not rollout(old, {"c": "RUNNING"}, 2).is_over, "one is missing still"
    assert rollout(old, {"c": "RUNNING"}, 1).is_over, "the autoscaler wants one now"
