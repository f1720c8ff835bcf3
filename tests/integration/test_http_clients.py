"""Clients that we did not write, unmodified, with a key and quotas against the whole stack: `openai`, and lm-eval's two models
of HTTP APIs."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from protos import inference_pb2 as pb
from serving.client.client import Client
from serving.config import AdminConfig, TenancyConfig
from serving.driver.app import RunningApp
from serving.tenants.records import KeyGrant, Tenant
from serving.tenants.store.database import Database
from serving.tenants.store.store import Store
from tests.support.converted import converted, reference_model
from tests.support.stack import MODEL, group_stats, running_stack, stack_config, wait_until
from tests.support.waiting import PATIENCE_S

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
CASES = [
    {"context": "The capital of France is", "choices": [" Paris", " a city in the south of Spain", " 7"], "answer": 0},
    {"context": "Two plus two equals", "choices": [" four", " five hundred"], "answer": 0},
    {"context": "The opposite of hot is", "choices": [" cold", " banana bread"], "answer": 0},
]


LIMITS = {"requests_per_minute": 600, "tokens_per_minute": 10**7}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('tenants') / 'tenants.db'}"


@pytest.fixture(scope="module")
def key(database: str) -> str:
    opened = Database(database)
    store = Store(opened)
    store.create_tenant(Tenant(id="acme", plan="unlimited", **LIMITS))  # type: ignore[arg-type]
    text = store.create_key("acme", KeyGrant()).text
    opened.close()
    return text


@pytest.fixture(scope="module")
def app(database: str, key: str) -> Iterator[RunningApp]:
    sections = {"tenancy": TenancyConfig(database=database), "admin": AdminConfig(port=None, metrics_port=0)}
    with running_stack(stack_config().model_copy(update=sections)) as app:
        yield app


@pytest.fixture
def api(app: RunningApp, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{app.http_url}/v1", api_key=key, max_retries=0, timeout=60) as client:
        yield client


def test_openai_reads_what_is_left_of_its_rates(api: openai.OpenAI) -> None:
    answer = api.chat.completions.with_raw_response.create(model=MODEL, messages=QUESTION, max_completion_tokens=4)
    usage = answer.parse().usage
    assert usage
    assert int(answer.headers["x-ratelimit-limit-requests"]) == LIMITS["requests_per_minute"]
    # The refill may have put back what was used.
    assert 599 <= int(answer.headers["x-ratelimit-remaining-requests"]) <= 600
    assert 10**7 - usage.total_tokens <= int(answer.headers["x-ratelimit-remaining-tokens"]) <= 10**7
    assert answer.headers["x-ratelimit-reset-tokens"].endswith("s")
    with api.completions.with_streaming_response.create(model=MODEL, prompt="Hi", max_tokens=4, stream=True) as stream:
        assert 599 <= int(stream.headers["x-ratelimit-remaining-requests"]) <= 600


def test_openai_chats(api: openai.OpenAI) -> None:
    whole = api.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=32)
    answer = whole.choices[0].message.content
    assert answer and "Paris" in answer
    assert whole.usage and whole.usage.prompt_tokens == 37
    stream = api.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == answer
    assert len(chunks) > 5, "it must come in pieces"
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_openai_and_grpc_give_the_same_tokens(app: RunningApp, api: openai.OpenAI, key: str) -> None:
    with Client(app.address, api_key=key) as client:
        sampling = pb.Sampling(seed=7, max_tokens=24, n=2, logprobs=2)
        request = pb.GenerateRequest(model=MODEL, prompt=pb.Prompt(text="Once upon a time"), sampling=sampling)
        over_grpc = client.stub.Generate(request, timeout=60)
    over_http = api.completions.create(
        model=MODEL, prompt="Once upon a time", seed=7, max_tokens=24, n=2, logprobs=2, temperature=1
    )
    assert [choice.text for choice in over_http.choices] == [choice.text for choice in over_grpc.choices]
    for ours, theirs in zip(over_http.choices, over_grpc.choices, strict=True):
        assert ours.logprobs
        assert ours.logprobs.token_logprobs == [token.logprob for token in theirs.logprobs]
    assert over_http.choices[0].text != over_http.choices[1].text


def test_closing_a_stream_frees_its_memory(api: openai.OpenAI) -> None:
    stream = api.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert group_stats()["num_running"] == 1
    stream.close()
    wait_until(
        lambda: group_stats()["num_running"] == 0 == group_stats()["kv_usage"], PATIENCE_S, "the request has ended"
    )


EVALUATE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
directory, runs, out = json.loads(sys.argv[1])
manager = TaskManager(include_path=directory, include_defaults=False)
samples = [simple_evaluate(**run, task_manager=manager)["samples"] for run in runs]
with open(out, "w") as file:
    json.dump(samples, file, default=str)
"""
"""By lm-eval's own interface for programs: its command line reads some ten thousand files of tasks at each start."""


