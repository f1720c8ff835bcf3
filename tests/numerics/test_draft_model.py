"""Answers with a draft model: every bit that of the answer without one, however good it is and however the engine computes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from model_parallel.checkpoint.adapter_files import adapter_bytes, describe_adapter
from model_parallel.checkpoint.detect import describe
from model_parallel.config import AdapterConfig, DraftConfig, TokenTable
from model_parallel.engine.request import AdapterRef, EngineRequest, FinishReason, SamplingParams
from model_parallel.errors import ConfigError
from tests.numerics.test_speculation import SAMPLINGS, VOCAB_SIZE, make, prompts, told
from tests.support.adapters import save_random_adapter
from tests.support.drafts import AskingDrafter
from tests.support.effort import rest_by_night
from tests.support.kernels import use_backend
from tests.support.local_engine import LocalGroup, Outcome
from tests.support.ranks import save_random_llama

TOKENS = TokenTable.of([b"", b"", b"", *(bytes([32 + token_id % 90]) for token_id in range(3, VOCAB_SIZE))], (2,))
"""Control tokens, then one character each."""
CASES = [
    (backend, tp_size, dtype, draft)
    for backend in ("cpu", "cpu-avx2", "cpu-scalar", "reference")
    for tp_size in (1, 2, 3)
    for dtype in ("float32", "bfloat16")
    for draft in ("same", "near", "other")
    if backend != "reference" or dtype == "float32"
]
DAILY = [("cpu", 1, "bfloat16", "near"), ("cpu", 2, "float32", "same"), ("cpu", 1, "float32", "other")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model, and models that guess it: itself, one that is near it, and one that knows nothing of it."""
    shape: dict[str, object] = {
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16, "hidden_size": 144,
    }  # fmt: skip
    paths = {name: tmp_path_factory.mktemp(name) for name in ("same", "near", "other")}
    model = save_random_llama(paths["same"], **shape)
    _near(model).save_pretrained(paths["near"])
    save_random_llama(paths["other"], num_hidden_layers=1, initializer_range=0.2, max_position_embeddings=100)
    return paths


def _near(model: LlamaForCausalLM) -> LlamaForCausalLM:
    near = LlamaForCausalLM(model.config)
    near.load_state_dict(
        {name: weight + 0.01 * torch.randn_like(weight) for name, weight in model.state_dict().items()}
    )
    return near


