"""Answers that follow a grammar, on whole models: valid, and the same however the engine came to them."""

import json
import re
from collections.abc import Iterator

import jsonschema
import pytest

from model_parallel.config import TokenTable
from model_parallel.engine.request import EngineRequest, FinishReason, SamplingParams
from tests.support.drafts import ScriptedDrafter
from tests.support.effort import rest_by_night
from tests.support.local_engine import LocalGroup, Outcome
from tests.support.ranks import save_random_llama

VOCABULARY, EOS = 515, 2
TOKENS = [b"", b"", b"", *(bytes([byte]) for byte in range(256)), b""]
TOKENS += [f"{left}{right}".encode() for left in 'abcdefgh{"[,' for right in 'abcdefghijklmnop":}] '][
    : VOCABULARY - 260
]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["abc", "def", "{gh"]}, "minItems": 2, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
JSON = "start: %json " + json.dumps(SCHEMA)
GREEDY = SamplingParams(temperature=0.0, max_tokens=120)
PLAIN = SamplingParams(seed=3, max_tokens=120, frequency_penalty=0.4, repetition_penalty=1.1, logit_bias=((100, 5.0),))
FILTERED = SamplingParams(seed=7, temperature=0.9, top_k=40, top_p=0.9, max_tokens=120, logprobs=2)


@pytest.fixture(scope="module", params=rest_by_night([1, 2, 3], by_day=[1, 3]), ids=lambda size: f"tp{size}")
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalGroup]:
    """At TP=2 and 3 a rank's part of the vocabulary begins within a word, and a byte, of the mask."""
    path = tmp_path_factory.mktemp("llama")
    save_random_llama(path, num_attention_heads=9, num_key_value_heads=3, head_dim=16, hidden_size=144)
    padded = [*TOKENS, *[b""] * (VOCABULARY - len(TOKENS))]
    group = LocalGroup(path, request.param, tokens=TokenTable.of(padded, (EOS,)))
    yield group
    group.close()


def request(name: str, sampling: SamplingParams, grammar: str = JSON, **more: object) -> EngineRequest:
    prompt = tuple(3 + 5 * i % 200 for i in range(60))
    values = {"prompt_token_ids": prompt, "eos_token_ids": (EOS,), **more}
    return EngineRequest(request_id=name, sampling=sampling, grammar=grammar, **values)  # type: ignore[arg-type]


def text(outcome: Outcome, name: str) -> str:
    return b"".join((*TOKENS, *[b""] * VOCABULARY)[token_id] for token_id in outcome.tokens(name)).decode()


