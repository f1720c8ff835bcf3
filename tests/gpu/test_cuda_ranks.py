"""Ranks on a CUDA device. Several of them share one device, as threads or over Gloo; NCCL needs a device a rank."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model_parallel.collectives.interface import SoloCollectives
from model_parallel.config import CacheConfig, GroupConfig, SchedulerConfig
from model_parallel.engine.engine import Engine
from model_parallel.engine.executor import Executor
from model_parallel.engine.request import EngineRequest, SamplingParams
from model_parallel.engine.scheduler import Scheduler
from model_parallel.errors import ConfigError
from model_parallel.gpus import OLDEST_WITH_FP8
from model_parallel.kernels.reference import ReferenceKernels
from model_parallel.runtime.cuda_graphs import DecodeGraphs
from model_parallel.runtime.executors import InProcessExecutor, SpawnedExecutor
from model_parallel.runtime.rank import Rank
from tests.support.local_engine import LocalGroup
from tests.support.one_answer import SAMPLINGS, check_one_answer
from tests.support.ranks import group_config, prompt_logits, save_random_llama

pytestmark = pytest.mark.gpu

GQA = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16, "hidden_size": 144}
# float32 without TF32, which torch leaves off for matrix products unless told otherwise; sums run in another order.
MAX_LOGIT_ERROR = 1e-3


def _ids(count: int = 200, seed: int = 1) -> list[int]:
    return torch.randint(0, 515, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _answers(executor: Executor, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[int]]:
    """What an engine answers to prompts that come at once."""
    engine = Engine(executor, Scheduler(SchedulerConfig(max_model_len=512), CacheConfig(num_blocks=64), epoch=1))
    for index, prompt in enumerate(prompts):
        engine.add(EngineRequest(request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling))
    answers: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step():
            answers[int(output.request_id)] += output.token_ids
    engine.check_integrity()
    return answers


def _generate(config: GroupConfig, prompts: Sequence[Sequence[int]], *, with_graphs: bool = True) -> list[list[int]]:
    executor = InProcessExecutor(config)
    rank = executor._workers[0]
    assert isinstance(rank, Rank)
    if config.parallel.device == "cuda":
        assert isinstance(rank.graphs, DecodeGraphs) and rank.kernels_name == "cuda"
        rank.graphs = rank.graphs if with_graphs else None
    try:
        return _answers(executor, prompts, SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True))
    finally:
        executor.shutdown()


@pytest.mark.parametrize("tp_size", [1, 2, 3, 5])
def test_logits_are_those_of_the_cpu(tp_size: int, tmp_path: Path) -> None:
    save_random_llama(tmp_path, **GQA)
    on_cpu = prompt_logits(group_config(tmp_path, 1), _ids(), chunk=200)
    on_gpu = prompt_logits(group_config(tmp_path, tp_size, device="cuda"), _ids(), chunk=64).cpu()
    assert (on_gpu - on_cpu).abs().max() <= MAX_LOGIT_ERROR


def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    model = save_random_llama(tmp_path, **GQA)
    with torch.no_grad():
        expected = model(torch.tensor([_ids()])).logits[0]
    on_gpu = prompt_logits(group_config(tmp_path, 1, device="cuda"), _ids(), chunk=64).cpu()
    assert (on_gpu - expected).abs().max() <= MAX_LOGIT_ERROR


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_errs_no_more_than_transformers(dtype: str, tp_size: int, tmp_path: Path) -> None:
    model = save_random_llama(tmp_path, **GQA)
    with torch.no_grad():
        expected = model(torch.tensor([_ids()])).logits[0]
        model.to(device="cuda", dtype=getattr(torch, dtype))
        theirs = model(torch.tensor([_ids()], device="cuda")).logits[0].float().cpu()
    ours = prompt_logits(group_config(tmp_path, tp_size, device="cuda", dtype=dtype), _ids(), chunk=200).cpu()
    assert (ours - expected).abs().mean() <= 1.05 * (theirs - expected).abs().mean()


def test_int8_logits_are_those_of_the_cpu(tmp_path: Path) -> None:
    save_random_llama(tmp_path, **GQA)
    configs = [group_config(tmp_path, 1, device=device) for device in ("cpu", "cuda")]
    configs = [replace(c, parallel=replace(c.parallel, quantization="int8")) for c in configs]
    on_cpu, on_gpu = (prompt_logits(config, _ids(), chunk=50).cpu() for config in configs)
    assert (on_gpu - on_cpu).abs().max() <= MAX_LOGIT_ERROR


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < OLDEST_WITH_FP8,
    reason="the device has no products of e4m3 numbers",
)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_fp8_logits_are_those_of_the_reference_kernels(tp_size: int, tmp_path: Path) -> None:
    """On a CPU. A sum in another order may take a number to the next e4m3 number; in one layer few follow."""
    save_random_llama(tmp_path, **GQA, num_hidden_layers=1)
    config = group_config(tmp_path, tp_size, quantization="fp8")
    exact = prompt_logits(group_config(tmp_path, 1), _ids(), chunk=200)
    expected = prompt_logits(config, _ids(), 50, lambda: ReferenceKernels(num_threads=1, device="cpu"))
    on_gpu = prompt_logits(group_config(tmp_path, tp_size, device="cuda", quantization="fp8"), _ids(), chunk=50).cpu()
    assert (on_gpu - expected).norm() < 0.3 * (expected - exact).norm()


def test_graphs_change_no_token(tmp_path: Path) -> None:
    """Four sequences, so that a step has as many rows with graphs as without."""
    save_random_llama(tmp_path, **GQA)
    prompts = [_ids(20 + 31 * i, seed=i) for i in range(4)]
    config = group_config(tmp_path, 1, device="cuda")
    assert _generate(config, prompts) == _generate(config, prompts, with_graphs=False)


@pytest.mark.parametrize("num_sequences", [1, 3, 7])
def test_whole_answers_are_those_of_the_cpu(num_sequences: int, tmp_path: Path) -> None:
    """With steps that are padded, and prompts that come in chunks beside sequences that decode."""
    save_random_llama(tmp_path, **GQA)
    prompts = [_ids(5 + 37 * i, seed=i) for i in range(num_sequences)]
    on_gpu = _generate(group_config(tmp_path, 1, device="cuda"), prompts)
    assert on_gpu == _generate(group_config(tmp_path, 1), prompts)


def test_sampling_draws_the_same_tokens_as_on_the_cpu(tmp_path: Path) -> None:
    save_random_llama(tmp_path, **GQA)
    sampling = SamplingParams(
        temperature=0.8, top_p=0.9, max_tokens=24, ignore_eos=True, repetition_penalty=1.1, seed=3
    )
    answers = []
    for device in ("cpu", "cuda"):
        executor = InProcessExecutor(group_config(tmp_path, 1, device=device))
        answers.append(_answers(executor, [_ids(30), _ids(9, seed=2)], sampling))
        executor.shutdown()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("quantization", ["", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_deterministic_answer_does_not_depend_on_how_it_was_computed(
    tp_size: int, dtype: str, quantization: str, tmp_path: Path
) -> None:
    """With graphs at TP=1. At TP=2 ranks are threads that share the device."""
    save_random_llama(tmp_path, **GQA)
    group = LocalGroup(
        tmp_path, tp_size, dtype=dtype, quantization=quantization, device="cuda", deterministic=True, num_blocks=256
    )
    try:
        assert group.kernels_name.startswith("cuda-invariant sm_") and group.is_deterministic
        for sampling in SAMPLINGS.values():
            check_one_answer(group, sampling)
    finally:
        group.close()


def test_deterministic_logits_are_those_of_the_cpu(tmp_path: Path) -> None:
    save_random_llama(tmp_path, **GQA)
    on_cpu = prompt_logits(group_config(tmp_path, 1), _ids(), chunk=200)
    on_gpu = prompt_logits(group_config(tmp_path, 1, device="cuda", deterministic=True), _ids(), chunk=64).cpu()
    assert (on_gpu - on_cpu).abs().max() <= MAX_LOGIT_ERROR


def test_a_cache_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_random_llama(tmp_path, **GQA)
    num_blocks = 1 << 34
    config = group_config(tmp_path, 1, device="cuda", num_blocks=num_blocks)
    with pytest.raises(ConfigError, match=rf"cache\.num_blocks is {num_blocks}.* GiB are free"):
        Rank(config, 0, SoloCollectives())


@pytest.mark.parametrize("devices", ["0", "0,0", "0,1"])
def test_a_spawned_group_answers_as_transformers_does(
    devices: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks talk over Gloo on one device; on two over NCCL, with sums through symmetric memory where there is any."""
    if int(devices[-1]) >= torch.cuda.device_count():
        pytest.skip("there is one device")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    tp_size = len(devices.split(","))
    model = save_random_llama(tmp_path, **GQA)
    prompt = tuple(_ids()[:50])
    executor = SpawnedExecutor(group_config(tmp_path, tp_size, device="cuda"))
    (answer,) = _answers(executor, [prompt], SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True))
    executor.shutdown()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
