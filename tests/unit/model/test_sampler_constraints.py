"""The sharded sampler draws only what a grammar allows, and of that in the model's proportions."""

import math
from collections import Counter
from functools import cache

import numpy as np
import pytest
import scipy
import torch

from model_parallel.collectives.interface import Collectives, SoloCollectives
from model_parallel.config import TokenTable
from model_parallel.engine.matching import GrammarCompiler, Matcher
from model_parallel.engine.request import SamplingParams
from model_parallel.kernels.reference import ReferenceKernels
from model_parallel.model.batch import SequenceState
from model_parallel.model.partition import even_range
from model_parallel.model.sampler import Sampled, Sampler
from tests.support.effort import by_day
from tests.support.ranks import on_threads

VOCABULARY, EOS = 275, 0
TOKENS = [b"", *(bytes([byte]) for byte in range(256)), *(bytes([97 + i]) * 2 for i in range(18))]
COMPILER = GrammarCompiler(TokenTable.of(TOKENS, (EOS,)))
LOGITS = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(5)) * 1.5
NUM_DRAWS = by_day(500, by_night=20_000)
compiled = cache(COMPILER.compile)


def draw(logits_RV: torch.Tensor, states: list[SequenceState], size: int) -> list[Sampled]:
    def run(collectives: Collectives) -> list[Sampled]:
        # As in a group, every rank has matchers of its own.
        own = [_copy(state) for state in states]
        part = even_range(VOCABULARY, size, collectives.rank)
        kernels = ReferenceKernels(num_threads=1, device="cpu")
        sampler = Sampler(kernels, collectives, part, len(even_range(VOCABULARY, size, 0)))
        return sampler.sample(logits_RV[:, part.start : part.stop].contiguous(), own)

    by_rank = on_threads(size, run)
    assert all(result == by_rank[0] for result in by_rank)
    return by_rank[0]


def state(sampling: SamplingParams, grammar: str, position: int = 1) -> SequenceState:
    built = SequenceState(0, [1] * position, position, 0, sampling)
    if grammar:
        built.matcher = Matcher(compiled(grammar), spares_end=sampling.ignore_eos)
    return built


def _copy(state: SequenceState) -> SequenceState:
    matcher = state.matcher and Matcher(state.matcher._grammar, spares_end=state.sampling.ignore_eos)
    return SequenceState(0, state.token_ids, 1, 0, state.sampling, matcher=matcher)


def ids(*texts: bytes) -> list[int]:
    return [TOKENS.index(text) for text in texts]


@pytest.mark.parametrize("size", [3])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=20),
        SamplingParams(temperature=1.0, top_p=0.7),
        SamplingParams(temperature=1.3, top_k=4, top_p=0.95, min_p=0.01),
    ],
    ids=["plain", "top_k", "top_p", "all"],
)
def test_draws_follow_the_distribution_of_what_is_allowed(sampling: SamplingParams, size: int) -> None:
    """The mask comes before temperature and filters: top_k and top_p choose among the allowed tokens."""
    allowed = ids(b"a", b"b", b"c", b"d", b"e", b"f", b"aa", b"bb", b"\xc3")
    states = [state(sampling, "start: /[a-f]x|aa|bb|é/", position) for position in range(1, NUM_DRAWS + 1)]
    drawn = Counter(each.token_id for each in draw(LOGITS.repeat(NUM_DRAWS, 1), states, size))
    probability = np.zeros(VOCABULARY)
    probability[allowed] = (LOGITS[allowed].double() / sampling.temperature).softmax(0).numpy()
    order = np.argsort(-probability, kind="stable")
    if sampling.top_k:
        probability[order[sampling.top_k :]] = 0
    probability /= probability.sum()
    mass = np.cumsum(probability[order])
    probability[order[int(np.argmax(mass >= sampling.top_p)) + 1 :]] = 0
    probability[probability < sampling.min_p * probability.max()] = 0
    expected = probability / probability.sum() * NUM_DRAWS
    assert all(token_id is not None and expected[token_id] > 0 for token_id in drawn)
    kept = [token_id for token_id in range(VOCABULARY) if expected[token_id] > 0]
    assert scipy.stats.chisquare([drawn[token_id] for token_id in kept], expected[kept]).pvalue > 1e-3


