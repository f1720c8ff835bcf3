"""Random schedules on fake ranks that simulate the KV cache: whatever happens, outputs are those of a solo run."""

import random
from collections import Counter

import msgspec
import pytest

from model_parallel.config import AdapterConfig
from model_parallel.engine.request import AdapterRef, EngineRequest, FinishReason
from model_parallel.engine.speculation import Drafter
from model_parallel.errors import RequestError
from tests.support.drafts import AskingDrafter, ScriptedDrafter
from tests.support.effort import by_day
from tests.support.engine import Harness, make_request
from tests.support.fake_executor import VOCAB_SIZE, foretell, solo_output, solo_prompt_logprobs

# A few stems, so that prompts share prefixes of every length.
STEMS = [[n % 7 for n in range(40)], [n % 7 for n in range(9)] + [n % 5 for n in range(31)]]
SOME_TOKENS = tuple(range(0, VOCAB_SIZE, 9))
WEIGHTS = {"a": 1.0, "b": 0.5, "c": 4.0}
ADAPTERS = [AdapterRef(f"{n:064x}", f"/adapters/{n}") for n in range(6)]
NUM_RUNS = by_day(20, by_night=1500)


class RandomRun:
    """Adds, aborts, waits and steps as one seed says, on a cache that is often too small."""

    def __init__(self, seed: int, *, drafts: str = "") -> None:
        """`drafts` are "told" by one who knows the answers, "proposed" by a draft model, or there are none."""
        self.rng = random.Random(seed)
        self.draw = random.Random(-seed)
        """Of what concerns adapters."""
        self.drafts = drafts
        dice = random.Random(seed + 1)
        drafters: dict[str, Drafter | None] = {
            "": None,
            "told": ScriptedDrafter(
                lambda run, number: foretell(run.token_ids, run.request.sampling.seed, number),
                num_drafts=lambda run: dice.randint(0, 6),
                errs_at=lambda run, position: dice.random() < 0.2,
            ),
            "proposed": AskingDrafter(lambda run: dice.randint(0, 6)),
        }
        max_num_seqs = self.rng.randint(2, 6)
        block_size = self.rng.randint(1, 5)
        self.harness = Harness(
            num_blocks=self.rng.randint(40, 70) // block_size,
            block_size=block_size,
            enable_prefix_caching=self.rng.random() < 0.8,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + self.rng.choice([0, 1, 10, 60]),
            max_prefill_chunk=self.rng.choice([1, 3, 7, 1 << 30]),
            max_prefill_tokens=self.rng.choice([None, None, 2, 9]),
            max_model_len=60,
            max_waiting_requests=8,
            max_in_flight=self.rng.choice([1, 2, 2, 3]),
            adapters=self.draw.choice([None, AdapterConfig(max_loaded=2), AdapterConfig(max_loaded=9, max_bytes=25)]),
            drafter=drafters[drafts],
        )
        self.takes_adapters = self.harness.executor.max_adapters > 0
        self.harness.executor.num_steps_to_load = self.draw.choice([0, 1, 4])
        self.harness.executor.broken_adapters.add(ADAPTERS[0].digest)
        self.harness.executor.during_step = self.during_step
        self.requests: list[EngineRequest] = []
        self.aborted: dict[str, FinishReason] = {}
        self.seen: Counter[str] = Counter()

    def run(self) -> None:
        for _ in range(60):
            acts = [self.add, self.abort, self.wait, self.pause, self.resume, self.harness.step]
            self.rng.choices(acts, [10, 1, 1, 2, 2, 16])[0]()
        self.harness.run()
        while self.harness.engine.num_paused:  # a step may pause another one
            self.harness.engine.resume(*(request.request_id for request in self.requests))
            self.harness.run()
        for request in self.requests:
            self.check(request)
        stats = self.harness.engine.stats
        assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)
        assert not self.harness.executor.sequences
        rows = [row for plan in self.harness.executor.plans for row in plan.rows]
        num_drafted, num_tokens = sum(len(row.draft_token_ids) for row in rows), stats.num_generation_tokens
        assert num_tokens == sum(len(self.harness.tokens(request.request_id)) for request in self.requests)
        assert stats.num_draft_tokens == num_drafted and num_drafted <= 10_000 * bool(self.drafts)
        assert stats.num_accepted_tokens <= num_drafted
        self.seen["sampled too much"] = sum(row.sample for row in rows) + stats.num_accepted_tokens - num_tokens
        self.seen["accepted"], self.seen["rejected"] = (
            stats.num_accepted_tokens,
            num_drafted - stats.num_accepted_tokens,
        )
        self.seen["pause"] = stats.num_pauses
        self.seen["preemption"] = stats.num_preemptions
        self.seen["prefix hit"] = stats.num_prefix_hit_tokens
        self.seen["adapter drop"] = sum(len(plan.adapters_to_drop) for plan in self.harness.executor.plans)

    def add(self) -> None:
        rng = self.rng
        tenant = rng.choice("aaaaaaabc")
        wants_prompt_logprobs = rng.random() < 0.3
        request = make_request(
            f"r{len(self.requests)}",
            rng.choice(STEMS)[: rng.randint(0, 32)] + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 2))],
            max_tokens=rng.choice([0, 1, 2, 8, 16, 30]),
            output=[3] * rng.choice([0, 0, 0, 1, 2]),
            eos=SOME_TOKENS if rng.random() < 0.3 else (),
            stops=(1, 2) if rng.random() < 0.2 else (),
            ignore_eos=rng.random() < 0.3,
            salt=rng.choice([b"", b"tenant"]),
            tenant=tenant,
            weight=WEIGHTS[tenant],
            priority=rng.choice([0, 0, 0, 1]),
            deadline_s=rng.choice([0.0, 3.0, 20.0]) if rng.random() < 0.1 else None,
            logprobs=0,
            prompt_logprobs=0 if wants_prompt_logprobs else None,
            prompt_logprobs_start=rng.choice([0, 1, 5, 17, 50]),
        )
        try:
            if self.takes_adapters and self.draw.random() < 0.6:
                ref = self.draw.choices(ADAPTERS, [1, 9, 5, 5, 5, 5])[0]
                self.harness.scheduler.adapters.know(ref, num_bytes=1 + 3 * ADAPTERS.index(ref))
                request = msgspec.structs.replace(request, adapter=ref)
            self.harness.add(request)
        except RequestError as error:
            self.seen[error.kind] += 1
            return
        self.requests.append(request)
        if rng.random() < 0.05:
            self.harness.executor.poisoned_seeds.add(request.sampling.seed)

    def abort(self) -> None:
        if not self.requests:
            return
        request = self.rng.choice(self.requests)
        request_id = request.request_id
        reason = self.rng.choice([FinishReason.CANCELLED, FinishReason.STOP])
        had_ended = request_id in self.aborted or any(o.finish_reason for o in self.harness.outputs[request_id])
        if self.harness.engine.abort(request_id, reason):
            assert not had_ended
            self.aborted[request_id] = reason
        else:  # Or it expired when the step was planned, and its last output is still to come.
            assert had_ended or request.deadline_s is not None

    def during_step(self) -> None:
        self.seen["light"] += sum(sequence.is_below_fair_share for sequence in self.harness.scheduler._running.values())
        if self.rng.random() < 0.02:
            self.abort()
        if self.rng.random() < 0.02:
            self.pause()

    def pause(self) -> None:
        if self.requests:
            self.harness.engine.pause(self.rng.choice(self.requests).request_id)

    def resume(self) -> None:
        if self.requests:
            self.harness.engine.resume(*(r.request_id for r in self.rng.sample(self.requests, len(self.requests) // 2)))

    def wait(self) -> None:
        self.harness.clock.now_s += self.rng.choice([0.5, 4.0])

    def check(self, request: EngineRequest) -> None:
        harness, request_id = self.harness, request.request_id
        tokens, solo = harness.tokens(request_id), solo_output(request)
        prompt_logprobs, solo_logprobs = harness.prompt_logprobs(request_id), solo_prompt_logprobs(request)
        assert tokens == solo[: len(tokens)]
        assert prompt_logprobs == solo_logprobs[: len(prompt_logprobs)]
        assert [entry.token_id for o in harness.outputs[request_id] for entry in o.logprobs] == tokens
        last = harness.last(request_id)
        assert last.timings is not None
        assert last.num_cached_tokens <= len(request.prompt_token_ids)
        assert last.num_accepted_tokens < max(1, len(tokens))
        is_poisoned = request.sampling.seed in harness.executor.poisoned_seeds
        self.seen[str(last.finish_reason)] += 1
        if request_id in self.aborted:
            assert last.finish_reason is self.aborted[request_id]
        elif last.finish_reason is FinishReason.DEADLINE:
            assert request.deadline_s is not None
        elif last.error_kind == "adapter_failed":
            assert request.adapter == ADAPTERS[0]
            self.seen["no adapter"] += 1
        elif is_poisoned:
            assert (last.finish_reason, last.error_kind) == (FinishReason.ERROR, "numerical_error")
        else:
            assert (tokens, prompt_logprobs) == (solo, solo_logprobs)
            stops = {*request.sampling.stop_token_ids}
            if not request.sampling.ignore_eos:
                stops |= {*request.eos_token_ids}
            stopped = bool(solo) and solo[-1] in stops
            assert last.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
            assert last.stop_token_id == (solo[-1] if stopped else None)


@pytest.mark.parametrize("drafts", ["", "told", "proposed"])
def test_random_schedules(drafts: str) -> None:
    seen: Counter[str] = Counter()
    for seed in range(NUM_RUNS):
        run = RandomRun(seed, drafts=drafts)
        try:
            run.run()
        except Exception as error:
            raise AssertionError(f"RandomRun({seed}, drafts={drafts!r}).run() failed") from error
        seen += run.seen
    # A run that forces nothing proves nothing.
    for event in (
        "light",
        "pause",
        "preemption",
        "prefix hit",
        "sampled too much",
        "invalid",
        "no adapter",
        "adapter drop",
        "overloaded",
        *(["accepted", "rejected"] if drafts else []),
        *FinishReason,
    ):
        assert seen[str(event)] > NUM_RUNS // 8, f"{event}: {seen}"
