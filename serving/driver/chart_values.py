"""Values of the chart helm/packtrain, as helm takes them: its own under those that are given, and what its schema says to them.

chart.json repeats the chart's values.yaml and values.schema.json, since an installed package has no chart beside it.
"""

import copy
import difflib
import functools
import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

from pydantic import BaseModel

from serving.config import AdminConfig, GatewayConfig, ServingConfig


@functools.cache
def _chart() -> dict[str, Any]:
    chart: dict[str, Any] = json.loads(files("serving.driver").joinpath("chart.json").read_text(encoding="utf-8"))
    return chart


def chart_defaults() -> dict[str, Any]:
    """What the chart has where nothing is given."""
    values: dict[str, Any] = copy.deepcopy(_chart()["values"])
    return values


def merged(first: Mapping[str, Any], second: Mapping[str, Any], *, null_removes: bool = False) -> dict[str, Any]:
    """Values as helm merges them, the second over the first: mappings by key, everything else is replaced. A null of a file stays
    until the files meet the chart's own values, of which it takes one away (`null_removes`)."""
    result = dict(first)
    for key, value in second.items():
        old = result.get(key)
        if null_removes and value is None and old is not None:
            del result[key]
        elif isinstance(old, dict) and isinstance(value, dict):
            result[key] = merged(old, value, null_removes=null_removes)
        else:
            result[key] = value
    return result


def with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the chart's templates see."""
    return merged(chart_defaults(), _with_text_keys(given), null_removes=True)


def _with_text_keys(value: Any) -> Any:
    """As in JSON, which helm makes of YAML."""
    if isinstance(value, list):
        return [_with_text_keys(item) for item in value]
    if isinstance(value, Mapping):
        return {
            str(key).lower() if isinstance(key, bool) else str(key): _with_text_keys(item)
            for key, item in value.items()
        }
    return value


def charts_own() -> Iterator[tuple[str, str]]:
    """(section, key) of the server's configuration that the chart itself sets, and that its schema therefore lacks."""
    kinds: dict[str, type[BaseModel]] = {"": ServingConfig, "gateway": GatewayConfig, "admin": AdminConfig}
    for section, kind in kinds.items():
        known = _chart()["schema"]["$defs"][kind.__name__]["properties"]
        for key in kind.model_fields:
            if key not in known:
                yield section, key


def _unknown_keys(path: str, given: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if patterns := schema.get("patternProperties"):
        for key in given:
            if not any(re.search(pattern, key) for pattern in patterns):
                yield path, f"{key!r} is no key that Kubernetes takes"
        return
    known = schema.get("properties", {})
    for key in given.keys() - known.keys():
        near = difflib.get_close_matches(key, list(known), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield f"{path}.{key}".removeprefix("."), f"the chart has no such value{hint}"


def schema_problems(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(path, what is wrong there) of values with the chart's own under them."""
    from jsonschema import Draft202012Validator  # noqa: PLC0415  # for this alone
    from jsonschema.exceptions import best_match  # noqa: PLC0415

    found: list[tuple[str, str]] = []
    for outer in Draft202012Validator(_chart()["schema"]).iter_errors(values):
        error = best_match([outer])  # of several kinds that a value may be of, the one that it is closest to
        path = ".".join(map(str, error.absolute_path))
        if error.validator == "additionalProperties" and isinstance(error.instance, dict):
            found += _unknown_keys(path, error.instance, error.schema)
        elif error.validator == "required":
            missing = [key for key in error.validator_value if key not in error.instance]
            found += [
                (f"{path}.{key}".removeprefix("."), "is missing; null takes away what the chart has") for key in missing
            ]
        elif path == "config.tenancy.database":  # which may have a password in it
            found.append((path, "must be empty, or begin with sqlite: or postgresql:"))
        else:
            found.append((path, error.message))
    return found