@pytest.fixture(scope="module")
def adapter(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> AdapterRef:
    path = tmp_path_factory.mktemp("adapter")
    save_random_adapter(path, LlamaForCausalLM.from_pretrained(models["same"]), seed=1)
    return AdapterRef(describe_adapter(path, describe(models["same"]).config).digest, str(path))


@pytest.fixture(scope="module", params=rest_by_night(CASES, by_day=DAILY), ids=lambda case: "-".join(map(str, case)))
def group(request: pytest.FixtureRequest, models: dict[str, Path], adapter: AdapterRef) -> Iterator[LocalGroup]:
    backend, tp_size, dtype, draft = request.param
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_backend(monkeypatch, backend)
        model = describe(models["same"]).config
        num_bytes = adapter_bytes(describe_adapter(Path(adapter.path), model), model, tp_size, dtype=dtype)
        group = LocalGroup(
            models["same"],
            tp_size,
            dtype=dtype,
            tokens=TOKENS,
            adapters=AdapterConfig(),
            draft=DraftConfig(checkpoint_path=str(models[draft])),
            known=[(adapter, num_bytes)],
        )
        group.draft = draft  # type: ignore[attr-defined]
        yield group
        group.close()


def _drafter() -> AskingDrafter:
    return AskingDrafter(lambda run: 1 + (run.seq_id + len(run.token_ids)) % 6)


def _check_acceptance(outcome: Outcome, group: LocalGroup) -> None:
    accepted, drafts = outcome.num_accepted_tokens, outcome.num_draft_tokens
    assert drafts > 0
    draft = group.draft  # type: ignore[attr-defined]
    if draft == "same":
        assert accepted >= 0.9 * drafts, "what it computes is what the model computes, but for another order of sums"
    elif draft == "near":
        assert 0.1 * drafts < accepted < drafts
    else:
        assert accepted < 0.3 * drafts


def test_a_draft_model_changes_no_bit_however_an_answer_is_computed(group: LocalGroup, adapter: AdapterRef) -> None:
    wanted = [
        make(name, prompt, sampling)
        for prompt, (name, sampling) in zip(prompts([90, 21, 3, 34, 61]), SAMPLINGS.items(), strict=True)
    ]
    form = make("form", prompts([17])[0], SAMPLINGS["noisy"])
    wanted.append(_with(form, grammar="start: /[a-z]{10,30}/", eos_token_ids=(2,)))
    wanted.append(_with(make("adapted", prompts([23])[0], SAMPLINGS["noisy"]), adapter=adapter))
    without = {request.request_id: group.run([request]) for request in wanted}
    expected = {name: told(outcome, name, group) for name, outcome in without.items()}
    assert all(len(outcome.tokens(name)) >= 10 for name, outcome in without.items())

    def check(outcome: Outcome, how: str) -> None:
        for name, answer in expected.items():
            assert not outcome.outputs[name] or told(outcome, name, group) == answer, f"{name}, {how}"
        assert outcome.num_draft_tokens > 0, how

    for request in wanted:
        check(group.run([request], drafter=_drafter()), "alone")
    together = group.run(wanted, drafter=_drafter())
    check(together, "in a batch")
    _check_acceptance(group.run(wanted[:5], drafter=_drafter()), group)
    for chunk in (7, 64):
        check(group.run(wanted, drafter=_drafter(), max_prefill_chunk=chunk), f"prefilled {chunk} at a time")
    crowded = group.run(wanted, drafter=_drafter(), num_blocks=24)
    assert crowded.num_preemptions > 0
    check(crowded, "after preemptions")
    cached = group.run([*wanted], before=[wanted[0]], drafter=_drafter(), prefix_caching=True)
    assert cached.last(wanted[0].request_id).num_cached_tokens == 80
    assert cached.tokens(wanted[0].request_id) == expected[wanted[0].request_id][0] * 2, "on a prefix-cache hit"
    for request in wanted:
        answer = without[request.request_id].tokens(request.request_id)
        rest = _with(request, output_token_ids=tuple(answer[:9]))
        resumed = group.run([rest], drafter=_drafter())
        assert resumed.tokens(request.request_id) == answer[9:], "resumed after 9 tokens"


def test_a_stop_token_among_accepted_drafts_ends_the_answer(group: LocalGroup) -> None:
    free = make("it", prompts([30])[0], SAMPLINGS["noisy"])
    answer = group.run([free]).tokens("it")
    for num_tokens in (1, 2, 5, 11):
        stop = answer[num_tokens - 1]
        stopping = _with(free, sampling=_sampling(free.sampling, stop_token_ids=(stop,)))
        outcome = group.run([stopping], drafter=_drafter())
        assert outcome.tokens("it") == answer[: answer.index(stop) + 1]
        assert outcome.last("it").finish_reason is FinishReason.STOP


def test_a_draft_model_reads_a_long_prompt_over_several_steps(group: LocalGroup) -> None:
    long = make("long", prompts([700])[0], SAMPLINGS["noisy"])
    expected = told(group.run([long]), "long", group)
    outcome = group.run([long], drafter=_drafter())
    assert told(outcome, "long", group) == expected
    reads_it = group.draft != "other"  # type: ignore[attr-defined]
    assert (outcome.num_draft_tokens > 0) == reads_it, "a model for 100 tokens says nothing after 700"


def test_another_vocabulary_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    save_random_llama(tmp_path, vocab_size=516)
    with pytest.raises(ConfigError, match="the draft model has 516 tokens and the model 515; they must have the same"):
        LocalGroup(models["same"], 1, draft=DraftConfig(checkpoint_path=str(tmp_path)))


def _with(request: EngineRequest, **changes: Any) -> EngineRequest:
    fields = {name: getattr(request, name) for name in request.__struct_fields__}
    return EngineRequest(**fields | changes)


def _sampling(sampling: SamplingParams, **changes: Any) -> SamplingParams:
    fields = {name: getattr(sampling, name) for name in sampling.__struct_fields__}
    return SamplingParams(**fields | changes)
