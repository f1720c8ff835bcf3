"""Case 49: what another tenant has cached cannot be told from how long a first token takes, with real ranks and a real clock."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scipy import stats

from model_parallel.config import CacheConfig, SchedulerConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.request import EngineRequest, SamplingParams
from model_parallel.engine.scheduler import Scheduler
from tests.support.local_engine import LocalGroup
from tests.support.ranks import save_random_llama

NUM_PROBES = 2000
PROMPT_LENGTH = 200
MAX_AUC = 0.55
VOCAB_SIZE = 256


class Prober:
    """One engine whose time to the first token can be measured."""

    def __init__(self, group: LocalGroup) -> None:
        config = SchedulerConfig(max_model_len=1024, max_num_batched_tokens=256)
        cache = CacheConfig(num_blocks=group.config.cache.num_blocks, block_size=16, enable_prefix_caching=True)
        self._engine = Engine(group.executor, Scheduler(config, cache, epoch=1))
        self._num_requests = 0

    def ttft_s(self, tenant: str, prompt: tuple[int, ...]) -> float:
        """Of a request for one token."""
        self._num_requests += 1
        request = EngineRequest(
            request_id=str(self._num_requests), prompt_token_ids=prompt, tenant=tenant, cache_salt=tenant.encode(),
            sampling=SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
        )  # fmt: skip
        start = time.perf_counter()
        self._engine.add(request)
        while self._engine.has_work:
            self._engine.step()
        return time.perf_counter() - start


@pytest.fixture(scope="module")
def prober(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prober]:
    path: Path = tmp_path_factory.mktemp("model")
    save_random_llama(path)
    group = LocalGroup(path, 1)
    yield Prober(group)
    group.close()


def auc(prober: Prober, asks: str, num_probes: int) -> float:
    """How often a probe of what the victim has just asked is faster than one of what nobody has: 0.5 is a guess."""
    rng = random.Random(1)
    known: list[float] = []
    new: list[float] = []
    for index in range(num_probes):
        prompt, other = (tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(PROMPT_LENGTH)) for _ in range(2))
        prober.ttft_s("victim", prompt)
        if index % 2:
            known.append(prober.ttft_s(asks, prompt))
        else:
            new.append(prober.ttft_s(asks, other))
    return float(stats.mannwhitneyu(new, known).statistic) / (len(new) * len(known))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_prober_learns_nothing_of_another_tenant(prober: Prober) -> None:
    assert auc(prober, "victim", NUM_PROBES // 10) > 0.95, "the measurement would see a hit"
    assert abs(auc(prober, "prober", NUM_PROBES) - 0.5) <= MAX_AUC - 0.5
