"""What every field of a request may hold: one table for gRPC and HTTP.

`SAMPLING` has the fields that this server knows, with the values that other servers and clients send for "as you like it".
`UNSUPPORTED` has the fields that would change an answer and that it does not know: they may hold what asks for nothing, and
are otherwise refused with what to send instead. `NO_EFFECT` and `NOT_HONOURED` change no answer. Any other field is ignored,
which the answer's header `x-packtrain-ignored` tells, or refused where the request is `strict`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_INT32, MAX_INT64, MAX_UINT64 = 2**31 - 1, 2**63 - 1, 2**64 - 1
GREEDY_BELOW = 0.01
"""Logits are not divided by less: temperatures below it are greedy, as vLLM and llama.cpp have it for the smallest ones."""
DRAWN_SEED_BITS = 53
"""Of a seed that the server draws: JavaScript's numbers, and so many JSON readers, hold no more without loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    """A field that holds a real number. Comparisons with NaN are false, so it is refused everywhere."""

    is_allowed: Callable[[float], bool]
    allowed: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Integer:
    """A field that holds a whole number, within bounds that may depend on a limit."""

    low: int
    high: int | None = None
    """None where a limit of the configuration is the bound."""
    unset: int | None = None
    """The number that other servers take for "not given"."""


SAMPLING: Mapping[str, Number | Integer] = {
    # -1 is refused: it is greedy for llama.cpp, an error for OpenAI and vLLM.
    "temperature": Number(is_allowed=lambda value: 0 <= value <= 2, allowed="from 0 (greedy) to 2"),
    # 0 is refused, as by vLLM: OpenAI takes it for the most likely token alone, which is temperature 0.
    "top_p": Number(
        is_allowed=lambda value: 0 < value <= 1, allowed="above 0, at most 1; send temperature 0 for greedy"
    ),
    "min_p": Number(is_allowed=lambda value: 0 <= value <= 1, allowed="from 0 to 1"),
    # 0.01 keeps logits finite when they are divided by it.
    "repetition_penalty": Number(is_allowed=lambda value: 0.01 <= value <= 2, allowed="from 0.01 to 2"),
    "presence_penalty": Number(is_allowed=lambda value: -2 <= value <= 2, allowed="from -2 to 2"),
    "frequency_penalty": Number(is_allowed=lambda value: -2 <= value <= 2, allowed="from -2 to 2"),
    # vLLM's and SGLang's -1, transformers' and llama.cpp's 0; what is over the vocabulary keeps all of it.
    "top_k": Integer(low=0, high=MAX_INT32, unset=-1),
    # vLLM's and llama.cpp's -1 draws one. OpenAI's range is that of signed 64-bit numbers.
    "seed": Integer(low=-(2**63), high=MAX_UINT64, unset=-1),
    # llama.cpp's and LM Studio's -1. 0 is for requests that ask about the prompt alone. The model's room is the upper bound.
    "max_tokens": Integer(low=0, high=MAX_INT64, unset=-1),
    "n": Integer(low=1),
    "logprobs": Integer(low=0),
    "prompt_logprobs": Integer(low=0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Unsupported:
    """A field that would change the answer, and is refused unless it asks for nothing."""

    neutral: tuple[Any, ...] = ()
    """Besides null, "", [], {} and false."""
    refused: tuple[Any, ...] = ()
    """Of those the values that would change something here."""
    instead: str = ""
    """What to send."""

    def is_neutral(self, value: Any) -> bool:
        """Whether it asks for nothing."""
        return not _is_in(value, self.refused) and (_is_nothing(value) or _is_in(value, self.neutral))

    def refusal(self, name: str) -> str:
        """A sentence for the client."""
        values = " or ".join(["null", *map(_spelt, self.neutral)])
        return f"{name} is not supported by this server; leave it out or give {values}" + (
            f"; instead, {self.instead}" if self.instead else ""
        )


_MAX_TOKENS = Unsupported(neutral=(-1,), instead="send max_tokens")
_MODEL = Unsupported(instead="send the adapter's name as model")
_BIAS = Unsupported(instead="send logit_bias")
_IGNORE_EOS = Unsupported(instead="send ignore_eos")
_STOP = Unsupported(instead="send stop")
_CONSTRAINED = Unsupported(refused=({},), instead="send structured_outputs, or response_format")
_ALWAYS_ON = Unsupported(neutral=(True,), refused=(False,))

NO_TOOLS: Mapping[str, Unsupported] = {
    "parallel_tool_calls": Unsupported(neutral=(True,)),
    "tool_choice": Unsupported(neutral=("none", "auto"), instead="ask /v1/chat/completions"),
    "tools": Unsupported(instead="ask /v1/chat/completions"),
}
"""Where there are none."""

UNSUPPORTED: Mapping[str, Unsupported] = {
    # OpenAI's
    "audio": Unsupported(instead="send text"),
    "function_call": Unsupported(neutral=("none", "auto"), instead="send tool_choice"),
    "functions": Unsupported(instead="send tools"),
    "modalities": Unsupported(neutral=(["text"],)),
    "suffix": Unsupported(instead="put it into the prompt, in the form that the model was trained with"),
    "verbosity": Unsupported(neutral=("medium",), instead="ask for it in the prompt"),
    "web_search_options": Unsupported(refused=({},)),
    # vLLM's, SGLang's, TGI's, llama.cpp's, Ollama's and transformers'
    "add_generation_prompt": Unsupported(
        neutral=(True,),
        refused=(False,),
        instead="send it with continue_final_message: true to have the last message continued",
    ),
    "adapter_id": _MODEL,
    "adaptive_target": Unsupported(neutral=(-1,), instead="send top_p or min_p"),
    "add_bos_token": _ALWAYS_ON,
    "allowed_token_ids": _BIAS,
    "bad_words": _BIAS,
    "bad_words_ids": _BIAS,
    "ban_eos_token": _IGNORE_EOS,
    "begin_suppress_tokens": _BIAS,
    "chat_template": Unsupported(instead="send a prompt to /v1/completions"),
    "chat_template_kwargs": Unsupported(neutral=({"enable_thinking": False}, {"thinking": False})),
    "custom_logit_processor": _BIAS,
    "custom_stopping_strings": _STOP,
    "custom_token_bans": _BIAS,
    "detokenize": _ALWAYS_ON,
    "diversity_penalty": Unsupported(neutral=(0,)),
    "do_sample": Unsupported(neutral=(True,), refused=(False,), instead="send temperature 0"),
    "documents": Unsupported(instead="put them into a message"),
    "dry_multiplier": Unsupported(neutral=(0,), instead="send repetition_penalty"),
    "dynamic_temperature": Unsupported(instead="send temperature"),
    "dynatemp_range": Unsupported(neutral=(0,), instead="send temperature"),
    "early_stopping": Unsupported(),
    "ebnf": _CONSTRAINED,
    "encoder_repetition_penalty": Unsupported(neutral=(1,)),
    "eos_token_id": Unsupported(instead="send stop_token_ids"),
    "epsilon_cutoff": Unsupported(neutral=(0,), instead="send min_p"),
    "eta_cutoff": Unsupported(neutral=(0,), instead="send min_p"),
    "exponential_decay_length_penalty": Unsupported(instead="send logit_bias"),
    "force_words_ids": _BIAS,
    "forced_bos_token_id": _BIAS,
    "forced_eos_token_id": _BIAS,
    "format": Unsupported(instead="send response_format"),
    "grammar": _CONSTRAINED,
    "grammar_string": _CONSTRAINED,
    "guidance_scale": Unsupported(neutral=(1,)),
    "image_data": Unsupported(),
    "images": Unsupported(),
    "include_stop_str_in_output": Unsupported(instead="add the text yourself where finish_reason is stop"),
    "input_embeds": Unsupported(instead="send token ids as the prompt of /v1/completions"),
    "input_ids": Unsupported(instead="send token ids as the prompt of /v1/completions"),
    "inputs": Unsupported(instead="send prompt, or messages to /v1/chat/completions"),
    "json_schema": _CONSTRAINED,
    "length_penalty": Unsupported(neutral=(1, 0)),
    "logits_processors": _BIAS,
    "lora": _MODEL,
    "lora_path": _MODEL,
    "max_gen_toks": _MAX_TOKENS,
    "max_length": _MAX_TOKENS,
    "max_new_tokens": _MAX_TOKENS,
    "min_keep": Unsupported(neutral=(0, 1)),
    "min_length": Unsupported(neutral=(0,)),
    "min_new_tokens": Unsupported(neutral=(0,)),
    "min_tokens": Unsupported(neutral=(0,), instead="send ignore_eos or logit_bias"),
    "mirostat": Unsupported(neutral=(0,), instead="send top_p or min_p"),
    "mirostat_mode": Unsupported(neutral=(0,), instead="send top_p or min_p"),
    "n_indent": Unsupported(neutral=(0,)),
    "n_predict": _MAX_TOKENS,
    "n_probs": Unsupported(neutral=(0,), instead="send logprobs"),
    "negative_prompt": Unsupported(instead="ask for it in the prompt"),
    "no_repeat_ngram_size": Unsupported(neutral=(0,), instead="send repetition_penalty"),
    "no_stop_trim": Unsupported(instead="add the text yourself where finish_reason is stop"),
    "num_beam_groups": Unsupported(neutral=(1,)),
    "num_beams": Unsupported(neutral=(1,)),
    "num_predict": _MAX_TOKENS,
    "num_return_sequences": Unsupported(neutral=(1,), instead="send n"),
    "options": Unsupported(instead="send its fields beside it"),
    "parameters": Unsupported(instead="send its fields beside it"),
    "penalty_alpha": Unsupported(neutral=(0,)),
    "prompt_embeds": Unsupported(instead="send token ids as the prompt of /v1/completions"),
    "regex": _CONSTRAINED,
    "repeat_penalty": Unsupported(neutral=(1,), instead="send repetition_penalty"),
    "return_full_text": Unsupported(instead="send echo to /v1/completions"),
    "return_token_ids": Unsupported(instead="send the answer to /tokenize, or use gRPC"),
    "return_tokens_as_token_ids": Unsupported(instead="send the answer to /tokenize, or use gRPC"),
    "sequence_bias": _BIAS,
    "smoothing_factor": Unsupported(neutral=(0,)),
    "stop_regex": _STOP,
    "stop_sequences": _STOP,
    "stop_strings": _STOP,
    "stopping_strings": _STOP,
    "structural_tag": _CONSTRAINED,
    "suppress_tokens": _BIAS,
    "system": Unsupported(instead="send a message of the role system"),
    "t_max_predict_ms": Unsupported(neutral=(0, -1), instead="send max_tokens"),
    "template": Unsupported(instead="send a prompt to /v1/completions"),
    "tfs_z": Unsupported(neutral=(1,), instead="send min_p"),
    "top_a": Unsupported(neutral=(0,), instead="send min_p"),
    "top_n_sigma": Unsupported(neutral=(-1, 0), instead="send top_p or min_p"),
    "top_n_tokens": Unsupported(neutral=(0,), instead="send logprobs"),
    "truncate": Unsupported(instead="shorten the prompt"),
    "truncate_prompt_tokens": Unsupported(neutral=(-1,), instead="shorten the prompt"),
    "typical": Unsupported(neutral=(1,), instead="send min_p"),
    "typical_p": Unsupported(neutral=(1,), instead="send min_p"),
    "use_beam_search": Unsupported(),
    "watermark": Unsupported(),
    "xtc_probability": Unsupported(neutral=(0,), instead="send top_p or min_p"),
}

IGNORED_HEADER = "x-packtrain-ignored"
_NOT_PRINTABLE = re.compile(r"[^A-Za-z0-9_.\[\]#-]")
_MAX_IGNORED_NAMES, _MAX_IGNORED_CHARS = 16, 64

NO_EFFECT = frozenset({"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user"})
"""Whatever they hold, nothing is asked of a server that has no use for them."""

NOT_HONOURED: Mapping[str, tuple[Any, ...]] = {
    "prediction": (),
    "reasoning": ({"effort": "none"},),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (),
}
"""They change no answer, but ask for something that is not done: told like unknown fields, but for null and these values."""


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a field that is ignored need not be told."""
    if isinstance(value, dict):
        value = {inner: each for inner, each in value.items() if not _is_nothing(each)}
    return name in NO_EFFECT or _is_nothing(value) or _is_in(value, NOT_HONOURED.get(name, ()))


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _is_in(value: Any, values: tuple[Any, ...]) -> bool:
    """1 is 1.0, and not true."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values)


def _spelt(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case [*items]:
            return "[" + ", ".join(map(_spelt, items)) + "]"
        case dict():
            return "{" + ", ".join(f"{_spelt(name)}: {_spelt(each)}" for name, each in value.items()) + "}"
        case _:
            return str(value)


def ignored_header(names: Sequence[str]) -> str:
    """The header's value: names from a client, of bounded length and fit for a header."""
    told = [_NOT_PRINTABLE.sub("?", name[:_MAX_IGNORED_CHARS]) for name in names[:_MAX_IGNORED_NAMES]]
    more = len(names) - len(told)
    return ", ".join(told + ([f"and {more} more"] if more else []))
