"""Regular expressions of a JSON schema, as the compiler of grammars can hold answers to them.

The compiler escapes an expression as JSON. A class of characters that has all control characters, as [^"] has, it takes for one
that has the quotation mark and the backslash too. Such a class gets a control character less here: U+0000, which no text needs.
"""

import re

_TOKEN = re.compile(r"\\[pP](?:\{[^}]*\}|.)|\\.|\[\^?\]?|.", re.DOTALL)
"""Of an expression outside of a class: a class by a property, an escape, the beginning of a class, or a character."""
_CLASS_TOKEN = re.compile(r"\\.|\[:\^?\w+:\]|\[\^?\]?|\]|.", re.DOTALL)
_COUNTED_UP = re.compile(r"\[(?!\^)(?:\\[^pP]|[^\\\[\]\-&~])+\]", re.DOTALL)
_WITHOUT_NUL = r"--\x00]"


IGNORES_SPACE = re.compile(r"\(\?[a-zA-Z]*x")
"""An expression in which comments may stand, so that a bracket may begin no class."""


def without_nul(pattern: str) -> str:
    """The same expression, except that no class has U+0000, unless its characters are only counted up."""
    written: list[str] = []
    position = 0
    while position < len(pattern):
        token = _TOKEN.match(pattern, position)
        assert token is not None  # the last alternative takes any character
        end = _end_of_class(pattern, token.end()) if token[0].startswith("[") else token.end()
        part = pattern[position:end]
        is_class = part.startswith(("[", r"\p", r"\P"))
        written.append(f"[{part}{_WITHOUT_NUL}" if is_class and not _COUNTED_UP.fullmatch(part) else part)
        position = end
    return "".join(written)


def _end_of_class(pattern: str, position: int) -> int:
    """Behind the bracket that closes a class which begins before `position`; the end where none does."""
    depth = 1
    while depth and position < len(pattern):
        token = _CLASS_TOKEN.match(pattern, position)
        assert token is not None
        if token[0] == "]":
            depth -= 1
        elif token[0].startswith("[") and not token[0].startswith("[:"):
            depth += 1
        position = token.end()
    return position
