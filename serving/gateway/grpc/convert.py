"""Between protobuf and the gateway's plain data. No rule about values lives here; `validate` has them."""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from google.protobuf import descriptor_pb2, empty_pb2, unknown_fields
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from model_parallel.engine.request import FinishReason, TokenLogprobs
from protos import inference_pb2 as pb
from serving.contracts.errors import ValidationError
from serving.contracts.models import ModelCard
from serving.gateway.core.choices import Chunk, Summary
from serving.gateway.core.constraints import Constraint, JsonSchema, LarkGrammar, OneOf, Regex
from serving.gateway.core.generation import ScoredTokens
from serving.gateway.core.json_schemas import schema_of_text
from serving.gateway.core.validate import (
    ChatPrompt,
    GenerateQuery,
    Prompt,
    ScoreQuery,
    TextPrompt,
    TokenizeQuery,
    TokenPrompt,
    normalised,
)
from serving.text.chat import ChatMessage
from serving.text.tokenizer import Tokenizer

# Fields of pb.Sampling that are called and mean the same in GenerateQuery, and can be unset.
_OPTIONAL = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "max_tokens", "ignore_eos", "n", "logprobs", "prompt_logprobs", "skip_special_tokens",
)  # fmt: skip

MAX_REPEATED_MESSAGES = 16384
_MAX_EXPLAINED_BYTES = 256 << 10
"""What is wrong in more than this is not looked for: it is no slip of the pen, and each field found costs time."""

_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


def generate_query(request: pb.GenerateRequest) -> GenerateQuery:
    """The request as plain data."""
    sampling = request.sampling
    return normalised(
        GenerateQuery(
            model=request.model,
            prompt=prompt(request.prompt),
            stop=tuple(sampling.stop),
            stop_token_ids=tuple(sampling.stop_token_ids),
            logit_bias=tuple(sorted(sampling.logit_bias.items())),
            parse_special=request.parse_special,
            constraint=constraint(sampling.constraint) if sampling.HasField("constraint") else None,
            **{field: getattr(sampling, field) for field in _OPTIONAL if sampling.HasField(field)},
        )
    )


def canonical(query: GenerateQuery) -> bytes:
    """One spelling for all requests of gRPC that ask for the same."""
    return b"grpc\0" + msgspec.json.encode(query, order="deterministic")


def delivered(request: pb.GenerateRequest) -> tuple[int, ...]:
    """What the client has of each choice. Raises ValidationError for resume_from without resume_token."""
    if request.HasField("resume_from") and not request.resume_token:
        raise ValidationError("resume_from", "resume_from is set without resume_token; set both, or neither")
    return tuple(request.resume_from.num_tokens)


def refuse_resumption(request: pb.GenerateRequest) -> None:
    """Of an answer that is not streamed. Raises ValidationError."""
    if request.resume_token or request.HasField("resume_from"):
        field = "resume_token" if request.resume_token else "resume_from"
        raise ValidationError(field, f"{field} is set, and Generate streams nothing; call GenerateStream")


def constraint(message: pb.Constraint) -> Constraint:
    """As plain data. Raises ValidationError for a schema that is no JSON, and for none of the kinds."""
    field = "sampling.constraint"
    match message.WhichOneof("kind"):
        case "json_schema":
            field += ".json_schema"
            return JsonSchema(field=field, schema=schema_of_text(field, message.json_schema))
        case "regex":
            return Regex(field=f"{field}.regex", pattern=message.regex)
        case "choice":
            return OneOf(field=f"{field}.choice.texts", texts=tuple(message.choice.texts))
        case "lark":
            return LarkGrammar(field=f"{field}.lark", text=message.lark)
        case _:
            raise ValidationError(field, f"{field} is empty; give json_schema, regex, choice or lark")


def score_query(request: pb.ScoreRequest) -> ScoreQuery:
    """The request as plain data."""
    return ScoreQuery(
        model=request.model,
        context=prompt(request.context),
        continuations=tuple(_text_or_tokens(continuation) for continuation in request.continuations),
    )


def tokenize_query(request: pb.TokenizeRequest) -> TokenizeQuery:
    """The request as plain data."""
    text = TextPrompt(request.text) if request.HasField("text") else None
    return TokenizeQuery(
        model=request.model,
        prompt=chat_prompt(request.chat) if request.HasField("chat") else text,
        add_bos=request.add_bos if request.HasField("add_bos") else None,
        parse_special=request.parse_special,
    )


def prompt(message: pb.Prompt) -> Prompt | None:
    """None when the oneof is unset."""
    return chat_prompt(message.chat) if message.HasField("chat") else _text_or_tokens(message)


