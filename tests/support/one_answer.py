"""Whether an answer is the same however an engine came to it."""

import torch

from model_parallel.engine.request import EngineRequest, SamplingParams
from tests.support.local_engine import LocalGroup

NUM_NEW = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=7, max_tokens=NUM_NEW, ignore_eos=True)
PLAIN = SamplingParams(
    temperature=1.1, seed=3, frequency_penalty=0.4, repetition_penalty=1.1, max_tokens=NUM_NEW, ignore_eos=True
)
SAMPLINGS = {"greedy": GREEDY, "filtered": SEEDED, "penalised": PLAIN}


def random_prompts(vocab_size: int, lengths: list[int]) -> list[tuple[int, ...]]:
    draw = torch.Generator().manual_seed(11)
    return [tuple(torch.randint(3, vocab_size, (n,), generator=draw).tolist()) for n in lengths]


def request(name: str, prompt: tuple[int, ...], sampling: SamplingParams) -> EngineRequest:
    return EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling, eos_token_ids=(2,))


def check_one_answer(group: LocalGroup, sampling: SamplingParams) -> None:
    """Of a vocabulary of 515 tokens: alone, in a batch, in chunks, after a preemption, on a prefix-cache hit, resumed."""
    prompt, *others = random_prompts(515, [90, *(3 + 9 * i for i in range(15))])
    wanted = request("it", prompt, sampling)
    alone = group.run([wanted]).tokens("it")
    kinds = [GREEDY, SEEDED, PLAIN]
    neighbours = [request(f"n{i}", other, kinds[i % 3]) for i, other in enumerate(others)]

    assert group.run([*neighbours[:7], wanted, *neighbours[7:]]).tokens("it") == alone, "in a batch of 16"
    for chunk in (1, 7, 64):
        assert group.run([wanted], max_prefill_chunk=chunk).tokens("it") == alone, f"prefilled {chunk} tokens at a time"
    crowded = group.run([neighbours[3], neighbours[4], wanted], num_blocks=12)
    assert crowded.num_preemptions > 0
    assert crowded.tokens("it") == alone, "after a preemption"
    again = request("again", prompt, sampling)
    cached = group.run([wanted, again], prefix_caching=True, waves=[1])
    assert cached.last("again").num_cached_tokens == 80
    assert cached.tokens("again") == alone, "on a prefix-cache hit"
    resumed = EngineRequest(
        request_id="rest",
        prompt_token_ids=prompt,
        sampling=sampling,
        output_token_ids=tuple(alone[:20]),
        eos_token_ids=(2,),
    )
    assert group.run([resumed]).tokens("rest") == alone[20:], "resumed after 20 tokens"
