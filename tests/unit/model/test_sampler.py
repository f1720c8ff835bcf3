"""The sharded sampler draws from exactly the distribution that its parameters describe."""

from collections import Counter
from typing import cast

import numpy as np
import pytest
import scipy
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from model_parallel.collectives.interface import Collectives
from model_parallel.engine.request import SamplingParams, TokenLogprobs
from model_parallel.kernels.randomness import draw_key, gumbel_noise
from model_parallel.kernels.reference import ReferenceKernels
from model_parallel.model import sampler as sampler_module
from model_parallel.model.batch import SequenceState
from model_parallel.model.partition import even_range
from model_parallel.model.sampler import Sampled, Sampler
from tests.support.effort import by_day
from tests.support.ranks import on_threads

NUM_DRAWS = by_day(2000, by_night=20_000)
VOCABULARY = 97


def draw(logits_RV: torch.Tensor, states: list[SequenceState], size: int) -> list[Sampled]:
    """Sample with the vocabulary cut over `size` ranks; all ranks must agree."""
    vocabulary = logits_RV.shape[1]

    def run(collectives: Collectives) -> list[Sampled]:
        part = even_range(vocabulary, size, collectives.rank)
        kernels = ReferenceKernels(num_threads=1, device="cpu")
        sampler = Sampler(kernels, collectives, part, len(even_range(vocabulary, size, 0)))
        return sampler.sample(logits_RV[:, part.start : part.stop].contiguous(), states)

    by_rank = on_threads(size, run)
    assert all(result == by_rank[0] for result in by_rank)
    return by_rank[0]


def state(sampling: SamplingParams, position: int = 1, tokens: list[int] | None = None) -> SequenceState:
    """A sequence of the given tokens, or one whose next token has the given position."""
    if tokens is None:
        return SequenceState(0, cast(list[int], range(position)), 1, 0, sampling)  # only its length is looked at
    built = SequenceState(0, tokens, 1, 0, sampling)
    built.output_counts.update(tokens[1:])
    return built


def exact_distribution(logits: torch.Tensor, sampling: SamplingParams) -> np.ndarray:
    """By transformers' own warpers, in their order."""
    warpers = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(transformers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(transformers.MinPLogitsWarper(sampling.min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits.double().unsqueeze(0)).softmax(-1)[0].numpy()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.3, top_k=12),
        SamplingParams(temperature=0.9, top_p=0.8),
        SamplingParams(temperature=1.0, min_p=0.1),
        SamplingParams(temperature=1.2, top_k=30, top_p=0.9, min_p=0.02),
    ],
    ids=["temperature", "plain", "top_k", "top_p", "min_p", "all"],
)
def test_draws_follow_the_exact_distribution(sampling: SamplingParams, size: int) -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(5)) * 1.5
    states = [state(sampling, position) for position in range(1, NUM_DRAWS + 1)]
    drawn = Counter(s.token_id for s in draw(logits.repeat(NUM_DRAWS, 1), states, size))
    expected = exact_distribution(logits, sampling) * NUM_DRAWS
    assert all(expected[token] > 0 for token in drawn if token is not None)
    # Cells of fewer than five expected draws are pooled, as the test asks for.
    common = [t for t in range(VOCABULARY) if expected[t] >= 5]
    observed_cells = [drawn[t] for t in common]
    expected_cells = [expected[t] for t in common]
    if NUM_DRAWS - sum(expected_cells) > 1e-6:
        observed_cells.append(NUM_DRAWS - sum(observed_cells))
        expected_cells.append(NUM_DRAWS - sum(expected_cells))
    # The draws are a fixed function of the seed, so this cannot flake.
    assert scipy.stats.chisquare(observed_cells, expected_cells).pvalue > 1e-3


def test_noise_is_gumbel_and_depends_on_every_part_of_its_key() -> None:
    ids = torch.arange(200_000)
    noise = gumbel_noise(torch.tensor(draw_key(1, 0, 1)), ids)
    assert scipy.stats.kstest(noise.numpy(), "gumbel_r").pvalue > 1e-3
    assert torch.equal(noise[1000:1010], gumbel_noise(torch.tensor(draw_key(1, 0, 1)), ids[1000:1010]))
    keys = {draw_key(seed, choice, position) for seed in range(10) for choice in range(10) for position in range(10)}
    assert len(keys) == 1000
    other = gumbel_noise(torch.tensor(draw_key(1, 0, 2)), ids)
    assert abs(np.corrcoef(noise.numpy(), other.numpy())[0, 1]) < 0.01