def chat_prompt(chat: pb.Chat) -> ChatPrompt:
    """A conversation as plain data."""
    messages = tuple(ChatMessage(role=message.role, content=message.content) for message in chat.messages)
    return ChatPrompt(messages, chat.continue_final_message)


def _text_or_tokens(message: pb.Prompt | pb.Continuation) -> TextPrompt | TokenPrompt | None:
    if message.HasField("text"):
        return TextPrompt(message.text)
    if message.HasField("token_ids"):
        return TokenPrompt(tuple(message.token_ids.ids))
    return None


def stream_response(chunk: Chunk, tokenizer: Tokenizer) -> pb.GenerateStreamResponse:
    """A chunk on the wire, without the request's identity."""
    response = pb.GenerateStreamResponse(
        index=chunk.index,
        text=chunk.text,
        token_ids=chunk.token_ids,
        logprobs=token_logprobs(chunk.logprobs, tokenizer),
        prompt_logprobs=token_logprobs(chunk.prompt_logprobs, tokenizer),
        finish_reason=_FINISH_REASONS[chunk.finish_reason],
    )
    if chunk.summary is not None:
        response.usage.CopyFrom(usage(chunk.summary))
        response.timings.CopyFrom(timings(chunk.summary))
    return response


def generate_response(chunks: Sequence[Chunk], tokenizer: Tokenizer) -> pb.GenerateResponse:
    """All chunks of a request put together, without the request's identity."""
    response = pb.GenerateResponse()
    for chunk in chunks:
        while len(response.choices) <= chunk.index:
            response.choices.add(index=len(response.choices))
        choice = response.choices[chunk.index]
        choice.token_ids.extend(chunk.token_ids)
        choice.logprobs.extend(token_logprobs(chunk.logprobs, tokenizer))
        response.prompt_logprobs.extend(token_logprobs(chunk.prompt_logprobs, tokenizer))
        if chunk.finish_reason is not None:
            choice.finish_reason = _FINISH_REASONS[chunk.finish_reason]
            choice.text = "".join(other.text for other in chunks if other.index == chunk.index)
        if chunk.summary is not None:
            response.usage.CopyFrom(usage(chunk.summary))
            response.timings.CopyFrom(timings(chunk.summary))
    return response


def score(scored: ScoredTokens, tokenizer: Tokenizer) -> pb.Score:
    """One continuation's score."""
    return pb.Score(
        logprob=scored.logprob,
        is_greedy=scored.is_greedy,
        num_tokens=len(scored.tokens),
        tokens=token_logprobs(scored.tokens, tokenizer),
    )


def token_logprobs(tokens: Iterable[TokenLogprobs], tokenizer: Tokenizer) -> list[pb.TokenLogprobs]:
    """Log-probabilities with the tokens' bytes."""
    return [
        pb.TokenLogprobs(
            token_id=token.token_id,
            token=tokenizer.token_bytes(token.token_id),
            logprob=token.logprob,
            top=[
                pb.TokenLogprobs.Alternative(token_id=token_id, token=tokenizer.token_bytes(token_id), logprob=logprob)
                for token_id, logprob in token.top
            ],
        )
        for token in tokens
    ]


def usage(summary: Summary) -> pb.Usage:
    """Tokens read and written."""
    return pb.Usage(
        prompt_tokens=summary.num_prompt_tokens,
        cached_tokens=summary.num_cached_tokens,
        completion_tokens=summary.num_completion_tokens,
        accepted_prediction_tokens=summary.num_accepted_tokens,
        rejected_prediction_tokens=summary.num_rejected_tokens,
    )


def timings(summary: Summary) -> pb.Timings:
    """Where the time went."""
    message = pb.Timings(gateway_s=summary.gateway_s, total_s=summary.total_s)
    if summary.group is not None:
        message.queue_s = summary.group.queue_s
        message.prefill_s = summary.group.prefill_s
        message.decode_s = summary.group.decode_s
    return message


def model_card(card: ModelCard) -> pb.ModelCard:
    """All that clients may know: not where the weights lie."""
    return pb.ModelCard(
        name=card.name,
        architecture=card.architecture,
        num_parameters=card.num_parameters,
        vocab_size=card.vocab_size,
        max_model_len=card.max_model_len,
        bos_token_id=card.bos_token_id,
        eos_token_ids=card.eos_token_ids,
        chat_format=card.chat_format,
        chat_default_system=card.chat_default_system,
        dtype=card.dtype,
        device=card.device,
        tensor_parallel_size=card.tensor_parallel_size,
        num_groups=card.num_groups,
        deterministic=card.deterministic,
        kernels=card.kernels,
        allow_parse_special=card.allow_parse_special,
        generation_config=card.generation_config,
        default_sampling=card.default_sampling,
        structured_output=card.structured_output,
        parent=card.parent,
        licence=pb.Licence(
            name=card.licence.name, notice=card.licence.notice, use_policy_url=card.licence.use_policy_url
        ),
    )


