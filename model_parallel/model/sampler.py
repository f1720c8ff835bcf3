"""Drawing the next token when every rank holds only its part of the vocabulary. Logits are never gathered.

Each rank contributes, for every row, a few numbers: the maximum and the exponential sum of its logits, its best token, and its
most likely candidates where top-k, top-p or min-p ask for them. One all-gather makes them known to all, and every rank
comes to the same decision, so no rank has to be told the token.

Shape suffixes: R rows, padded to at least two · V local vocabulary · C candidates · G ranks
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model_parallel.collectives.interface import Collectives
from model_parallel.engine.matching import Matcher, allowed_bits
from model_parallel.engine.request import SamplingParams, TokenLogprobs
from model_parallel.kernels.interface import Kernels
from model_parallel.kernels.randomness import draw_key, gumbel_noise
from model_parallel.model.batch import SequenceState

FIRST_CANDIDATES = 64
"""Candidates a rank offers at first when a row is filtered; four times as many each time they do not suffice."""
ROWS_AT_ONCE = 4
"""Rows of which a CPU makes float64 copies at a time."""
_NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a row drew. Exactly one of `token_id` and `error_kind` is set."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    error_kind: str = ""


@dataclass(frozen=True, slots=True)
class _Softmax:
    """Normalisers of one row, summed in rank order."""

    maximum: float
    exponential_sum: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.maximum) and math.isfinite(self.exponential_sum)

    def log_probability(self, logit: float) -> float:
        return logit - self.maximum - math.log(self.exponential_sum)


class Sampler:
    """One rank's part of the group's sampler."""

    def __init__(self, kernels: Kernels, collectives: Collectives, vocabulary: range, largest_part: int) -> None:
        """vocabulary: token ids of this rank's logits. largest_part: the most that any rank holds."""
        self.kernels = kernels
        self.collectives = collectives
        self.vocabulary = vocabulary
        self.largest_part = largest_part

    def sample(self, logits_RV: Tensor, states: Sequence[SequenceState]) -> list[Sampled]:
        """The next token of each state. logits_RV: float32, its first rows are the states' in order."""
        num_top = max(state.sampling.logprobs or 0 for state in states)
        # Before anything waits for a GPU, which computes the logits meanwhile.
        forbidden = self._forbidden(states)
        parts_R3 = self.kernels.softmax_parts(logits_RV)
        best_R3 = self._greedy(parts_R3)
        winners: dict[int, tuple[int, float]] = {}
        adjusted = [r for r, state in enumerate(states) if _is_adjusted(state.sampling)]
        masked = [r for r in forbidden if not _is_adjusted(states[r].sampling) and not _is_drawn(states[r].sampling)]
        others = {*adjusted, *masked}
        noisy = [r for r, state in enumerate(states) if r not in others and state.sampling.temperature > 0]
        if noisy:
            winners |= self._choose(logits_RV, noisy, noisy, logits_RV, states, best_R3, forbidden)
        if masked:
            forbidden_RV = torch.stack([forbidden[r] for r in masked]).to(logits_RV.device, non_blocking=True)
            masked_RV = logits_RV[masked].masked_fill_(forbidden_RV, -math.inf)
            winners |= self._choose(masked_RV, range(len(masked)), masked, logits_RV, states, best_R3, {})
        if adjusted:
            adjusted_RV = self._adjusted(logits_RV, adjusted, states, forbidden)
            winners |= self._choose(adjusted_RV, range(len(adjusted)), adjusted, logits_RV, states, best_R3, {})
        table = self._gather(
            torch.cat([parts_R3[:, :2], best_R3, self._listed(logits_RV, num_top, len(states))], dim=1)
        )

        results = []
        for r, state in enumerate(states):
            parts = table[r]
            softmax = _combined([part[:2] for part in parts])
            if not softmax.is_finite:
                results.append(Sampled(None, error_kind="numerical_error"))
                continue
            if state.matcher is not None and state.matcher.has_failed:
                results.append(Sampled(None, error_kind="constraint_error"))
                continue
            if r in winners:
                token_id, logit = winners[r]
            else:
                _, negative_id, logit = max((part[2], -part[3], part[4]) for part in parts)
                token_id = int(-negative_id)
            logprobs = None
            if state.sampling.logprobs is not None:
                top = _most_likely([part[5:] for part in parts], state.sampling.logprobs, softmax)
                logprobs = TokenLogprobs(token_id, softmax.log_probability(logit), top)
            results.append(Sampled(token_id, logprobs))
        return results

    def score(self, logits_RV: Tensor, target_ids: Sequence[int], num_top: int) -> list[TokenLogprobs | None]:
        """Log-probability of each given token; None where the row's logits are not finite."""
        targets = torch.tensor(target_ids, device=logits_RV.device) - self.vocabulary.start
        held = (targets >= 0) & (targets < len(self.vocabulary))
        picked = logits_RV[: len(target_ids)].gather(1, targets.where(held, 0).unsqueeze(1))
        picked_R1 = torch.full((len(logits_RV), 1), -math.inf, dtype=torch.float64, device=logits_RV.device)
        picked_R1[: len(target_ids)] = picked.double().masked_fill(~held.unsqueeze(1), -math.inf)
        listed_RX = self._listed(logits_RV, num_top, len(target_ids))
        table = self._gather(torch.cat([self.kernels.normalisers(logits_RV), picked_R1, listed_RX], dim=1))
        results: list[TokenLogprobs | None] = []
        for parts, token_id in zip(table, target_ids, strict=False):
            softmax = _combined([part[:2] for part in parts])
            if softmax.is_finite:
                top = _most_likely([part[3:] for part in parts], num_top, softmax)
                logprob = softmax.log_probability(max(part[2] for part in parts))
                results.append(TokenLogprobs(token_id, logprob, top))
            else:
                results.append(None)
        return results

    def _gather(self, mine_RX: Tensor) -> list[list[list[float]]]:
        """[R][G][X] as plain numbers."""
        gathered: list[list[list[float]]] = self.collectives.all_gather(mine_RX.contiguous()).transpose(0, 1).tolist()
        return gathered

    def _forbidden(self, states: Sequence[SequenceState]) -> dict[int, Tensor]:
        """By row, of sequences with a grammar: bool [V], true for tokens of this rank's part that it does not allow.

        Every rank asks its own copy of the matchers, which all come to the same. A row whose matcher fails has none.
        """
        rows = [r for r, state in enumerate(states) if state.matcher is not None and state.matcher.is_open]
        if not rows:
            return {}
        matchers = [matcher for r in rows if (matcher := states[r].matcher) is not None]
        mask_RW = np.zeros((len(matchers), matchers[0].num_words), dtype=np.int32)
        is_told = Matcher.fill_all(matchers, mask_RW)
        forbidden_RV = torch.from_numpy(~allowed_bits(mask_RW, self.vocabulary))
        return {r: forbidden_V for r, forbidden_V, told in zip(rows, forbidden_RV, is_told, strict=True) if told}

    def _adjusted(
        self, logits_RV: Tensor, rows: list[int], states: Sequence[SequenceState], forbidden: Mapping[int, Tensor]
    ) -> Tensor:
        """float64 [rows, V]: their logits after grammar, bias and penalties."""
        values_RV = logits_RV[rows].double()
        for value_V, r in zip(values_RV, rows, strict=True):
            sampling = states[r].sampling
            if r in forbidden:  # which stays so, whatever is added, and whatever it is multiplied with
                value_V.masked_fill_(forbidden[r].to(value_V.device, non_blocking=True), -math.inf)
            bias = dict(sampling.logit_bias)
            if bias:
                self._add(value_V, list(bias), list(bias.values()))
            if sampling.repetition_penalty != 1.0:
                seen = self._local(states[r].distinct_ids)
                value = value_V[seen]
                penalty = sampling.repetition_penalty
                value_V[seen] = torch.where(value > 0, value / penalty, value * penalty)
            if sampling.presence_penalty or sampling.frequency_penalty:
                counts = states[r].output_counts
                losses = [-sampling.presence_penalty - sampling.frequency_penalty * n for n in counts.values()]
                self._add(value_V, list(counts), losses)
        return values_RV

    def _local(self, token_ids: Iterable[int]) -> Tensor:
        start, stop = self.vocabulary.start, self.vocabulary.stop
        return torch.tensor([t - start for t in token_ids if start <= t < stop], dtype=torch.int64)

    def _add(self, value_V: Tensor, token_ids: list[int], values: list[float]) -> None:
        held = [(t, v) for t, v in zip(token_ids, values, strict=True) if t in self.vocabulary]
        index = torch.tensor([t - self.vocabulary.start for t, _ in held], dtype=torch.int64, device=value_V.device)
        value_V[index] += torch.tensor([v for _, v in held], dtype=torch.float64, device=value_V.device)

    def _greedy(self, parts_R3: Tensor) -> Tensor:
        """float64 [R, 3]: this rank's best (score, token id, logit) of rows that take the likeliest token."""
        maximum_R, _, index_R = parts_R3.unbind(1)
        return self._candidates(maximum_R, index_R, maximum_R)

    def _candidates(self, score_R: Tensor, place_R: Tensor, logit_R: Tensor) -> Tensor:
        """float64 [R, 3]: (score, token id, logit), of tokens by their places in this rank's part."""
        return torch.stack([score_R, (place_R + self.vocabulary.start).double(), logit_R.double()], dim=1)

    def _choose(
        self,
        values_RV: Tensor,
        places: Sequence[int],
        rows: list[int],
        logits_RV: Tensor,
        states: Sequence[SequenceState],
        best_R3: Tensor,
        forbidden: Mapping[int, Tensor],
    ) -> dict[int, tuple[int, float]]:
        """Choose the tokens of `rows`, which lie at `places` of values_RV: float32 logits, or float64 where they were adjusted.
        `forbidden` is of rows that noise alone decides, and whose values do not tell it yet.

        Fills in this rank's best (score, token id, logit) of rows without filters. Returns (token id, logit) of those with any.
        """
        at = dict(zip(rows, places, strict=True))
        likeliest = [r for r in rows if states[r].sampling.temperature == 0]
        if likeliest:
            score_R, token_R = values_RV[[at[r] for r in likeliest]].max(dim=1)
            best_R3[likeliest] = self._candidates(score_R, token_R, _picked(logits_RV, likeliest, token_R))
        drawn = [r for r in rows if _is_drawn(states[r].sampling)]
        if drawn:
            temperatures, keys = [states[r].sampling.temperature for r in drawn], [_key(states[r]) for r in drawn]
            index = [at[r] for r in drawn]
            masks = [forbidden.get(r) for r in drawn]
            token_R = self.kernels.best_draws(values_RV, index, temperatures, keys, self.vocabulary.start, masks)
            device = values_RV.device
            tempered_R = _picked(values_RV, index, token_R) / _doubles(temperatures, device)
            noise_R = gumbel_noise(torch.tensor(keys, device=device), token_R + self.vocabulary.start)
            for i, token in enumerate(token_R.tolist() if forbidden else ()):
                if (mask_V := masks[i]) is not None and mask_V[token]:  # this rank holds no token that is allowed
                    tempered_R[i] = -math.inf
            best_R3[drawn] = self._candidates(tempered_R + noise_R, token_R, _picked(logits_RV, drawn, token_R))
        filtered = [r for r in rows if _is_filtered(states[r].sampling)]
        if not filtered:
            return {}
        found = self._draw_filtered(
            values_RV, [at[r] for r in filtered], logits_RV, filtered, [states[r] for r in filtered]
        )
        return dict(zip(filtered, found, strict=True))

    def _listed(self, logits_RV: Tensor, count: int, num_rows: int) -> Tensor:
        """float64 [R, 2 · count]: `_top`, and of equal logits those with the lowest token ids, in the first `num_rows`."""
        if not count:
            return torch.empty((len(logits_RV), 0), dtype=torch.float64, device=logits_RV.device)
        top_RC2 = self._top(logits_RV, count + 1)
        last_R, next_R = top_RC2[:num_rows, count - 1, 0], top_RC2[:num_rows, count, 0]
        # Where the last of them has an equal beyond the list, topk has taken any of the equal ones.
        is_open_R = (last_R == next_R) & (top_RC2[:num_rows, count, 1] != _NO_TOKEN)
        for r in is_open_R.nonzero().flatten().tolist():
            num_higher = int((top_RC2[r, :count, 0] > last_R[r]).sum())
            equal = (logits_RV[r] == last_R[r]).nonzero().flatten()[: count - num_higher]
            top_RC2[r, num_higher:count, 1] = (equal + self.vocabulary.start).double()
        return top_RC2[:, :count].flatten(1)

    def _top(self, values_RV: Tensor, count: int) -> Tensor:
        """float64 [R, count, 2]: this rank's highest values with their token ids; (-inf, -1) past its part.

        Of equal values any may be left out.
        """
        held = min(count, len(self.vocabulary))
        value_RC, index_RC = values_RV.topk(held, dim=1)
        top_RC2 = torch.full((len(values_RV), count, 2), -math.inf, dtype=torch.float64, device=values_RV.device)
        top_RC2[:, held:, 1] = _NO_TOKEN
        top_RC2[:, :held, 0] = value_RC.double()
        top_RC2[:, :held, 1] = (index_RC + self.vocabulary.start).double()
        return top_RC2

    def _draw_filtered(
        self,
        values_RV: Tensor,
        places: list[int],
        logits_RV: Tensor,
        rows: list[int],
        states: list[SequenceState],
    ) -> list[tuple[int, float]]:
        """(token id, logit) of rows with top-k, top-p or min-p; asks for more candidates until they suffice."""
        winners: list[tuple[int, float] | None] = [None] * len(rows)
        temperature_R = _doubles([state.sampling.temperature for state in states], values_RV.device)
        sum_R = self._exponential_sums(values_RV, places, states)
        count = FIRST_CANDIDATES
        while left := [i for i, winner in enumerate(winners) if winner is None]:
            count = min(count, self.largest_part)
            is_whole = len(left) == len(values_RV)
            candidates_RC2 = self._top(values_RV if is_whole else values_RV[[places[i] for i in left]], count)
            local_RC = (candidates_RC2[..., 1].long() - self.vocabulary.start).clamp(min=0)
            logit_RC = logits_RV[torch.tensor([rows[i] for i in left], device=values_RV.device).unsqueeze(1), local_RC]
            candidates_RC2[..., 0] /= temperature_R[left].unsqueeze(1)
            offer_RC3 = torch.cat([candidates_RC2, logit_RC.double().unsqueeze(-1)], dim=2)
            normalisers_R2 = torch.stack([candidates_RC2[:, 0, 0], sum_R[left]], dim=1)
            offers_GRX = self.collectives.all_gather(torch.cat([normalisers_R2, offer_RC3.flatten(1)], dim=1)).cpu()
            found = _draw(offers_GRX, [states[i] for i in left], is_complete=count >= self.largest_part)
            for i, winner in zip(left, found, strict=True):
                winners[i] = winner
            count *= 4
        return [winner for winner in winners if winner is not None]

    def _exponential_sums(self, values_RV: Tensor, places: list[int], states: Sequence[SequenceState]) -> Tensor:
        """float64 [places]: the sum of exp((value − maximum) / temperature) of rows with top-p; 1 of others, which need none."""
        sum_R = torch.ones(len(places), dtype=torch.float64, device=values_RV.device)
        asking = [i for i, state in enumerate(states) if state.sampling.top_p < 1.0]
        size = ROWS_AT_ONCE if values_RV.device.type == "cpu" else max(1, len(asking))
        for first in range(0, len(asking), size):
            part = asking[first : first + size]
            # Two rows at least: torch sums a lone row in another order.
            twice = part if len(part) > 1 else part * 2
            value_RV = values_RV[[places[i] for i in twice]].double()
            value_RV /= _doubles([states[i].sampling.temperature for i in twice], values_RV.device).unsqueeze(1)
            sum_R[part] = self.kernels.normalisers(value_RV)[: len(part), 1]
        return sum_R