@dataclass(frozen=True)
class Harness:
    """lm-eval with two tasks on data of ours; nothing of it looks for a network."""

    directory: Path
    completions: dict[str, list[Any]]
    """Samples by task."""
    chats: dict[str, list[Any]]


def run_harness(directory: Path, http_url: str, key: str) -> Harness:
    """Both models, one after the other in one process, which takes many seconds to load."""
    common = {"model": MODEL, "num_concurrent": 2, "max_retries": 1}
    runs = [
        {
            "model": "local-completions",
            "model_args": common
            | {"base_url": f"{http_url}/v1/completions", "tokenizer": str(directory / "tokenizer")},
            "tasks": ["choose", "say"],
        },
        {
            "model": "local-chat-completions",
            "model_args": common | {"base_url": f"{http_url}/v1/chat/completions"},
            "tasks": ["say"],
            "apply_chat_template": True,
        },
    ]
    out = directory / "samples.json"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory)}
    ended = subprocess.run(
        [sys.executable, "-c", EVALUATE, json.dumps([str(directory), runs, str(out)])],
        check=False,
        env=os.environ | offline | {"OPENAI_API_KEY": key},
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE_S,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    completions, chats = json.loads(out.read_text())
    return Harness(directory=directory, completions=completions, chats=chats)


@pytest.fixture(scope="module")
def harness(app: RunningApp, tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path, key: str) -> Harness:
    """Has run."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed: pip install -e '.[clients]'")
    directory = tmp_path_factory.mktemp("lm-eval")
    data = directory / "cases.jsonl"
    data.write_text("".join(json.dumps(case) + "\n" for case in CASES))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    tasks = {
        "choose": {
            "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
        },
        "say": {
            "output_type": "generate_until", "doc_to_text": "{{context}}", "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n", "."], "do_sample": False, "max_gen_toks": 16},
            "metric_list": [{"metric": "exact_match"}],
        },
    }  # fmt: skip
    for name, task in tasks.items():
        (directory / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | task))
    (directory / "tokenizer").symlink_to(converted(smollm2_path))
    return run_harness(directory, str(app.http_url), key)


def test_lm_eval_scores_as_grpc_and_transformers_do(
    app: RunningApp, harness: Harness, smollm2_path: Path, key: str
) -> None:
    said, chosen = harness.completions["say"], harness.completions["choose"]
    assert all(isinstance(sample["resps"][0][0], str) for sample in said)
    assert said[0]["resps"][0][0] == " Paris"

    model = reference_model(smollm2_path)
    tokenizer = AutoTokenizer.from_pretrained(harness.directory / "tokenizer")
    with Client(app.address, api_key=key) as client:
        for sample in sorted(chosen, key=lambda each: each["doc_id"]):
            context, choices = sample["doc"]["context"], sample["doc"]["choices"]
            request = pb.ScoreRequest(model=MODEL, context=pb.Prompt(text=context))
            request.continuations.extend(pb.Continuation(text=text) for text in choices)
            scores = client.stub.Score(request, timeout=60).scores
            for text, score, answer in zip(choices, scores, sample["resps"], strict=True):
                over_http, is_greedy = answer[0]
                ids, start = tokenizer(context + text)["input_ids"], len(tokenizer(context)["input_ids"])
                with torch.no_grad():
                    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                reference = sum(logprobs[p - 1, ids[p]].item() for p in range(start, len(ids)))
                assert over_http == pytest.approx(score.logprob, abs=1e-3)
                assert over_http == pytest.approx(reference, abs=1e-3)
                assert is_greedy == score.is_greedy


def test_lm_eval_chats(harness: Harness) -> None:
    said = harness.chats["say"]
    assert len(said) == len(CASES)
    assert all(sample["resps"][0][0] for sample in said)