def unknown_fields_of(message: Message) -> list[str]:
    """What the client set and this server does not know, in messages within too, by path and number: "sampling.#99".

    Raises ValidationError for a field of a reserved number, which is one of a newer server's and changes the answer; for a known
    field of the wrong type; and for more bytes of unknown fields, or more messages within, than anybody needs: of both there can
    be millions, and whatever looks at each holds up the others.
    """
    _refuse_many_messages(message, "")
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    num_unknown_bytes = message.ByteSize() - known.ByteSize()
    if num_unknown_bytes > _MAX_EXPLAINED_BYTES:
        raise ValidationError("", f"{num_unknown_bytes} bytes of the request are fields that this server does not know")
    return _unknown_within(message, "") if num_unknown_bytes else []


def _refuse_many_messages(message: Message, path: str) -> None:
    for field, value in message.ListFields():
        if _is_map_or_scalar(field):
            continue
        where = _join(path, field, 0)
        if not field.is_repeated:
            _refuse_many_messages(value, where)
        elif len(value) > MAX_REPEATED_MESSAGES:
            where = where.removesuffix("[0]")
            raise ValidationError(where, f"{where} has {len(value)} entries and may have {MAX_REPEATED_MESSAGES}")


def _unknown_within(message: Message, path: str) -> list[str]:
    names: dict[str, None] = {}
    descriptor: Any = message.DESCRIPTOR
    for number in {unknown.field_number for unknown in _unknown_fields(message)}:
        name = f"{path}.#{number}" if path else f"#{number}"
        if field := descriptor.fields_by_number.get(number):
            raise ValidationError(
                _join(path, field, 0), f"{_join(path, field, 0)} is of another type than this server's"
            )
        if _is_reserved(descriptor, number):
            raise ValidationError(path, f"{name} is a field of a newer server, which this server cannot ignore")
        names[name] = None
    for field, value in message.ListFields():
        if not _is_map_or_scalar(field):
            for index, inner in enumerate(value if field.is_repeated else [value]):
                names.update(dict.fromkeys(_unknown_within(inner, _join(path, field, index))))
    return list(names)


def _is_reserved(descriptor: Descriptor, number: int) -> bool:
    copied = descriptor_pb2.DescriptorProto()
    descriptor.CopyToProto(copied)
    return any(reserved.start <= number < reserved.end for reserved in copied.reserved_range)


def _is_map_or_scalar(field: FieldDescriptor) -> bool:
    return field.message_type is None or field.message_type.GetOptions().map_entry


def explain_undecodable(descriptor: Descriptor, data: bytes) -> ValidationError:
    """Why protobuf refused `data` as a message of this type: names the text field that is not UTF-8, if one is not."""
    path = _invalid_text(descriptor, data, "") if len(data) <= _MAX_EXPLAINED_BYTES else None
    if path is None:
        return ValidationError("", f"the request is not a readable {descriptor.full_name} message")
    return ValidationError(path, f"{path} is not valid UTF-8")


def _invalid_text(descriptor: Descriptor, data: bytes, path: str) -> str | None:
    # A message without fields reads any well-formed bytes and keeps them as unknown fields, text unchecked.
    try:
        fields = _unknown_fields(empty_pb2.Empty.FromString(data))
    except DecodeError:
        return None
    counts: dict[int, int] = {}
    for unknown in fields:
        field = descriptor.fields_by_number.get(unknown.field_number)
        if field is None or not isinstance(unknown.data, bytes):
            continue
        index = counts[field.number] = counts.get(field.number, -1) + 1
        where = _join(path, field, index)
        if field.type == descriptor_pb2.FieldDescriptorProto.TYPE_STRING:
            try:
                unknown.data.decode()
            except UnicodeDecodeError:
                return where
        elif field.message_type is not None and (found := _invalid_text(field.message_type, unknown.data, where)):
            return found
    return None


def _unknown_fields(message: Message) -> list[Any]:
    fields: Any = unknown_fields.UnknownFieldSet(message)  # its stub does not know that it is a sequence
    return list(fields)


def _join(path: str, field: FieldDescriptor, index: int) -> str:
    name = f"{field.name}[{index}]" if field.is_repeated else field.name
    return f"{path}.{name}" if path else name