def _draw(offers_GRX: Tensor, states: Sequence[SequenceState], *, is_complete: bool) -> list[tuple[int, float] | None]:
    """For each filtered row (token id, logit), or None when more candidates are needed to be exact.

    offers_GRX: from each rank (maximum, exponential sum, then its C candidates as (score, token id, logit)).
    is_complete: no rank holds anything that it did not offer.
    """
    maximum_GR, sum_GR = offers_GRX[..., 0], offers_GRX[..., 1]
    maximum_R = maximum_GR.amax(0)
    total_R = torch.zeros_like(maximum_R)
    for part_maximum_R, part_sum_R in zip(maximum_GR, sum_GR, strict=True):  # in rank order
        total_R += part_sum_R * (part_maximum_R - maximum_R).exp()

    offers_GRC3 = offers_GRX[..., 2:].unflatten(-1, (-1, 3))
    score_RM, token_RM, logit_RM = offers_GRC3.transpose(0, 1).flatten(1, 2).unbind(-1)
    by_token_RM = token_RM.argsort(dim=1)
    order_RM = by_token_RM.gather(1, score_RM.gather(1, by_token_RM).argsort(dim=1, descending=True, stable=True))
    score_RM, token_RM, logit_RM = (x_RM.gather(1, order_RM) for x_RM in (score_RM, token_RM, logit_RM))

    # A rank that offered as many as asked may hold more, none above its lowest offer. What lies above every rank's lowest
    # offer is therefore known for certain. A rank that offered a token that cannot be drawn has offered all that can.
    lowest_R1 = offers_GRC3[:, :, -1, 0].amax(0).unsqueeze(1)
    is_complete_R = (lowest_R1.squeeze(1) == -math.inf) | is_complete
    certain_RM = (token_RM != _NO_TOKEN) if is_complete else (score_RM > lowest_R1)
    weight_RM = (score_RM - maximum_R.unsqueeze(1)).exp() * certain_RM
    num_kept_R = _num_kept(
        weight_RM, certain_RM.sum(1), total_R, [s.sampling for s in states], is_complete_R=is_complete_R
    )

    noise_RM = gumbel_noise(torch.tensor([[_key(state)] for state in states]), token_RM.long())
    rank_M = torch.arange(score_RM.shape[1])
    best_R1 = (score_RM + noise_RM).masked_fill(rank_M >= num_kept_R.unsqueeze(1), -math.inf).argmax(1, keepdim=True)
    tokens, logits = token_RM.gather(1, best_R1).squeeze(1).tolist(), logit_RM.gather(1, best_R1).squeeze(1).tolist()
    # A row that is not finite is taken as drawn: `sample` reports it, by its logits.
    is_known = ((num_kept_R > 0) | ~total_R.isfinite()).tolist()
    return [(int(t), x) if known else None for t, x, known in zip(tokens, logits, is_known, strict=True)]


