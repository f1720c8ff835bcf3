"""What must be known of a server before a run: which model, how wide its vocabulary, how many tokens a word is."""

import asyncio
import random
import ssl
from collections.abc import Sequence
from typing import Annotated, Any

import aiohttp
import grpc
import grpc.aio
import msgspec

from bench.loadtest.files import read_contents
from bench.loadtest.grpc_transport import channel_to
from bench.loadtest.http_transport import Count, read_body
from bench.loadtest.runner import Resolved
from bench.loadtest.scenario import Scenario, Tenant
from bench.loadtest.sender import key_of
from bench.loadtest.words import WORDS
from bench.loadtest.work import Facts
from model_parallel.errors import ConfigError
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from serving.client.tls import ClientTls

TIMEOUT_S = 10.0
MAX_BODY_BYTES = 4 << 20
UNKNOWN_VOCABULARY = 30_000
"""Of a server that does not tell: below the width of every vocabulary in wide use."""
_MAX_PROBE_WORDS = 400
_PROBE_CHARACTERS_PER_WORD = 8
"""More than the words have, with their spaces; in a vocabulary of bytes each is a token."""


async def resolve(scenario: Scenario, tls: ClientTls | None) -> list[Resolved]:
    """For every tenant. Raises ConfigError, ConnectionError."""
    known: dict[tuple[str, str, str | None], Facts] = {}
    found = []
    for tenant in scenario.tenants:
        contents = await asyncio.to_thread(read_contents, tenant)
        key = (tenant.target, key_of(tenant), tenant.model)
        if key not in known:
            ask = _ask_grpc if tenant.parsed_target.is_grpc else _ask_http
            known[key] = await ask(tenant, tls)
        facts = known[key]
        if tenant.vocab_size is not None:
            facts = msgspec.structs.replace(facts, vocab_size=tenant.vocab_size)
        found.append(Resolved(facts=facts, entries=contents.entries, num_unanswered=contents.num_unanswered))
    return found


def _probe_words(max_model_len: int | None) -> list[str]:
    """As many as fit into the model's context in any vocabulary."""
    num_words = _MAX_PROBE_WORDS
    if max_model_len is not None:
        num_words = max(1, min(num_words, max_model_len // _PROBE_CHARACTERS_PER_WORD))
    return random.Random(0).choices(WORDS, k=num_words)


def _choose(tenant: Tenant, names: list[str]) -> str:
    if tenant.model is not None:
        if tenant.model not in names:
            raise ConfigError(
                f"tenants.{tenant.name}.model is {tenant.model!r}; {tenant.target} serves {', '.join(names)}"
            )
        return tenant.model
    if len(names) != 1:
        raise ConfigError(f"{tenant.target} serves {len(names)} models ({', '.join(names)}); choose one with model")
    return names[0]


async def _ask_grpc(tenant: Tenant, tls: ClientTls | None) -> Facts:
    key = key_of(tenant)
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    async with channel_to(tenant.parsed_target, tls) as channel:
        stub: Any = InferenceStub(channel)
        try:
            await asyncio.wait_for(channel.channel_ready(), TIMEOUT_S)
        except TimeoutError:
            problem = tls.problem(tenant.parsed_target.address) if tls and tenant.parsed_target.is_secure else ""
            raise ConnectionError(
                f"nothing answers at {tenant.target} within {TIMEOUT_S:g} s. {problem}".rstrip()
            ) from None
        try:
            cards = await stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_S, metadata=metadata)
            by_name = {card.name: card for card in cards.models}
            name = _choose(tenant, list(by_name))
            words = _probe_words(by_name[name].max_model_len)
            request = pb.TokenizeRequest(model=name, text=" ".join(words), add_bos=False)
            tokens = await stub.Tokenize(request, timeout=TIMEOUT_S, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise ConnectionError(f"{tenant.target}: {error.details()} ({error.code().name})") from error
    return Facts(
        model=name,
        vocab_size=by_name[name].vocab_size,
        tokens_per_word=max(0.1, len(tokens.token_ids) / len(words)),
    )


async def _ask_http(tenant: Tenant, tls: ClientTls | None) -> Facts:
    target, key = tenant.parsed_target, key_of(tenant)
    context: ssl.SSLContext | bool = True
    if target.is_secure:
        context = (tls or ClientTls(None, None, None)).context("http/1.1")
    base = f"{target.scheme}://{target.address}{target.path}"
    headers = {"authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=context), headers=headers, timeout=timeout, trust_env=False
        ) as session:
            async with session.get(f"{base}/v1/models", allow_redirects=False) as response:
                body = await read_body(response, MAX_BODY_BYTES)
                if response.status == 404 and tenant.model is not None:
                    contexts: dict[str, int | None] = {tenant.model: None}
                elif response.status != 200:
                    raise ConnectionError(f"{base}/v1/models answers {response.status}")
                else:
                    contexts = _model_contexts(body, base)
            name = _choose(tenant, list(contexts))
            tokens_per_word = await _tokens_per_word(session, base, name, _probe_words(contexts[name]))
            return Facts(model=name, vocab_size=UNKNOWN_VOCABULARY, tokens_per_word=tokens_per_word)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        if isinstance(error, ConnectionError) and str(error).startswith(base):
            raise
        raise ConnectionError(f"{tenant.target} cannot be reached: {str(error) or 'no answer in time'}") from error


class _Model(msgspec.Struct):
    id: str
    max_model_len: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Of servers that tell it: vLLM and Packtrain do."""


class _Models(msgspec.Struct):
    data: list[_Model]


class _Tokenized(msgspec.Struct):
    count: Count


def _model_contexts(body: bytes, base: str) -> dict[str, int | None]:
    """max_model_len by model."""
    try:
        models = msgspec.json.decode(body, type=_Models).data
    except (ValueError, RecursionError) as error:
        raise ConnectionError(f"{base}/v1/models does not answer as OpenAI's API does: {error}") from error
    return {model.id: model.max_model_len or None for model in models}


async def _tokens_per_word(session: aiohttp.ClientSession, base: str, model: str, words: Sequence[str]) -> float:
    """By /tokenize, which vLLM and Packtrain have; 1 where there is none."""
    body = {"model": model, "prompt": " ".join(words), "add_special_tokens": False}
    async with session.post(f"{base}/tokenize", json=body, allow_redirects=False) as response:
        if response.status != 200:
            return 1.0
        try:
            count = msgspec.json.decode(await read_body(response, MAX_BODY_BYTES), type=_Tokenized).count
        except (ValueError, RecursionError):
            return 1.0
    return max(0.1, count / len(words))
