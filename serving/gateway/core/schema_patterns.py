"""Regular expressions of a JSON schema, as the compiler of grammars can hold answers to them.

The compiler reads a class of characters as Rust does, where classes may stand in each other and be subtracted. JSON Schema means
ECMAScript's: the first bracket closes a class, and all that stands in it stands for itself.

The compiler escapes an expression as JSON. A class of characters that has all control characters, as [^"] has, it takes for one
that has the quotation mark and the backslash too. Such a class gets a control character less here: U+0000, which no text needs.
"""

import re

_TOKEN = re.compile(r"\\[pP](?:\{[^}]*\}|.)|\\.|\[\^?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
"""Of an expression: a class by a property, an escape, a class, or a character."""
_ATOM = re.compile(r"\\(?:[pPu]\{[^}]*\}|[pP].|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)|.", re.DOTALL)
"""Of a class: what stands for a character, or for several."""
_IS_SET = re.compile(r"\\[dDpPsSwW]")
_COUNTED_UP = re.compile(r"\[(?!\^)(?:\\[^pP]|[^\\\-])+\]", re.DOTALL)
"""A class as it is written here, without ranges."""
_WITHOUT_NUL = r"--\x00]"
_EVERYTHING, _NOTHING = r"[\x01-\x{10FFFF}]", r"[^\x00-\x{10FFFF}]"
_FLAG_X = re.compile(r"\(\?[a-zA-Z]*x")


def ignores_space(pattern: str) -> bool:
    """Whether comments may stand in it, in which a bracket begins no class, and line breaks end something."""
    return _FLAG_X.search(_TOKEN.sub(lambda token: token[0] if len(token[0]) == 1 else "_", pattern)) is not None


def for_compiler(pattern: str) -> str:
    """The same expression, with classes as the compiler reads them. None has U+0000 unless its characters are counted up."""
    return _TOKEN.sub(lambda token: _written(token[0]), pattern)


def _written(token: str) -> str:
    if token == "[]":
        return _NOTHING
    if token == "[^]":
        return _EVERYTHING
    if token.startswith("[") and len(token) > 1:
        token = _class(token)
        return token if _COUNTED_UP.fullmatch(token) else f"[{token}{_WITHOUT_NUL}"
    return f"[{token}{_WITHOUT_NUL}" if token.startswith((r"\p", r"\P")) else token


def _class(token: str) -> str:
    """What has a meaning in Rust alone gets a backslash."""
    opens = "[^" if token.startswith("[^") else "["
    atoms = _ATOM.findall(token[len(opens) : -1])
    written = [opens]
    position = 0
    while position < len(atoms):
        first, *between = atoms[position : position + 3]
        written.append(_escaped(first))
        position += 1
        if len(between) == 2 and between[0] == "-":
            is_range = not any(map(_IS_SET.match, (first, between[1])))
            written += ["-" if is_range else r"\-", _escaped(between[1])]
            position += 2
    return "".join(written) + "]"


def _escaped(atom: str) -> str:
    if atom == r"\b":
        return r"\x08"  # in a class no boundary of a word
    return f"\\{atom}" if atom in "[&~-^" else atom
