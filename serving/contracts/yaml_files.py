"""YAML that people wrote: read as plain data, and what is wrong with it told by place and field.

Of the server's configuration, and of the scenarios of load tests and simulations.
"""

import difflib
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from model_parallel.errors import ConfigError

MAX_FILE_BYTES = 16 << 20
"""Of a YAML file. What is given for one may be weights of many GiB."""
MAX_NODES = 1_000_000
"""Of a YAML text, those of its aliases counted each time."""


class Section(BaseModel):
    """A mapping in such a file: frozen. An unknown key is an error. So are a number that is not finite and a truth value where a
    number is wanted: `http_port: off` would be port 0 otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_value_is_a_number(cls, data: object) -> object:
        """Pydantic takes true for 1. As a text it is refused at its place."""
        if not isinstance(data, dict):
            return data
        return {
            key: str(value).lower() if isinstance(value, bool) and key in cls._numbers() else value
            for key, value in data.items()
        }

    @classmethod
    def _numbers(cls) -> set[str]:
        """Fields that are numbers, and never truth values."""
        kinds = {name: set(_types_in(field.annotation)) for name, field in cls.model_fields.items()}
        return {name for name, allowed in kinds.items() if allowed & {int, float} and bool not in allowed}


def _types_in(annotation: Any) -> Iterator[Any]:
    """Those that a union is made of, also where some have bounds (`Annotated`)."""
    if get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _types_in(member)
    elif get_origin(annotation) is Annotated:
        yield from _types_in(get_args(annotation)[0])
    else:
        yield annotation


def read_mapping(path: Path, main_key: str) -> dict[str, Any]:
    """A YAML file that holds a mapping, as plain data. Raises ConfigError; `main_key` is what it says such a mapping has."""
    data = read_yaml(path)
    if not isinstance(data, dict):
        held = "and is empty" if data is None else f"not {type(data).__name__}"
        raise ConfigError(f"{path} must hold a mapping with `{main_key}:`, {held}")
    if main_key not in data and ("architectures" in data or "model_type" in data):
        raise ConfigError(f"{path} is the configuration of a checkpoint; give its directory, {path.absolute().parent}")
    return data


def read_yaml(path: Path) -> Any:
    """A file as plain data; None when it is empty. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has more than {MAX_FILE_BYTES} bytes, and no YAML file has so many")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: byte {error.start} is not UTF-8") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, origin: str) -> Any:
    """Plain data. A key that stands twice in a mapping is an error. Raises ConfigError of one line that begins with `origin`."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        told = ": ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{origin} is not valid YAML: {place}{told}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{origin} is not valid YAML: it is nested too deeply") from error


class _Loader(yaml.SafeLoader):
    """Says where a value is that PyYAML's own constructors do not take, takes no key twice, and no more by aliases than anybody
    writes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._num_nodes: dict[yaml.Node, int] = {}
        """Of each finished node: itself and all below it, those of aliases as often as they stand for something."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        is_alias = self.check_event(yaml.events.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and node not in self._num_nodes:
            raise yaml.composer.ComposerError(None, None, "this alias stands for something that it is a part of", mark)
        if node is not None and not is_alias:
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()
            inner = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in pairs for part in pair]
            self._num_nodes[node] = 1 + sum(self._num_nodes[part] for part in inner)
            if self._num_nodes[node] > MAX_NODES:
                raise yaml.composer.ComposerError(None, None, f"there are more than {MAX_NODES} values in it", mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, LookupError, AttributeError) as error:
            # The last two are what PyYAML raises for a text that is tagged as a truth value, a number or a time, and is none.
            reason = (
                str(error)
                if isinstance(error, ValueError | OverflowError)
                else f"this is no {node.tag.rpartition(':')[2]}"
            )
            raise yaml.constructor.ConstructorError(
                None, None, f"{getattr(node, 'value', '')!r:.40}: {reason}", node.start_mark
            ) from error

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """No path, host or text that the system takes holds the character NUL."""
        if isinstance(node.value, str) and "\0" in node.value:
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value!r:.40}: a text cannot hold the character NUL", node.start_mark
            )
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set[tuple[str, str]]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in keys:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands here for the second time", key.start_mark
                    )
                keys.add((key.tag, key.value))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


# Numbers are read as YAML 1.2 has them. PyYAML follows YAML 1.1, where 1e6 is a text, 010 is 8, and 12:30 is 750. A number that
# begins with 0 is a text here, which fields of whole numbers take for 10.
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$"
        r"|\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def explain_errors(error: ValidationError, root: type[BaseModel], origin: str) -> str:
    """One line for the user: each wrong field of `root` by its path, and the nearest known key for an unknown one."""
    problems = error.errors()
    # A list with a wrong item is also said to be too short; the item is what matters.
    inner = [p for p in problems if not any(q["loc"][: len(p["loc"])] == p["loc"] != q["loc"] for q in problems)]
    lines = [_explain(root, problem["loc"], problem["type"], problem["msg"], problem["input"]) for problem in inner]
    return f"{origin}: " + "; ".join(lines)


def _explain(root: type[BaseModel], location: tuple[int | str, ...], kind: str, message: str, value: object) -> str:
    where = ".".join(str(part) for part in location)
    if kind != "extra_forbidden":
        hint = _meant(str(value), message) if kind == "literal_error" else ""
        message = _IN_YAML_S_WORDS.get(kind, message.removeprefix("Value error, "))
        if kind == "string_type" and isinstance(value, int | float | date):
            message += ", so in quotes"
        if kind == "model_type" and value is None:
            message += "; an empty one is {}"
        told = ": ".join(part for part in (where, message) if part)
        # A check of ours that looks at a whole section names what it means.
        is_told = kind == "missing" or (kind == "value_error" and isinstance(value, dict))
        return told + ("" if is_told else f" (got {_as_written(value):.80}){hint}")
    known = _fields_at(root, location[:-1])
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {where!r}; {hint}"


_IN_YAML_S_WORDS = {
    "model_type": "must be a mapping", "model_attributes_type": "must be a mapping", "dict_type": "must be a mapping",
    "tuple_type": "must be a list", "list_type": "must be a list", "string_type": "must be a text", "path_type": "must be a path",
    "too_short": "must have at least 1 item", "invalid_key": "a key must be a text, so in quotes",
}  # fmt: skip
"""By kind of error, where pydantic speaks of Python's types."""


