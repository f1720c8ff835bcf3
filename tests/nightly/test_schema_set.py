"""A set of schemas after the manner of JSONSchemaBench, at temperature 1 with the small model: what is supported gives valid
texts, and what is not is refused by name."""

import json
from pathlib import Path

import jsonschema
import pytest

from model_parallel.checkpoint.detect import describe
from model_parallel.config import TokenTable
from model_parallel.engine.matching import GrammarCompiler
from model_parallel.engine.request import EngineRequest, FinishReason, SamplingParams
from serving.gateway.core.constraints import JsonSchema, grammar_of
from serving.gateway.core.grammar_worker import Trial, try_out
from serving.models.chat import resolve_text
from serving.text.token_table import token_table
from tests.support.local_engine import LocalGroup
from tests.support.schemas import UNSUPPORTED, all_schemas

MAX_TOKENS = 200
MOST_BYTES = 12_000
LEAST_VALID = 0.99

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]


def test_texts_of_supported_schemas_are_valid(smollm2_path: Path) -> None:
    info = describe(smollm2_path)
    text = resolve_text(info)
    table: TokenTable = token_table(text.tokenizer, info.config.vocab_size, text.eos_token_ids)
    compiler = GrammarCompiler(table)
    refused: dict[str, str] = {}
    grammars: dict[str, str] = {}
    schemas = dict(all_schemas(MOST_BYTES))
    for name, schema in schemas.items():
        grammar = grammar_of(JsonSchema(field="schema", schema=schema), strips_space=False)
        verdict = try_out(compiler, Trial(grammar.text, tuple(each for _, each in grammar.schemas)))
        if verdict.error:
            refused[name] = f"schema{verdict.place}: {verdict.error}"
        else:
            grammars[name] = grammar.text
    group = LocalGroup(smollm2_path, 1, dtype="bfloat16", num_blocks=4096, tokens=table)
    names = list(grammars)
    prompt = tuple(text.tokenizer.encode("An example, as JSON:\n"))
    valid, cut, broken = [], [], {}
    for begin in range(0, len(names), 32):
        some = names[begin : begin + 32]
        sampling = [SamplingParams(seed=begin + i, max_tokens=MAX_TOKENS) for i in range(len(some))]
        outcome = group.run(
            [
                EngineRequest(
                    request_id=name,
                    prompt_token_ids=prompt,
                    sampling=each,
                    grammar=grammars[name],
                    eos_token_ids=text.eos_token_ids,
                )
                for name, each in zip(some, sampling, strict=True)
            ]
        )
        for name in some:
            last = outcome.last(name)
            if last.finish_reason is FinishReason.LENGTH:
                cut.append(name)
                continue
            said = text.tokenizer.decode([i for i in outcome.tokens(name) if i not in text.eos_token_ids])
            try:
                assert last.finish_reason is FinishReason.STOP, last.error
                jsonschema.validate(json.loads(said), schemas[name])
                valid.append(name)
            except (AssertionError, ValueError, jsonschema.ValidationError) as error:
                broken[name] = f"{str(error)[:200]} in {said[:200]}"
    group.close()
    print(
        f"{len(schemas)} schemas: {len(refused)} refused by name, {len(grammars)} supported; of these {len(valid)} valid, "
        f"{len(cut)} cut at {MAX_TOKENS} tokens, {len(broken)} broken"
    )
    for name, why in {**refused, **broken}.items():
        print(f"  {name}: {why[:200]}")
    assert len(valid) >= LEAST_VALID * (len(valid) + len(broken)) and len(valid) > 50
    assert all(why.partition(": ")[2] for why in refused.values())


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(smollm2_path: Path, name: str) -> None:
    schema, what = UNSUPPORTED[name]
    info = describe(smollm2_path)
    text = resolve_text(info)
    compiler = GrammarCompiler(token_table(text.tokenizer, info.config.vocab_size, text.eos_token_ids))
    grammar = grammar_of(JsonSchema(field="schema", schema={"properties": {"a": schema}}), strips_space=False)
    verdict = try_out(compiler, Trial(grammar.text, tuple(each for _, each in grammar.schemas)))
    assert verdict.place.startswith(".properties.a") and what in verdict.error
