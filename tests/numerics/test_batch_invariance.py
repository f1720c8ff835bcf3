"""A sequence's logits on the CPU kernels in bfloat16: the same bits, whatever is computed beside it, in whatever pieces."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from model_parallel.collectives.interface import SoloCollectives
from model_parallel.collectives.shared_memory.segment import SharedMemoryCollectives
from model_parallel.engine.messages import Row
from model_parallel.engine.request import EngineRequest, SamplingParams
from model_parallel.kernels.cpu import CpuKernels
from model_parallel.runtime.leader import store_file
from model_parallel.runtime.rank import Rank
from model_parallel.runtime.recorded_steps import RecordedSteps
from tests.support.drafts import ScriptedDrafter
from tests.support.effort import rest_by_night
from tests.support.kernels import use_backend
from tests.support.local_engine import LocalGroup
from tests.support.ranks import save_random_llama

VOCAB_SIZE, BLOCK_SIZE = 515, 16
NUM_NEW = 8
WHOLE = 1 << 30


class WatchedRank(Rank):
    """Keeps its part of the logits of one prompt's sequence, at every position that is computed."""

    prompt: tuple[int, ...] = ()

    def watch(self, prompt: tuple[int, ...]) -> None:
        self.prompt = prompt
        self.seen: dict[int, Tensor] = {}

    def _forward(self, rows: tuple[Row, ...]) -> Tensor:
        hidden_TE = super()._forward(rows)
        first_row = 0
        for row in rows:
            state = self.sequences[row.seq_id]
            if tuple(state.token_ids[: state.num_prompt_tokens]) == self.prompt:
                logits = self.model.logits(hidden_TE[first_row : first_row + row.num_tokens])
                self.seen.update(zip(range(row.start, row.start + row.num_tokens), logits.clone(), strict=True))
            first_row += row.num_tokens
        return hidden_TE


