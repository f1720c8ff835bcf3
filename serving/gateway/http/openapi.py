"""The OpenAPI document, made from the same types that requests are checked with."""

import html
from functools import cache
from typing import Any

import msgspec

from serving import __version__
from serving.gateway.http import objects, responses_form, schemas

# Path: (method, what it does, request, answer, event of a stream)
_PATHS: dict[str, tuple[str, str, type | None, type | None, type | None]] = {
    "/v1/chat/completions": (
        "post", "Answer a conversation.", schemas.ChatRequest, objects.ChatCompletion, objects.ChatChunk,
    ),
    "/v1/completions": (
        "post", "Continue texts or token ids.", schemas.CompletionRequest, objects.Completion, objects.Completion,
    ),
    "/v1/responses": (
        "post", "Answer a text or a conversation, as OpenAI's newer API has it.", responses_form.ResponsesRequest,
        responses_form.ResponseObject, responses_form.ResponseEvent,
    ),
    "/v1/models": ("get", "The models that the sender may use.", None, objects.ModelList, None),
    "/v1/models/{model}": ("get", "One model.", None, objects.Model, None),
    "/tokenize": ("post", "Token ids of a text or a conversation.", schemas.TokenizeRequest, objects.TokenizeAnswer, None),
    "/detokenize": ("post", "The text of token ids.", schemas.DetokenizeRequest, objects.DetokenizeAnswer, None),
    "/tokenizer_info": ("get", "What remote tokenizers ask for.", None, objects.TokenizerInfo, None),
    "/version": ("get", "The version of this server.", None, objects.Version, None),
    "/healthz": ("get", "The process is alive. Needs no credentials.", None, None, None),
    "/readyz": ("get", "Some replica group can serve (200), or none (503). Needs no credentials.", None, None, None),
    "/health": ("get", "The same as /readyz, by the name that vLLM gives it.", None, None, None),
    "/ping": ("get", "The same as /readyz, by the name that SageMaker gives it.", None, None, None),
}  # fmt: skip


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    types = [each for _, _, *kinds in _PATHS.values() for each in kinds if each is not None]
    _, components = msgspec.json.schema_components(
        [*types, objects.ErrorAnswer], ref_template="#/components/schemas/{name}"
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "Packtrain", "version": __version__},
        "security": [{"key": []}],
        "paths": {path: _operation(path, *entry) for path, entry in _PATHS.items()},
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(
    path: str, method: str, summary: str, request: type | None, answer: type | None, event: type | None
) -> dict[str, Any]:
    content: dict[str, Any] = {} if answer is None else {"application/json": {"schema": _reference(answer)}}
    if event is not None:
        content["text/event-stream"] = {"schema": _reference(event)}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {
                "description": "An error.",
                "content": {"application/json": {"schema": _reference(objects.ErrorAnswer)}},
            },
        },
    }
    if request is not None:
        body = {"application/json": {"schema": _reference(request)}}
        operation["requestBody"] = {"required": True, "content": body}
    if "{model}" in path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    if answer is None:
        operation["security"] = []
    return {method: operation}


def _reference(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


@cache
def page() -> bytes:
    """The same for people, in one page that fetches nothing."""
    rows = []
    for path, (method, summary, request, answer, _) in _PATHS.items():
        kinds = " → ".join(f'<a href="#{kind.__name__}">{kind.__name__}</a>' for kind in (request, answer) if kind)
        rows.append(f"<tr><td><code>{method.upper()} {path}</code><td>{html.escape(summary)}<td>{kinds}")
    for name, schema in document()["components"]["schemas"].items():
        fields = ", ".join(f"<code>{html.escape(field)}</code>" for field in schema.get("properties", {}))
        about = html.escape(schema.get("description", ""))
        rows.append(f'<tr id="{name}"><td>{name}<td>{about}<td>{fields}')
    style = "body{font-family:sans-serif;margin:2em}td{padding:.3em 1em;vertical-align:top;border-top:1px solid #ccc}"
    return (
        f"<!doctype html><meta charset=utf-8><title>Packtrain</title><style>{style}</style><h1>Packtrain</h1>"
        f'<p>The whole of it for programs: <a href="/openapi.json">/openapi.json</a><table>{"".join(rows)}</table>'
    ).encode()
