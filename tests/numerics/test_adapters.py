"""LoRA adapters: what PEFT computes with them, and the bits of each request alone in a batch of many."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from model_parallel.checkpoint.adapter_files import adapter_bytes, describe_adapter
from model_parallel.checkpoint.detect import describe
from model_parallel.collectives.interface import SoloCollectives
from model_parallel.collectives.shared_memory.segment import SharedMemoryCollectives
from model_parallel.config import AdapterConfig
from model_parallel.engine.request import AdapterRef, EngineRequest, SamplingParams
from model_parallel.runtime.leader import store_file
from model_parallel.runtime.rank import Rank
from model_parallel.runtime.recorded_steps import RecordedSteps
from tests.support.adapters import save_random_adapter, with_adapter
from tests.support.drafts import ScriptedDrafter
from tests.support.effort import rest_by_night
from tests.support.kernels import use_backend
from tests.support.local_engine import LocalGroup, Outcome
from tests.support.ranks import save_random_llama

MAX_LOGPROB_ERROR = 2e-4
"""Of float32: what a different order of sums makes of it over three layers."""
NUM_ADAPTERS = 8
SHAPES: list[dict[str, Any]] = [
    {},
    {"r": 3, "target_modules": ["q_proj", "v_proj"]},
    {"r": 16, "use_rslora": True, "target_modules": "all-linear"},
    {"r": 1, "lora_alpha": 1, "target_modules": ["o_proj", "gate_proj", "down_proj"]},
    {"r": 5, "target_modules": r".*\.layers\.[02]\.(self_attn\.k_proj|mlp\.up_proj)"},
    {"r": 128, "lora_alpha": 32, "target_modules": ["k_proj", "down_proj"]},
    {"r": 32, "target_modules": ["gate_proj", "up_proj", "o_proj"], "exclude_modules": ["layers.1.mlp.up_proj"]},
    {"r": 7, "lora_alpha": 3},
]
"""One of each kind, and ranks that no vector has a multiple of."""

LoadedModel = tuple[Path, LlamaForCausalLM]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Heads that no tensor-parallel size but 1 and 3 divides."""
    path = tmp_path_factory.mktemp("llama")
    model = save_random_llama(path, num_attention_heads=9, num_key_value_heads=3, head_dim=16, hidden_size=144)
    return path, model


@pytest.fixture(scope="module")
def directories(base: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = [tmp_path_factory.mktemp("adapter") for _ in SHAPES]
    for seed, (path, shape) in enumerate(zip(paths, SHAPES, strict=True)):
        save_random_adapter(path, base[1], seed=seed, **shape)
    return paths


CASES = [(backend, tp_size) for backend in ("cpu", "cpu-avx2", "cpu-scalar", "reference") for tp_size in (1, 2, 3)]
DAILY = [("cpu", 1), ("cpu", 2), ("cpu", 3), ("cpu-avx2", 1), ("reference", 1)]


class AdaptedGroup:
    """A group that knows all adapters, on the collectives of processes, so that decode is recorded as it is in service."""

    def __init__(self, path: Path, directories: list[Path], tp_size: int, dtype: str, store: str) -> None:
        model = describe(path).config
        infos = [describe_adapter(directory, model) for directory in directories]
        self.refs = [AdapterRef(info.digest, str(info.path)) for info in infos]
        self.ranks: dict[int, Rank] = {}

        def make(config: Any, rank: int, *_: object) -> Rank:
            shared = SharedMemoryCollectives(store, rank, tp_size, timeout_s=60) if tp_size > 1 else SoloCollectives()
            self.ranks[rank] = Rank(config, rank, shared)
            return self.ranks[rank]

        sizes = [adapter_bytes(info, model, tp_size, dtype=dtype) for info in infos]
        self.group = LocalGroup(
            path,
            tp_size,
            dtype=dtype,
            rank_factory=make,
            adapters=AdapterConfig(),
            known=list(zip(self.refs, sizes, strict=True)),
        )

    def request(self, name: str, prompt: tuple[int, ...], adapter: int | None, **sampling: Any) -> EngineRequest:
        """`adapter` is the place of one; None is none."""
        given = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "logprobs": 5} | sampling
        ref = None if adapter is None else self.refs[adapter]
        return EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(**given), adapter=ref)


@pytest.fixture(scope="module", params=rest_by_night(CASES, by_day=DAILY), ids=lambda case: f"{case[0]}-tp{case[1]}")
def exact(request: pytest.FixtureRequest, base: LoadedModel, directories: list[Path]) -> Iterator[AdaptedGroup]:
    """In float32."""
    yield from _group(request.param, base, directories, "float32")


@pytest.fixture(
    scope="module", params=rest_by_night(CASES[:9], by_day=[("cpu", 2)]), ids=lambda case: f"{case[0]}-tp{case[1]}"
)
def rounded(request: pytest.FixtureRequest, base: LoadedModel, directories: list[Path]) -> Iterator[AdaptedGroup]:
    """In bfloat16."""
    yield from _group(request.param, base, directories, "bfloat16")


def _group(case: tuple[str, int], base: LoadedModel, directories: list[Path], dtype: str) -> Iterator[AdaptedGroup]:
    with pytest.MonkeyPatch.context() as monkeypatch, store_file() as store:
        use_backend(monkeypatch, case[0])
        group = AdaptedGroup(base[0], directories, case[1], dtype, store)
        yield group
        group.group.close()


