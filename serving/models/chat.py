"""Which chat format a model is served with: the configuration's, or what the checkpoint's own template is."""

from dataclasses import dataclass

from msgspec.structs import replace

from model_parallel.checkpoint.detect import CheckpointInfo
from model_parallel.errors import ConfigError
from serving.config import ChatConfig
from serving.contracts.chat import ChatFormat
from serving.text.chat import check_control_tokens, end_of_answer, named_format
from serving.text.chat_formats import CHAT_FORMATS, CUSTOM, NAMED_FORMATS, NONE, from_strings, with_tokens
from serving.text.template_format import TemplateError, derive
from serving.text.tokenizer import Tokenizer, make_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelText:
    """A model's tokenizer, its chat format, and the tokens that end its answers."""

    tokenizer: Tokenizer
    chat_format: ChatFormat | None
    """None for a model without chat."""
    eos_token_ids: tuple[int, ...]
    warnings: tuple[str, ...]
    """Where the format differs from the checkpoint's template, or why there is none, as sentences."""


def resolve_text(info: CheckpointInfo, chat: ChatConfig | None = None) -> ModelText:
    """`chat` is what the configuration says, if it does.

    Raises ConfigError for a format that the model cannot have: one whose control tokens its tokenizer lacks; CheckpointError
    for a tokenizer that cannot be used.
    """
    tokenizer = make_tokenizer(info, markup=_markup(chat))
    warnings = [*tokenizer.warnings]
    try:
        chat_format = _chat_format(info, chat, tokenizer, warnings)
        if chat_format is not None:
            check_control_tokens(chat_format, tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{info.path}: {error}") from error
    end = None if chat_format is None else end_of_answer(chat_format, tokenizer)
    if chat_format is not None and end is None:
        warnings.append(
            f"{info.path}: the {chat_format.name} chat format ends an answer with text, so answers end only where the model "
            "gives its own end token; send `stop` with requests if it does not"
        )
    eos = (*tokenizer.eos_token_ids, *(() if end is None else (end,)))
    if not eos:
        warnings.append(f"{info.path}: no end token is known, so answers end only at max_tokens or a stop string")
    return ModelText(
        tokenizer=tokenizer,
        chat_format=chat_format,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        warnings=tuple(warnings),
    )


def format_of(chat: ChatConfig) -> ChatFormat | None:
    """The format that a configuration names or writes, without a tokenizer's tokens; None for none."""
    if chat.format == NONE:
        return None
    if chat.format == CUSTOM:
        return from_strings(
            CUSTOM, begin=chat.begin, system=chat.system, user=chat.user, assistant=chat.assistant,
            answer=chat.answer, trim=chat.trim,
        )  # fmt: skip
    return NAMED_FORMATS[chat.format]


def _markup(chat: ChatConfig | None) -> str:
    known = None if chat is None else format_of(chat)
    return "" if known is None else "".join(known.literals.values())


def _chat_format(
    info: CheckpointInfo, chat: ChatConfig | None, tokenizer: Tokenizer, warnings: list[str]
) -> ChatFormat | None:
    if chat is not None:
        return _configured(chat, tokenizer)
    if info.chat_format:
        return named_format(info.chat_format, tokenizer)
    if not info.chat_template:
        return None
    try:
        derived = derive(info.chat_template, template_tokens(info, tokenizer))
    except TemplateError as error:
        warnings.append(
            f"{info.path}: its chat template {error}; the model is served without chat. Set chat.format to one of "
            f"{', '.join(CHAT_FORMATS)}, or to {CUSTOM} with plain strings"
        )
        return None
    warnings += [f"{info.path}: its chat template {said}, which is not done here" for said in derived.differences]
    chat_format = derived.chat_format
    has_rule = info.tokenizer.is_llamas or info.tokenizer_kind == "tokenizer.model"
    if chat_format.every_part_is_first and has_rule and info.tokenizer.only_first_has_space:
        warnings.append(
            f"{info.path}: as in Meta's reference, every turn after <s> begins with a space piece; transformers writes none "
            "there unless tokenizer_config.json says legacy: true"
        )
    return chat_format


def _configured(chat: ChatConfig, tokenizer: Tokenizer) -> ChatFormat | None:
    known = format_of(chat)
    if known is None:
        return None
    if known.name == CUSTOM:
        bos, eos = (tokenizer.control_token_text(i) or "" for i in (tokenizer.bos_token_id, _first(tokenizer)))
        made = with_tokens(known, bos=bos, eos=eos)
    else:
        made = named_format(known.name, tokenizer)
    if not chat.default_system:
        return made
    return replace(made, default_system=chat.default_system)


def _first(tokenizer: Tokenizer) -> int | None:
    return next(iter(tokenizer.eos_token_ids), None)


def template_tokens(info: CheckpointInfo, tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens as templates know them ("bos_token", …): as the tokenizer's files name them, else the configuration."""
    tokens = dict(info.tokenizer.named)
    bos = tokenizer.control_token_text(tokenizer.bos_token_id)
    eos = tokenizer.control_token_text(_first(tokenizer))
    for name, text in (("bos_token", bos), ("eos_token", eos)):
        if name not in tokens and text is not None:
            tokens[name] = text
    return tokens