class WatchedGroup:
    """Ranks with the collectives of processes on one host, so that decode steps are recorded as they are in service."""

    def __init__(self, path: Path, tp_size: int, store: str) -> None:
        self.ranks: dict[int, WatchedRank] = {}
        self.answer: list[int] = []
        """The tokens that were drawn last."""

        def make(config: Any, rank: int, *_: object) -> WatchedRank:
            shared = SharedMemoryCollectives(store, rank, tp_size, timeout_s=60) if tp_size > 1 else SoloCollectives()
            self.ranks[rank] = WatchedRank(config, rank, shared)
            return self.ranks[rank]

        self.group = LocalGroup(path, tp_size, dtype="bfloat16", num_blocks=512, rank_factory=make)
        for rank in self.ranks.values():
            assert isinstance(rank.kernels, CpuKernels) and isinstance(rank.graphs, RecordedSteps)

    def recorded_sizes(self) -> set[int]:
        graphs = self.ranks[0].graphs
        assert isinstance(graphs, RecordedSteps)
        return set(graphs._steps)

    def logits(self, wanted: EngineRequest, others: list[EngineRequest], **how: Any) -> tuple[dict[int, Tensor], int]:
        """By position, over the whole vocabulary; and how many positions came from the prefix cache."""
        for rank in self.ranks.values():
            rank.watch(wanted.prompt_token_ids)
        outcome = self.group.run([*others[: len(others) // 2], wanted, *others[len(others) // 2 :]], **how)
        self.answer = outcome.tokens(wanted.request_id)
        parts = [self.ranks[rank].seen for rank in range(len(self.ranks))]
        assert all(part.keys() == parts[0].keys() for part in parts)
        num_cached = outcome.last(wanted.request_id).num_cached_tokens
        return {position: torch.cat([part[position] for part in parts]) for position in parts[0]}, num_cached


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_random_llama(path, num_attention_heads=9, num_key_value_heads=3, head_dim=16, hidden_size=144)
    return path


CASES = [(backend, tp_size) for backend in ("cpu", "cpu-avx2", "cpu-scalar") for tp_size in (1, 2, 3)]
DAILY = [("cpu", 1), ("cpu", 2), ("cpu", 3), ("cpu-avx2", 2)]


@pytest.fixture(scope="module", params=rest_by_night(CASES, by_day=DAILY), ids=lambda case: f"{case[0]}-tp{case[1]}")
def group(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[WatchedGroup]:
    with pytest.MonkeyPatch.context() as monkeypatch, store_file() as store:
        backend, tp_size = request.param
        use_backend(monkeypatch, backend)
        watched = WatchedGroup(checkpoint, tp_size, store)
        yield watched
        watched.group.close()


@dataclass(frozen=True)
class Case:
    """How the sequence is computed."""

    prompt_len: int
    chunk: int
    num_others: int
    has_prefix_hit: bool
    num_drafts: int = 0
    """Rows that the sequence brings into a step of decode besides its own, every third of them with a wrong token."""
    seed: int = 0


CASES = st.builds(
    Case,
    prompt_len=st.integers(1, 200),
    chunk=st.sampled_from([1, 7, 64, WHOLE]),
    num_others=st.sampled_from([0, 1, 31]),
    has_prefix_hit=st.booleans(),
    num_drafts=st.sampled_from([0, 0, 1, 3, 7]),
    seed=st.integers(0, 99),
)


def request(name: str, prompt: list[int], max_tokens: int) -> EngineRequest:
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return EngineRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling, eos_token_ids=(2,))


@example(Case(prompt_len=130, chunk=1, num_others=31, has_prefix_hit=True))
@example(Case(prompt_len=130, chunk=7, num_others=31, has_prefix_hit=True))
@example(Case(prompt_len=130, chunk=64, num_others=31, has_prefix_hit=True))
@example(Case(prompt_len=130, chunk=WHOLE, num_others=31, has_prefix_hit=True))
@example(Case(prompt_len=130, chunk=WHOLE, num_others=31, has_prefix_hit=False))
@example(Case(prompt_len=130, chunk=1, num_others=0, has_prefix_hit=False))
@example(Case(prompt_len=130, chunk=64, num_others=0, has_prefix_hit=False, num_drafts=7))
@example(Case(prompt_len=130, chunk=64, num_others=31, has_prefix_hit=True, num_drafts=3))
@given(CASES)
def test_logits_are_those_of_the_sequence_alone(group: WatchedGroup, case: Case) -> None:
    draw = torch.Generator().manual_seed(case.seed)

    def tokens(num: int) -> list[int]:
        return torch.randint(3, VOCAB_SIZE, (num,), generator=draw).tolist()

    prompt = tokens(case.prompt_len)
    wanted = request("it", prompt, NUM_NEW)
    alone, _ = group.logits(wanted, [])
    answer = group.answer
    assert alone.keys() == set(range(case.prompt_len + NUM_NEW - 1))
    assert all(logits.shape == (VOCAB_SIZE,) and logits.isfinite().all() for logits in alone.values())

    # Short ones, which are decoded already while long ones are still read, and which outlive the one that is watched.
    lengths = torch.randint(1, 60, (case.num_others,), generator=draw).tolist()
    others = [request(f"n{i}", tokens(length), 12 + i % 5) for i, length in enumerate(lengths)]
    # It has the whole blocks of the prompt but the last, which is never found: its last token must be computed.
    num_shared = (case.prompt_len - 1) // BLOCK_SIZE * BLOCK_SIZE
    primer = request("primer", [*prompt[:num_shared], 0], 1)
    drafter = ScriptedDrafter(
        lambda run, number: answer[len(run.token_ids) - case.prompt_len :][:number] if run.request == wanted else [],
        num_drafts=lambda run: case.num_drafts,
        errs_at=lambda run, position: position % 3 == 0,
    )
    among, num_cached = group.logits(
        wanted,
        others,
        drafter=drafter if case.num_drafts else None,
        max_prefill_chunk=case.chunk,
        prefix_caching=case.has_prefix_hit,
        before=[primer] if case.has_prefix_hit else [],
    )
    assert num_cached == (num_shared if case.has_prefix_hit else 0)
    assert among.keys() == set(range(num_cached, case.prompt_len + NUM_NEW - 1))
    different = [position for position, logits in among.items() if not torch.equal(logits, alone[position])]
    assert not different
    assert group.answer == answer
    if case.num_others == 31 and not case.num_drafts:
        assert 32 in group.recorded_sizes(), "all of them were decoded together, as one native call"
