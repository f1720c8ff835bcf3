"""Answers with speculation: every bit that of the answer without it, whatever is drafted and however the engine computes it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from model_parallel.engine.request import EngineRequest, FinishReason, SamplingParams
from model_parallel.engine.sequence import Sequence as Run
from model_parallel.engine.speculation import PromptLookupDrafter
from tests.support.drafts import ScriptedDrafter
from tests.support.effort import rest_by_night
from tests.support.kernels import BACKENDS, INSTRUCTION_SETS, use_backend
from tests.support.local_engine import LocalGroup, Outcome
from tests.support.ranks import save_random_llama

VOCAB_SIZE, NUM_NEW = 515, 40
BIAS = tuple((token, 1.5) for token in range(0, VOCAB_SIZE, 7))
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0, logprobs=2),
    "noisy": SamplingParams(temperature=1.0, seed=5, logprobs=0),
    "filtered": SamplingParams(temperature=0.9, top_p=0.95, top_k=50, min_p=0.001, seed=7),
    "penalised": SamplingParams(
        temperature=1.1, seed=3, frequency_penalty=0.4, presence_penalty=0.3, repetition_penalty=1.1, logit_bias=BIAS,
        logprobs=3,
    ),
    "penalised greedy": SamplingParams(temperature=0.0, presence_penalty=0.5, repetition_penalty=1.2),
}  # fmt: skip

CASES = [
    (backend, tp_size, dtype, quantization)
    for backend in (*BACKENDS, *(f"cpu-{each}" for each in INSTRUCTION_SETS))
    for tp_size in (1, 2, 3)
    for dtype, quantization in (("float32", ""), ("bfloat16", ""), ("bfloat16", "int8"))
]
DAILY = [
    ("cpu", 1, "bfloat16", ""),
    ("cpu", 2, "float32", ""),
    ("cpu", 3, "bfloat16", "int8"),
    ("reference", 1, "float32", ""),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_random_llama(path, num_attention_heads=9, num_key_value_heads=3, head_dim=16, hidden_size=144)
    return path


@pytest.fixture(
    scope="module", params=rest_by_night(CASES, by_day=DAILY), ids=lambda case: "-".join(map(str, filter(None, case)))
)
def group(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[LocalGroup]:
    backend, tp_size, dtype, quantization = request.param
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_backend(monkeypatch, backend)
        group = LocalGroup(checkpoint, tp_size, dtype=dtype, quantization=quantization)
        yield group
        group.close()


def prompts(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    draw = torch.Generator().manual_seed(11)
    return [tuple(torch.randint(3, VOCAB_SIZE, (n,), generator=draw).tolist()) for n in lengths]


def make(name: str, prompt: Sequence[int], sampling: SamplingParams, output: Sequence[int] = ()) -> EngineRequest:
    fields = {name: getattr(sampling, name) for name in sampling.__struct_fields__}
    whole = SamplingParams(**fields | {"max_tokens": NUM_NEW, "ignore_eos": True})
    return EngineRequest(
        request_id=name, prompt_token_ids=tuple(prompt), sampling=whole, output_token_ids=tuple(output)
    )


def told(outcome: Outcome, name: str, group: LocalGroup) -> list[object]:
    """All that a client sees of an answer but for how it was cut into pieces.

    On processors for which torch's products are not known, the reference's log-probabilities move in their last digits with the
    number of rows, without drafts too. Its tokens are the same.
    """
    outputs = outcome.outputs[name]
    logprobs = [entry for output in outputs for entry in output.logprobs]
    told = [outcome.tokens(name), len(logprobs), outputs[-1].finish_reason, outputs[-1].stop_token_id]
    return told if group.kernels_name == "reference" else [*told, logprobs]


class Foreteller:
    """Drafts from answers that are known, with wrong tokens in between."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        """`answers` by prompt."""
        self.answers = answers

    def drafter(self) -> ScriptedDrafter:
        return ScriptedDrafter(
            self.next_tokens,
            num_drafts=lambda run: 1 + (run.seq_id + len(run.token_ids)) % 7,
            errs_at=lambda run, position: (run.seq_id + position) % 5 == 0,
        )

    def next_tokens(self, run: Run, number: int) -> list[int]:
        num_output = len(run.token_ids) - run.num_prompt_tokens
        return self.answers[run.request.prompt_token_ids][num_output : num_output + number]


def test_drafts_change_no_bit_however_an_answer_is_computed(group: LocalGroup) -> None:
    lengths = [90, 21, 3, 34, 61]
    wanted = [
        make(name, prompt, sampling)
        for prompt, (name, sampling) in zip(prompts(lengths), SAMPLINGS.items(), strict=True)
    ]
    without = {request.request_id: group.run([request]) for request in wanted}
    expected = {name: told(outcome, name, group) for name, outcome in without.items()}
    foreteller = Foreteller({r.prompt_token_ids: without[r.request_id].tokens(r.request_id) for r in wanted})

    def check(outcome: Outcome, how: str) -> None:
        for name, answer in expected.items():
            assert not outcome.outputs[name] or told(outcome, name, group) == answer, f"{name}, {how}"
        assert 0 < outcome.num_accepted_tokens < outcome.num_draft_tokens

    for request in wanted:
        outcome = group.run([request], drafter=foreteller.drafter())
        check(outcome, "alone")
        last = outcome.last(request.request_id)
        assert last.num_accepted_tokens == outcome.num_accepted_tokens
        assert last.num_rejected_tokens == outcome.num_draft_tokens - outcome.num_accepted_tokens
        assert len(outcome.outputs[request.request_id]) < NUM_NEW, "some steps brought several tokens"
    check(group.run(wanted, drafter=foreteller.drafter()), "in a batch")
    for chunk in (7, 64):
        check(group.run(wanted, drafter=foreteller.drafter(), max_prefill_chunk=chunk), f"prefilled {chunk} at a time")
    crowded = group.run(wanted, drafter=foreteller.drafter(), num_blocks=16)
    assert crowded.num_preemptions > 0
    check(crowded, "after preemptions")
    cached = group.run([*wanted], before=[wanted[0]], drafter=foreteller.drafter(), prefix_caching=True)
    assert cached.last(wanted[0].request_id).num_cached_tokens == 80
    assert cached.tokens(wanted[0].request_id) == expected[wanted[0].request_id][0] * 2, "on a prefix-cache hit"
    for request in wanted:
        answer = without[request.request_id].tokens(request.request_id)
        rest = make(request.request_id, request.prompt_token_ids, request.sampling, answer[:13])
        resumed = group.run([rest], drafter=foreteller.drafter())
        assert resumed.tokens(request.request_id) == answer[13:], "resumed after 13 tokens"


def test_an_answer_that_is_computed_with_drafts_is_a_prefix_for_others(group: LocalGroup) -> None:
    (prompt,) = prompts([37])
    first = make("first", prompt, SAMPLINGS["noisy"])
    answer = group.run([first]).tokens("first")
    follow_up = make("second", [*prompt, *answer, 5], SAMPLINGS["noisy"])
    expected = group.run([follow_up]).tokens("second")
    foreteller = Foreteller({first.prompt_token_ids: answer, follow_up.prompt_token_ids: expected})
    both = group.run([first, follow_up], waves=[1], prefix_caching=True, drafter=foreteller.drafter())
    assert both.last("second").num_cached_tokens == (37 + NUM_NEW - 1) // 16 * 16, "all blocks that were filled"
    assert (both.tokens("first"), both.tokens("second")) == (answer, expected)


def test_a_stop_token_among_accepted_drafts_ends_the_answer(group: LocalGroup) -> None:
    (prompt,) = prompts([30])
    free = make("it", prompt, SAMPLINGS["noisy"])
    answer = group.run([free]).tokens("it")
    foreteller = Foreteller({free.prompt_token_ids: answer})
    for num_tokens in range(1, 12):
        stop = answer[num_tokens - 1]
        length = answer.index(stop) + 1
        fields = {name: getattr(free.sampling, name) for name in free.sampling.__struct_fields__}
        stopping = EngineRequest(
            request_id="it",
            prompt_token_ids=free.prompt_token_ids,
            sampling=SamplingParams(**fields | {"stop_token_ids": (stop,)}),
        )
        outcome = group.run([stopping], drafter=foreteller.drafter())
        assert outcome.tokens("it") == answer[:length]
        last = outcome.last("it")
        assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, stop)


class TimelessDrafter(PromptLookupDrafter):
    """Takes rows to cost what is assumed at first, so that it does the same on every machine."""

    def record_step(self, num_rows: int, step_s: float) -> None: ...


def test_prompt_lookup_gives_the_same_answers_in_fewer_steps(group: LocalGroup) -> None:
    # Three tokens are so much likelier the less they have been said that the answer goes round among them.
    bias = tuple((token, 300.0) for token in (7, 8, 9))
    sampling = SamplingParams(temperature=0.0, logit_bias=bias, frequency_penalty=50.0, logprobs=1)
    wanted = [make(f"it{i}", prompt, sampling) for i, prompt in enumerate(prompts([20, 45, 70]))]
    for batch in ([wanted[0]], wanted):
        off, on = group.run(batch), group.run(batch, drafter=TimelessDrafter())
        for request in batch:
            assert told(on, request.request_id, group) == told(off, request.request_id, group)
        assert on.num_accepted_tokens > 0
        num_outputs = [sum(len(outputs) for outputs in outcome.outputs.values()) for outcome in (off, on)]
        assert num_outputs[1] < num_outputs[0]
