"""Real ranks and a request whose numbers are not finite, with steps planned ahead of its failure."""

from pathlib import Path

import pytest
import torch

from model_parallel.engine.request import FinishReason
from tests.support.engine import make_request
from tests.support.local_engine import LocalGroup
from tests.support.ranks import save_random_llama

POISON = 7
"""A token whose embedding is not finite."""


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_poisoned_sequence_ends_alone(tmp_path: Path, tp_size: int) -> None:
    model = save_random_llama(tmp_path)
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = float("nan")
    model.save_pretrained(tmp_path)
    group = LocalGroup(tmp_path, tp_size)
    healthy = [make_request(f"r{n}", [3, 5, 11 + n], max_tokens=8, ignore_eos=True) for n in (1, 2)]
    poisoned = make_request("r3", [3, 5, POISON], max_tokens=8, logprobs=1, prompt_logprobs=1)
    alone = group.run(healthy)
    together = group.run([healthy[0], poisoned, healthy[1]])
    for request in healthy:
        tokens = together.tokens(request.request_id)
        assert POISON not in tokens
        assert tokens == alone.tokens(request.request_id)
    last = together.last("r3")
    assert (last.finish_reason, last.error_kind) == (FinishReason.ERROR, "numerical_error")
    group.close()