@given(data=st.data())
def test_filters_keep_exactly_what_transformers_keeps(data: st.DataObject) -> None:
    vocabulary = data.draw(st.integers(5, 400))
    sampling = SamplingParams(
        temperature=data.draw(st.sampled_from([0.3, 1.0, 2.0])),
        top_k=data.draw(st.integers(0, vocabulary + 5)),
        top_p=data.draw(st.sampled_from([0.01, 0.5, 0.9, 0.999, 1.0])),
        min_p=data.draw(st.sampled_from([0.0, 0.01, 0.5, 1.0])),
        seed=data.draw(st.integers(0, 2**64 - 1)),
    )
    size = data.draw(st.sampled_from([1, 2, 3]))
    spread = data.draw(st.sampled_from([0.1, 1.0, 6.0]))
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * spread
    results = draw(logits.repeat(8, 1), [state(sampling, p) for p in range(1, 9)], size)
    allowed = exact_distribution(logits, sampling) > 0
    assert all(result.token_id is not None and allowed[result.token_id] for result in results)
    # The same draws again from all candidates at once: how many are asked for at first must not matter.
    noisy = torch.log(torch.tensor(exact_distribution(logits, sampling)))
    for position, result in enumerate(results, start=1):
        key = torch.tensor(draw_key(sampling.seed, 0, position))
        best = (noisy + gumbel_noise(key, torch.arange(vocabulary))).argmax()
        assert result.token_id == int(best)


def test_more_candidates_are_fetched_until_they_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "FIRST_CANDIDATES", 1)
    logits = torch.zeros(50)  # all equal: nothing is certain before everything is known
    sampling = SamplingParams(top_k=10, top_p=0.9)
    results = draw(logits.repeat(200, 1), [state(sampling, p) for p in range(1, 201)], 3)
    assert {result.token_id for result in results} == set(range(9))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_greedy_takes_the_lowest_id_among_equals(size: int) -> None:
    logits = torch.zeros(3, 40)
    logits[:, [13, 29]] = 4.0
    assert [s.token_id for s in draw(logits, [state(SamplingParams(temperature=0.0))] * 3, size)] == [13] * 3


@given(data=st.data())
def test_of_equal_logits_those_with_the_lowest_ids_are_listed(data: st.DataObject) -> None:
    """So the list begins with the greedy token, on however many ranks; scores list the same."""
    vocabulary, size = data.draw(st.sampled_from([3, 7, 66, 900])), data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    num_values = data.draw(st.sampled_from([1, 2, 5, 100]))
    logits = torch.randint(0, num_values, (3, vocabulary), generator=generator).float()  # the last row is padding
    counts = [data.draw(st.sampled_from([0, 1, 2, 20])) for _ in range(2)]
    results = draw(logits, [state(SamplingParams(temperature=0.0, logprobs=count)) for count in counts], size)

    def run(collectives: Collectives) -> list[TokenLogprobs | None]:
        part = even_range(vocabulary, size, collectives.rank)
        kernels = ReferenceKernels(num_threads=1, device="cpu")
        sampler = Sampler(kernels, collectives, part, len(even_range(vocabulary, size, 0)))
        return sampler.score(logits[:, part.start : part.stop].contiguous(), [0, 0], max(counts))

    scores = on_threads(size, run)[0]
    for row, count, result, score in zip(logits.tolist(), counts, results, scores, strict=False):
        listed = sorted(range(vocabulary), key=lambda token: (-row[token], token))
        assert result.logprobs is not None and score is not None
        assert [token for token, _ in result.logprobs.top] == listed[:count]
        assert [token for token, _ in score.top] == listed[: max(counts)]
        assert result.token_id == listed[0]


@pytest.mark.parametrize("size", [1, 3])
def test_penalties_and_bias(size: int) -> None:
    logits = torch.randn(2, 60, generator=torch.Generator().manual_seed(2)) * 3
    tokens = [5, 7, 7, 9, 9, 9]
    sampling = SamplingParams(
        temperature=0.0,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias=((11, 4.0), (5, -1.0)),
        logprobs=2,
    )
    biased = logits[0].clone()
    biased[11] += 4.0
    biased[5] -= 1.0
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([tokens]), biased.unsqueeze(0))[0]
    for token, count in Counter(tokens[1:]).items():
        expected[token] -= 0.5 + 0.25 * count
    result = draw(logits, [state(sampling, tokens=tokens)] * 2, size)[0]
    assert result.token_id == int(expected.argmax())
    assert result.logprobs is not None
    model = logits[0].double().log_softmax(-1)
    assert result.logprobs.logprob == pytest.approx(model[result.token_id].item(), abs=1e-5)
    assert [token for token, _ in result.logprobs.top] == model.topk(2).indices.tolist()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_fails_alone(size: int, poison: float) -> None:
    logits = torch.randn(3, 30)
    logits[1] = poison
    rows = [state(SamplingParams(top_k=3)), state(SamplingParams(top_k=3)), state(SamplingParams(temperature=0.0))]
    results = draw(logits, rows, size)
    assert [r.error_kind for r in results] == ["", "numerical_error", ""]
    assert results[2].token_id == int(logits[2].argmax())
