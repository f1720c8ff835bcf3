"""Whole answers: equal to transformers', and equal however the engine came to them."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from model_parallel.engine.request import EngineRequest, FinishReason, SamplingParams
from tests.support.converted import reference_model
from tests.support.effort import by_day, rest_by_night
from tests.support.kernels import BACKENDS, INSTRUCTION_SETS, use_backend
from tests.support.local_engine import LocalGroup
from tests.support.one_answer import (
    GREEDY,
    NUM_NEW,
    SAMPLINGS,
    check_one_answer,
    random_prompts,
    request,
)
from tests.support.ranks import save_random_llama

NUM_PROMPTS = 10
MAX_LOGPROB_ERROR = 1e-4


def _assert_greedy(model: LlamaForCausalLM, prompt: tuple[int, ...], answer: list[int]) -> None:
    """Every token is the one that transformers would take after the same beginning, so greedy decoding gives the same."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    path = tmp_path_factory.mktemp("llama")
    model = save_random_llama(path, num_attention_heads=9, num_key_value_heads=3, head_dim=16, hidden_size=144)
    return path, model


CASES = [
    (backend, tp_size)
    for backend in (*BACKENDS, *(f"cpu-{each}" for each in INSTRUCTION_SETS))
    for tp_size in (1, 2, 3)
]


def _id(value: str | tuple[str, int]) -> str:
    return value if isinstance(value, str) else f"{value[0]}-tp{value[1]}"


DAILY = [("cpu", 1), ("cpu", 2), ("cpu", 3), ("cpu-avx2", 2), ("reference", 1)]


@pytest.fixture(scope="module", params=rest_by_night(CASES, by_day=DAILY), ids=_id)
def group(request: pytest.FixtureRequest, checkpoint: tuple[Path, LlamaForCausalLM]) -> Iterator[LocalGroup]:
    backend, tp_size = request.param
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_backend(monkeypatch, backend)
        group = LocalGroup(checkpoint[0], tp_size)
        yield group
        group.close()


def test_greedy_answers_are_those_of_transformers(group: LocalGroup, checkpoint: tuple[Path, LlamaForCausalLM]) -> None:
    prompts = random_prompts(515, [5 + 7 * i for i in range(NUM_PROMPTS)])
    outcome = group.run([request(str(i), prompt, GREEDY) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        answer = outcome.tokens(str(i))
        assert len(answer) == NUM_NEW
        _assert_greedy(checkpoint[1], prompt, answer)


@pytest.mark.parametrize(
    ("backend", "tp_size"),
    rest_by_night(
        [(backend, tp_size) for backend in BACKENDS for tp_size in (2, 3)], by_day=[("cpu", 3)], has_names=True
    ),
)
def test_smollm2_greedy_answers_are_those_of_transformers(
    smollm2_path: Path, backend: str, tp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(monkeypatch, backend)
    model = reference_model(smollm2_path)
    prompts = random_prompts(49152, [20 + i for i in range(by_day(4, by_night=NUM_PROMPTS))])
    group = LocalGroup(smollm2_path, tp_size)
    outcome = group.run([request(str(i), prompt, GREEDY) for i, prompt in enumerate(prompts)])
    group.close()
    for i, prompt in enumerate(prompts):
        _assert_greedy(model, prompt, outcome.tokens(str(i)))


def test_prompt_logprobs_are_those_of_transformers(
    group: LocalGroup, checkpoint: tuple[Path, LlamaForCausalLM]
) -> None:
    (prompt,) = random_prompts(515, [200])
    sampling = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=3, logprobs=3)
    outcome = group.run([request("scored", prompt, sampling)], max_prefill_chunk=33)
    entries = [entry for output in outcome.outputs["scored"] for entry in output.prompt_logprobs]
    with torch.no_grad():
        expected = checkpoint[1](torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert [entry.token_id for entry in entries] == list(prompt[1:])
    for position, entry in enumerate(entries):
        assert abs(entry.logprob - expected[position, entry.token_id].item()) <= MAX_LOGPROB_ERROR
        values, ids = expected[position].topk(3)
        assert [token_id for token_id, _ in entry.top] == ids.tolist()
        assert max(abs(a - b) for (_, a), b in zip(entry.top, values.tolist(), strict=True)) <= MAX_LOGPROB_ERROR


def test_scoring_alone_draws_no_token(group: LocalGroup) -> None:
    (prompt,) = random_prompts(515, [40])
    outcome = group.run(
        [request("s", prompt, SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=30))]
    )
    assert outcome.tokens("s") == []
    assert [len(output.prompt_logprobs) for output in outcome.outputs["s"]] == [10]
    assert outcome.last("s").finish_reason is FinishReason.LENGTH


COMPUTED = list(itertools.product(CASES, SAMPLINGS))
COMPUTED_BY_DAY = [
    (case, name) for case, name in COMPUTED if case in DAILY and (case[0] == "cpu" or name == "filtered")
]
"""The kernels that serve with every way of sampling, which does not depend on the kernels; the others with one."""


@pytest.mark.parametrize(
    ("group", "name"), rest_by_night(COMPUTED, by_day=COMPUTED_BY_DAY, has_names=True), indirect=["group"], ids=_id
)
def test_an_answer_does_not_depend_on_how_it_was_computed(group: LocalGroup, name: str) -> None:
    check_one_answer(group, SAMPLINGS[name])


def test_other_seeds_and_choices_draw_other_tokens(group: LocalGroup) -> None:
    (prompt,) = random_prompts(515, [30])
    requests = [
        EngineRequest(
            request_id=f"{seed}-{choice}", prompt_token_ids=prompt, choice=choice, sampling=SamplingParams(seed=seed)
        )
        for seed in (1, 2)
        for choice in (0, 1)
    ]
    outcome = group.run(requests)
    assert len({tuple(outcome.tokens(r.request_id)) for r in requests}) == 4