def _num_kept(
    weight_RM: Tensor,
    num_certain_R: Tensor,
    total_R: Tensor,
    params: Sequence[SamplingParams],
    *,
    is_complete_R: Tensor,
) -> Tensor:
    """int64 [R]: how many of the most likely tokens the filters keep; 0 when the certain ones do not suffice to tell.

    weight_RM: unnormalised probabilities, most likely first, 0 for all that is not certain. total_R: their sum over the whole
    vocabulary. A filter that would keep more than the certain ones says nothing; the smallest of those that speak counts.
    """
    silent = 1 << 62  # more than any filter could keep
    top_k_R = torch.tensor([p.top_k or silent for p in params])
    top_p_R = torch.tensor([p.top_p for p in params], dtype=torch.float64)
    min_p_R = torch.tensor([p.min_p for p in params], dtype=torch.float64)

    mass_RM = weight_RM.cumsum(1)
    is_cut_R = top_k_R <= num_certain_R
    last_R1 = top_k_R.where(is_cut_R, 1).unsqueeze(1) - 1
    total_R = mass_RM.gather(1, last_R1).squeeze(1).where(is_cut_R, total_R)  # top_p counts what top_k left
    reached_RM = mass_RM >= (top_p_R * total_R).unsqueeze(1)
    is_reached_R = reached_RM.any(1) & (top_p_R < 1.0)
    num_likely_R = ((weight_RM >= min_p_R.unsqueeze(1)) & (weight_RM > 0)).sum(1)

    limits = [
        num_certain_R.where(is_complete_R, silent),
        top_k_R.where(is_cut_R, silent),
        (reached_RM.int().argmax(1) + 1).where(is_reached_R, silent),
        num_likely_R.clamp(min=1).where((min_p_R > 0) & (num_likely_R < num_certain_R), silent),
    ]
    kept_R = torch.stack(limits).amin(0)
    # Without the tokens that top_k keeps, the mass that top_p is measured against is not known.
    is_open_R = (kept_R == silent) | ((top_k_R < silent) & ~is_cut_R & ~is_complete_R)
    return kept_R.masked_fill(is_open_R, 0)


