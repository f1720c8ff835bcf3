"""Builders for tests of the engine without a model."""

from collections.abc import Sequence

from model_parallel.config import AdapterConfig, CacheConfig, DraftConfig, SchedulerConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.request import EngineOutput, EngineRequest, FinishReason, SamplingParams, TokenLogprobs
from model_parallel.engine.scheduler import Scheduler
from model_parallel.engine.speculation import Drafter
from tests.support.fake_executor import FakeExecutor


class ManualClock:
    """A monotonic clock that moves when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Harness:
    """An engine on fake ranks, and everything that it has put out."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        enable_prefix_caching: bool = True,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_model_len: int = 128,
        max_waiting_requests: int = 64,
        max_waiting_tokens: int = 1 << 20,
        max_prefill_chunk: int = 1 << 30,
        max_prefill_tokens: int | None = None,
        max_in_flight: int = 1,
        max_grammars: int = 64,
        adapters: AdapterConfig | None = None,
        speculation: str = "off",
        draft: DraftConfig | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.clock = ManualClock()
        self.executor = FakeExecutor(
            num_blocks=num_blocks, block_size=block_size, max_tokens_a_step=max_num_batched_tokens
        )
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=max_model_len,
                max_waiting_requests=max_waiting_requests,
                max_waiting_tokens=max_waiting_tokens,
                max_prefill_chunk=max_prefill_chunk,
                max_prefill_tokens=max_prefill_tokens,
                max_grammars=max_grammars,
                speculation=speculation,
            ),
            CacheConfig(num_blocks=num_blocks, block_size=block_size, enable_prefix_caching=enable_prefix_caching),
            epoch=1,
            clock=self.clock,
            adapters=adapters,
            draft=draft,
            drafter=drafter,
        )
        self.executor.max_adapters = 0 if adapters is None else adapters.max_loaded
        self.engine = Engine(self.executor, self.scheduler, max_in_flight=max_in_flight)
        self.outputs: dict[str, list[EngineOutput]] = {}

    def add(self, request: EngineRequest) -> None:
        self.executor.salts[request.sampling.seed] = request.cache_salt
        self.engine.add(request)
        self.outputs[request.request_id] = []

    def step(self) -> list[EngineOutput]:
        outputs = self.engine.step()
        for output in outputs:
            self.outputs[output.request_id].append(output)
        self.engine.check_integrity()
        return outputs

    def run(self, max_steps: int = 2000) -> None:
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError(f"still at work after {max_steps} steps")

    def tokens(self, request_id: str) -> list[int]:
        return [token_id for output in self.outputs[request_id] for token_id in output.token_ids]

    def prompt_logprobs(self, request_id: str) -> list[TokenLogprobs]:
        return [logprobs for output in self.outputs[request_id] for logprobs in output.prompt_logprobs]

    def last(self, request_id: str) -> EngineOutput:
        """The one terminal output of a request that has ended."""
        terminal = [output for output in self.outputs[request_id] if output.finish_reason is not None]
        assert terminal == self.outputs[request_id][-1:]
        return terminal[0]

    def finish_reason(self, request_id: str) -> FinishReason | None:
        return self.last(request_id).finish_reason


def make_request(
    request_id: str,
    prompt: Sequence[int],
    *,
    max_tokens: int = 4,
    seed: int | None = None,
    output: Sequence[int] = (),
    eos: Sequence[int] = (),
    stops: Sequence[int] = (),
    ignore_eos: bool = False,
    salt: bytes = b"",
    tenant: str = "",
    weight: float = 1.0,
    priority: int = 0,
    deadline_s: float | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    prompt_logprobs_start: int = 1,
    grammar: str = "",
) -> EngineRequest:
    """A request; the seed, by which the fake ranks know it, is the request id's number unless given."""
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        output_token_ids=tuple(output),
        eos_token_ids=tuple(eos),
        cache_salt=salt,
        tenant=tenant,
        weight=weight,
        priority=priority,
        deadline_s=deadline_s,
        grammar=grammar,
        sampling=SamplingParams(
            seed=int(request_id.strip("abcdefghijklmnopqrstuvwxyz") or 0) if seed is None else seed,
            max_tokens=max_tokens,
            stop_token_ids=tuple(stops),
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            prompt_logprobs_start=prompt_logprobs_start,
        ),
    )
