"""Ranks on a CUDA device. Several of them share one device as threads; NCCL needs a device a rank."""

from pathlib import Path

import pytest
import torch

from model_parallel.config import CacheConfig, SchedulerConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.request import EngineRequest, SamplingParams
from model_parallel.engine.scheduler import Scheduler
from model_parallel.runtime.executors import SpawnedExecutor
from tests.support.ranks import group_config, prompt_logits, save_random_llama

pytestmark = pytest.mark.gpu

GQA = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16, "hidden_size": 144}
# float32 without TF32, which torch leaves off for matrix products unless told otherwise; sums run in another order.
MAX_LOGIT_ERROR = 1e-3


def _ids() -> list[int]:
    return torch.randint(0, 515, (200,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("tp_size", [1, 2, 3, 5])
def test_logits_are_those_of_the_cpu(tp_size: int, tmp_path: Path) -> None:
    save_random_llama(tmp_path, **GQA)
    on_cpu = prompt_logits(group_config(tmp_path, 1), _ids(), chunk=200)
    on_gpu = prompt_logits(group_config(tmp_path, tp_size, device="cuda"), _ids(), chunk=64).cpu()
    assert (on_gpu - on_cpu).abs().max() <= MAX_LOGIT_ERROR


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_on_most_tokens(dtype: str, tmp_path: Path) -> None:
    save_random_llama(tmp_path, **GQA)
    on_cpu = prompt_logits(group_config(tmp_path, 1), _ids(), chunk=200)
    on_gpu = prompt_logits(group_config(tmp_path, 2, device="cuda", dtype=dtype), _ids(), chunk=200).cpu()
    assert (on_gpu.argmax(-1) == on_cpu.argmax(-1)).float().mean() >= 0.9


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_spawned_group_answers_as_transformers_does(tp_size: int, tmp_path: Path) -> None:
    """TP=1 without collectives, TP=2 over NCCL."""
    if torch.cuda.device_count() < tp_size:
        pytest.skip(f"NCCL needs a device a rank: {tp_size} are needed, {torch.cuda.device_count()} are here")
    model = save_random_llama(tmp_path, **GQA)
    prompt = tuple(_ids()[:50])
    config = group_config(tmp_path, tp_size, device="cuda")
    executor = SpawnedExecutor(config)
    engine = Engine(executor, Scheduler(SchedulerConfig(max_model_len=512), CacheConfig(num_blocks=64), epoch=1))
    sampling = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    engine.add(EngineRequest(request_id="it", prompt_token_ids=prompt, sampling=sampling))
    answer: list[int] = []
    while engine.has_work:
        for output in engine.step():
            answer += output.token_ids
    executor.shutdown()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