@pytest.mark.parametrize("sampling", [GREEDY, PLAIN, FILTERED], ids=["greedy", "penalised", "filtered"])
def test_an_answer_is_valid_and_does_not_depend_on_how_it_was_computed(
    group: LocalGroup, sampling: SamplingParams
) -> None:
    wanted = request("it", sampling)
    outcome = group.run([wanted])
    alone = outcome.tokens("it")
    jsonschema.validate(json.loads(text(outcome, "it")), SCHEMA)
    last = outcome.last("it")
    assert last.finish_reason is FinishReason.STOP and last.stop_token_id is None
    kinds = [(GREEDY, ""), (FILTERED, "start: /[a-h]+/"), (PLAIN, JSON), (FILTERED, 'start: "abc" | "def"')]
    neighbours = [
        request(f"n{i}", kinds[i % 4][0], kinds[i % 4][1], prompt_token_ids=tuple(range(3, 40 + 9 * i)))
        for i in range(8)
    ]
    assert group.run([*neighbours[:4], wanted, *neighbours[4:]]).tokens("it") == alone, "in a batch"
    assert group.run([wanted], max_prefill_chunk=7).tokens("it") == alone, "in chunks"
    endless = SamplingParams(seed=2, max_tokens=90, ignore_eos=True)
    long = [request(name, endless, "", prompt_token_ids=tuple(range(3, 103))) for name in ("first", "second")]
    crowded = group.run([*long, wanted], num_blocks=20)
    assert crowded.num_preemptions > 0
    assert crowded.tokens("it") == alone, "after a preemption"
    again = request("again", sampling)
    cached = group.run([wanted, again], prefix_caching=True, waves=[1])
    assert cached.last("again").num_cached_tokens == 48
    assert cached.tokens("again") == alone, "on a prefix-cache hit"
    for num_delivered in (1, len(alone) // 2, len(alone) - 1):
        rest = request("rest", sampling, output_token_ids=tuple(alone[:num_delivered]))
        continued = group.run([rest])
        assert continued.tokens("rest") == alone[num_delivered:], f"continued after {num_delivered} tokens"
        assert continued.last("rest").finish_reason is FinishReason.STOP

    # Every fifth draft is a token that the grammar may allow there or not; drafts go on past the end of the answer.
    drafter = ScriptedDrafter(
        lambda run, number: [*alone, *[70] * number][len(run.token_ids) - run.num_prompt_tokens :][:number],
        num_drafts=lambda run: 1 + len(run.token_ids) % 6,
        errs_at=lambda run, position: position % 5 == 0,
    )
    for batch in ([wanted], [*neighbours[:4], wanted]):
        speculative = group.run(batch, drafter=drafter)
        assert 0 < speculative.num_accepted_tokens < speculative.num_draft_tokens
        assert speculative.tokens("it") == alone, "with drafts"
        assert told(speculative, "it") == told(outcome, "it")


def told(outcome: Outcome, name: str) -> tuple[object, ...]:
    """All that a client sees of an answer but for how it was cut into pieces."""
    outputs = outcome.outputs[name]
    logprobs = [entry for output in outputs for entry in output.logprobs]
    return outcome.tokens(name), logprobs, outputs[-1].finish_reason, outputs[-1].stop_token_id


def test_choices_of_a_request_are_each_valid_and_differ(group: LocalGroup) -> None:
    sampling = SamplingParams(seed=5, max_tokens=120)
    outcome = group.run([request(str(choice), sampling, choice=choice) for choice in range(4)])
    texts = {text(outcome, str(choice)) for choice in range(4)}
    assert len(texts) == 4
    for each in texts:
        jsonschema.validate(json.loads(each), SCHEMA)


def test_an_end_token_ends_an_answer_that_could_go_on(group: LocalGroup) -> None:
    bias = ((EOS, 100.0),)
    sampling = SamplingParams(seed=1, max_tokens=50, logit_bias=bias)
    outcome = group.run(
        [
            request("ends", sampling, "start: /ab+/"),
            request("goes on", SamplingParams(seed=1, max_tokens=9, ignore_eos=True, logit_bias=bias), "start: /ab+/"),
        ]
    )
    assert text(outcome, "ends") == "ab"
    assert outcome.last("ends").stop_token_id == EOS
    assert re.fullmatch("ab+", text(outcome, "goes on")) and EOS not in outcome.tokens("goes on")
    assert outcome.last("goes on").finish_reason is FinishReason.LENGTH


def test_an_answer_may_be_cut_short(group: LocalGroup) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=5)
    outcome = group.run([request("cut", sampling)])
    assert len(outcome.tokens("cut")) == 5 and outcome.last("cut").finish_reason is FinishReason.LENGTH
    whole = group.run([request("whole", GREEDY)])
    stop = whole.tokens("whole")[6]
    first = whole.tokens("whole").index(stop)
    stopped = group.run([request("stopped", SamplingParams(temperature=0.0, max_tokens=99, stop_token_ids=(stop,)))])
    assert stopped.tokens("stopped") == whole.tokens("whole")[: first + 1]
    assert stopped.last("stopped").stop_token_id == stop


def test_log_probabilities_are_those_without_a_grammar(group: LocalGroup) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=1, logprobs=3)
    outcome = group.run([request("free", sampling, ""), request("bound", sampling, "start: /[XYZ]/")])
    free, bound = outcome.last("free").logprobs[0], outcome.last("bound").logprobs[0]
    assert bound.top == free.top and bound.token_id != free.token_id and bound.logprob < free.logprob


def test_a_grammar_that_the_ranks_refuse_ends_its_sequence_alone(group: LocalGroup) -> None:
    outcome = group.run([request("wrong", GREEDY, "start: other"), request("right", GREEDY, "")])
    assert outcome.last("wrong").error_kind == "constraint_error" and "other" in outcome.last("wrong").error
    assert outcome.last("right").finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