def _prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 515, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def _expected(model: LlamaForCausalLM, directory: Path | None, tokens: tuple[int, ...]) -> torch.Tensor:
    """PEFT's log-probabilities at every position; without a directory, the model's own."""
    adapted = model if directory is None else with_adapter(model, directory)
    with torch.no_grad():
        logprobs = adapted(torch.tensor([tokens])).logits[0].log_softmax(-1)
    if directory is not None:
        adapted.unload()
    return logprobs


def test_log_probabilities_are_those_of_peft(exact: AdaptedGroup, base: LoadedModel, directories: list[Path]) -> None:
    """Of prompts and answers, with all kinds of adapters in one batch beside the model itself."""
    prompt = _prompt(21, 5)
    wanted: list[int | None] = [None, *range(len(SHAPES))]
    outcome = exact.group.run([exact.request(str(i), prompt, i, prompt_logprobs=0) for i in wanted])
    answers = set()
    for i in wanted:
        answer = outcome.tokens(str(i))
        expected = _expected(base[1], None if i is None else directories[i], (*prompt, *answer))
        outputs = outcome.outputs[str(i)]
        found = [entry for output in outputs for entry in (*output.prompt_logprobs, *output.logprobs)]
        assert [entry.token_id for entry in found] == [*prompt[1:], *answer]
        errors = [abs(entry.logprob - expected[at, entry.token_id].item()) for at, entry in enumerate(found)]
        assert max(errors) <= MAX_LOGPROB_ERROR, f"adapter {i}"
        assert expected[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
        answers.add(tuple(answer))
    assert len(answers) == len(wanted), "every adapter changes the answer"


def _bits(outcome: Outcome, name: str) -> list[Any]:
    """All that an answer says, to the last bit; how its outputs were cut does not count."""
    outputs = outcome.outputs[name]
    prompt_logprobs = [entry for output in outputs for entry in output.prompt_logprobs]
    return [*prompt_logprobs, *outcome.tokens(name), *(entry for output in outputs for entry in output.logprobs)]


def _check_bits(group: AdaptedGroup) -> None:
    requests = [
        group.request(
            str(i),
            _prompt(3 + 2 * i, i),
            None if i % 9 == 8 else i % NUM_ADAPTERS,
            prompt_logprobs=0,
            temperature=0.8 * (i % 2),
            seed=i,
            max_tokens=20,
        )
        for i in range(18)
    ]
    outcomes = {request.request_id: group.group.run([request]) for request in requests}
    alone = {name: _bits(outcome, name) for name, outcome in outcomes.items()}
    answers = {name: outcome.tokens(name) for name, outcome in outcomes.items()}
    together = group.group.run(requests)
    backwards = group.group.run(requests[::-1], max_prefill_chunk=7)
    drafter = ScriptedDrafter(
        lambda run, number: answers[run.request.request_id][len(run.token_ids) - run.num_prompt_tokens :][:number],
        errs_at=lambda run, position: (run.seq_id + position) % 4 == 0,
    )
    speculative = group.group.run(requests, drafter=drafter)
    assert 0 < speculative.num_accepted_tokens < speculative.num_draft_tokens
    for request in requests:
        assert _bits(speculative, request.request_id) == alone[request.request_id]
        assert _bits(together, request.request_id) == alone[request.request_id]
        assert _bits(backwards, request.request_id) == alone[request.request_id]


def test_bits_in_a_batch_are_those_of_each_alone(exact: AdaptedGroup) -> None:
    """18 requests: 16 over 8 adapters, and two of the model itself, which alone meet no adapter at all."""
    _check_bits(exact)
    if exact.ranks[0].kernels.name == "reference":
        return
    assert isinstance(exact.ranks[0].graphs, RecordedSteps)
    assert max(exact.ranks[0].graphs._steps) > NUM_ADAPTERS, "decoded together, as one native call"


def test_bits_in_a_batch_are_those_of_each_alone_in_bfloat16(rounded: AdaptedGroup) -> None:
    _check_bits(rounded)


def test_prefixes_are_shared_within_an_adapter_alone(exact: AdaptedGroup) -> None:
    prompt = _prompt(40, 8)
    names = {"one": 0, "again": 0, "other": 1, "none": None}
    requests = [exact.request(name, prompt, adapter) for name, adapter in names.items()]
    outcome = exact.group.run(requests, prefix_caching=True, waves=[1, 2, 3])
    assert [outcome.last(name).num_cached_tokens for name in names] == [0, 32, 0, 0]
    assert outcome.tokens("again") == outcome.tokens("one") != outcome.tokens("other")


def test_an_answer_goes_on_where_another_group_left_off(exact: AdaptedGroup) -> None:
    prompt = _prompt(12, 9)
    whole = exact.group.run([exact.request("it", prompt, 2, temperature=0.9, seed=4)]).tokens("it")
    rest = EngineRequest(
        request_id="rest",
        prompt_token_ids=prompt,
        sampling=SamplingParams(temperature=0.9, seed=4, max_tokens=12, ignore_eos=True),
        output_token_ids=tuple(whole[:5]),
        adapter=exact.refs[2],
    )
    assert exact.group.run([rest]).tokens("rest") == whole[5:]