@pytest.mark.parametrize("size", [1, 2, 5])
def test_greedy_takes_the_likeliest_of_what_is_allowed(size: int) -> None:
    sampling = SamplingParams(temperature=0.0)
    states = [state(sampling, f"start: /[{first}-{last}]x/") for first, last in ("ab", "ez", "AZ", "09")]
    drawn = draw(LOGITS.repeat(4, 1), states, size)
    for each, (first, last) in zip(drawn, ("ab", "ez", "AZ", "09"), strict=True):
        allowed = ids(*(bytes([byte]) for byte in range(ord(first), ord(last) + 1)))
        assert each.token_id == max(allowed, key=lambda token_id: LOGITS[token_id].item())


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(top_k=5), SamplingParams(temperature=0.0)])
def test_a_rank_may_hold_nothing_that_is_allowed(sampling: SamplingParams) -> None:
    """One token alone: all but one of five ranks offer nothing."""
    drawn = draw(LOGITS.repeat(2, 1), [state(sampling, 'start: "!"'), state(sampling, "start: /~/")], 5)
    assert [each.token_id for each in drawn] == ids(b"!", b"~")


def test_log_probabilities_are_the_models_own() -> None:
    sampling = SamplingParams(temperature=0.5, logprobs=3, top_k=2)
    (free, bound) = draw(LOGITS.repeat(2, 1), [state(sampling, ""), state(sampling, 'start: "!"')], 3)
    assert free.logprobs is not None and bound.logprobs is not None
    assert free.logprobs.top == bound.logprobs.top
    expected = LOGITS.log_softmax(0)
    assert math.isclose(bound.logprobs.logprob, expected[ids(b"!")[0]].item(), abs_tol=1e-5)
    assert ids(b"!")[0] not in [token_id for token_id, _ in bound.logprobs.top]


def test_bias_and_penalties_do_not_bring_back_what_is_not_allowed() -> None:
    token_id = ids(b"Z")[0]
    sampling = SamplingParams(temperature=1.0, logit_bias=((token_id, 100.0),), repetition_penalty=0.01)
    drawn = draw(LOGITS.repeat(2, 1), [state(sampling, "start: /[a-c]x/"), state(sampling, "start: /[XYZ]x/")], 2)
    assert drawn[0].token_id in ids(b"a", b"b", b"c")
    assert drawn[1].token_id == token_id


def test_neighbours_of_a_constrained_row_draw_what_they_draw_alone() -> None:
    sampling = [SamplingParams(top_p=0.9, seed=3), SamplingParams(seed=4), SamplingParams(temperature=0.0)]
    alone = [draw(LOGITS.repeat(2, 1), [state(each, "")], 3)[0] for each in sampling]
    others = [state(SamplingParams(top_k=3), "start: /[0-9]+/"), state(SamplingParams(), "start: /(?s:.*)/")]
    beside = draw(LOGITS.repeat(5, 1), [*others, *(state(each, "") for each in sampling)], 3)
    assert beside[2:] == alone
    bound = [draw(LOGITS.repeat(2, 1), [other], 3)[0] for other in others]
    assert beside[:2] == bound


def test_a_sequence_whose_grammar_fails_ends_and_its_neighbour_does_not() -> None:
    bound, free = state(SamplingParams(), 'start: "abc"'), state(SamplingParams(), "start: /[ab]x/")
    assert bound.matcher is not None
    bound.append(TOKENS.index(b"z"))
    part = range(VOCABULARY)
    sampler = Sampler(ReferenceKernels(num_threads=1, device="cpu"), SoloCollectives(), part, VOCABULARY)
    drawn = sampler.sample(LOGITS.repeat(2, 1), [bound, free])
    assert drawn[0] == Sampled(None, error_kind="constraint_error")
    assert drawn[1].token_id in ids(b"a", b"b")