def _as_written(value: object) -> str:
    """As YAML has it, where that is not as Python has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if isinstance(value, date) else repr(value)


_OTHER_WORDS = {
    "bf16": "bfloat16", "fp16": "float16", "half": "float16", "f16": "float16", "fp32": "float32", "f32": "float32",
    "float": "float32", "gpu": "cuda", "nvidia": "cuda", "w8a16": "int8", "8bit": "int8", "llama2": "llama-2",
}  # fmt: skip
"""What other systems call the values of ours."""


def _meant(value: str, message: str) -> str:
    """A hint at the allowed value that was probably meant; `message` quotes those that are allowed."""
    allowed = message.split("'")[1::2]
    word = _OTHER_WORDS.get(value.lower().removeprefix("torch."), value.lower())
    near = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _fields_at(root: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Keys of the section at a path of pydantic's: field names, places in lists, and the tags of unions."""
    sections = {root}
    for part in location:
        if isinstance(part, int):
            continue
        if fields := [section.model_fields[part] for section in sections if part in section.model_fields]:
            sections = set().union(
                *(_sections_in(annotated) for found in fields for annotated in (found.annotation, *found.metadata))
            )
        else:  # a tag: of a union's members, the one that has it
            sections = {s for s in sections if any(part in get_args(f.annotation) for f in s.model_fields.values())}
    return sorted(set().union(*(section.model_fields for section in sections)))


def _sections_in(annotation: Any) -> set[type[BaseModel]]:
    """The models that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return set().union(*(_sections_in(part) for part in get_args(annotation)))
