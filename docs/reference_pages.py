"""Hooks of the documentation's site (`make docs`): pages made from comments and docstrings, and links that leave `docs/`.

The README is the first page. `reference/grpc-*.md` are made of the comments in `protos/*.proto`, `reference/python.md` of the
docstrings of `serving.client`.
"""

import ast
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PROTOS = ("inference", "admin")
_OUTSIDE = re.compile(r"\[([^\]]*)\]\((?:\.\./)+([^)#]+)[^)]*\)")
_MESSAGE, _ENUM, _SERVICE = 4, 5, 6
_NESTED, _FIELD, _ENUM_VALUE, _METHOD = 3, 2, 2, 2
"""Numbers of the fields in descriptor.proto, of which the paths of comments are made."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"index.md": _first_page(), "reference/python.md": _python_page()}
    pages |= {f"reference/grpc-{name}.md": _grpc_page(name) for name in PROTOS}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link to a file of the repository that is no page becomes its path."""
    return _OUTSIDE.sub(r"\1 (`\2`)", markdown)


def _first_page() -> str:
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)([^)#]*(?<!\.md))\)|\[([^\]]*)\]\(([A-Z]+\.md)\)", _path_of, text)


def _path_of(match: re.Match[str]) -> str:
    label, path = match.group(1) or match.group(3) or "", match.group(2) or match.group(4)
    return f"{label} (`{path}`)"


def _grpc_page(name: str) -> str:
    file = _descriptor(name)
    comments = {tuple(at.path): at.leading_comments.strip() for at in file.source_code_info.location}
    lines = [f"# gRPC: {file.package} ({name}.proto)", ""]
    for index, service in enumerate(file.service):
        lines += [f"## Service {service.name}", "", comments.get((_SERVICE, index), ""), ""]
        for position, method in enumerate(service.method):
            streams = "stream " if method.server_streaming else ""
            signature = f"`{method.name}({_short(method.input_type)}) → {streams}{_short(method.output_type)}`"
            lines += [f"- {signature}: {_one_line(comments.get((_SERVICE, index, _METHOD, position), ''))}"]
        lines.append("")
    for index, message in enumerate(file.message_type):
        lines += _message(message, (_MESSAGE, index), comments, message.name)
    for index, enum in enumerate(file.enum_type):
        lines += [
            f"## Enum {enum.name}",
            "",
            comments.get((_ENUM, index), ""),
            "",
            "| value | meaning |",
            "| --- | --- |",
        ]
        for position, value in enumerate(enum.value):
            meaning = _one_line(comments.get((_ENUM, index, _ENUM_VALUE, position), ""))
            lines.append(f"| `{value.name}` = {value.number} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def _message(
    message: DescriptorProto, path: tuple[int, ...], comments: dict[tuple[int, ...], str], name: str
) -> Iterator[str]:
    yield from (f"## {name}", "", comments.get(path, ""), "")
    if message.field:
        yield from ("| field | type | meaning |", "| --- | --- | --- |")
    for position, field in enumerate(message.field):
        meaning = _one_line(comments.get((*path, _FIELD, position), ""))
        yield f"| `{field.name}` | {_type(field)} | {meaning} |"
    yield ""
    for position, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from _message(nested, (*path, _NESTED, position), comments, f"{name}.{nested.name}")


def _type(field: FieldDescriptorProto) -> str:
    kind = _short(field.type_name) or FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    label = "repeated " if field.label == FieldDescriptorProto.LABEL_REPEATED else ""
    return f"{label}{'optional ' if field.proto3_optional else ''}`{kind}`"


def _short(type_name: str) -> str:
    return type_name.rpartition(".")[2]


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _descriptor(name: str) -> FileDescriptorProto:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "set"
        include = Path(protoc.__file__).parent / "_proto"
        command = ["protoc", f"-I{ROOT}", f"-I{include}", f"--descriptor_set_out={out}", "--include_source_info"]
        if protoc.main([*command, f"protos/{name}.proto"]):
            raise RuntimeError(f"protoc refused protos/{name}.proto")
        return FileDescriptorSet.FromString(out.read_bytes()).file[0]


def _python_page() -> str:
    lines = ["# Python client", "", "`from serving.client import Client, chat_prompt`", ""]
    for module in ("client", "tls"):
        tree = ast.parse((ROOT / "serving/client" / f"{module}.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                lines += _definition(node)
    return "\n".join(lines)


def _definition(node: ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef):
        yield from (
            f"## `{node.name}`",
            "",
            "```python",
            _signature(node),
            "```",
            "",
            ast.get_docstring(node) or "",
            "",
        )
        return
    yield from (f"## class `{node.name}`", "", ast.get_docstring(node) or "", "")
    for member in node.body:
        is_shown = isinstance(member, ast.FunctionDef) and (
            member.name == "__init__" or not member.name.startswith("_")
        )
        if is_shown:
            assert isinstance(member, ast.FunctionDef)
            yield from ("```python", _signature(member), "```", "", ast.get_docstring(member) or "", "")


def _signature(node: ast.FunctionDef) -> str:
    bare: Any = ast.FunctionDef(
        name=node.name, args=node.args, body=[ast.Expr(ast.Constant(...))], decorator_list=[], returns=node.returns
    )
    return ast.unparse(ast.fix_missing_locations(bare)).partition(":\n")[0]