def _is_adjusted(sampling: SamplingParams) -> bool:
    """Whether anything but a temperature and filters changes the logits."""
    penalties = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0
    return bool(penalties or sampling.logit_bias)


def _is_drawn(sampling: SamplingParams) -> bool:
    """Whether noise decides, among all tokens."""
    return sampling.temperature > 0 and not _is_filtered(sampling)


def _is_filtered(sampling: SamplingParams) -> bool:
    return sampling.temperature > 0 and (sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0)


def _doubles(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


def _picked(values_RV: Tensor, rows: Sequence[int], place_R: Tensor) -> Tensor:
    """float64 [rows]: of each row the value at its place."""
    return values_RV[torch.tensor(rows, device=values_RV.device), place_R].double()


def _key(state: SequenceState) -> int:
    """Of its next draw."""
    return draw_key(state.sampling.seed, state.choice, state.position)


def _combined(parts: Sequence[Sequence[float]]) -> _Softmax:
    """Normalisers of a whole row from its ranks' (maximum, sum) pairs."""
    if any(math.isnan(maximum) or math.isnan(total) for maximum, total in parts):
        return _Softmax(math.nan, math.nan)
    maximum = max(part[0] for part in parts)
    if not math.isfinite(maximum):
        return _Softmax(maximum, math.nan)
    return _Softmax(maximum, sum(total * math.exp(part_maximum - maximum) for part_maximum, total in parts))


def _most_likely(parts: Sequence[Sequence[float]], count: int, softmax: _Softmax) -> tuple[tuple[int, float], ...]:
    """The `count` highest of all ranks' (logit, token id) pairs, laid flat, as (token id, log-probability)."""
    pairs = [(part[i], int(part[i + 1])) for part in parts for i in range(0, len(part), 2) if part[i + 1] != _NO_TOKEN]
    pairs.sort(key=lambda pair: (-pair[0], pair[1]))
    return tuple([(token_id, softmax.log_probability(logit)) for logit, token_id in pairs[:count]])
