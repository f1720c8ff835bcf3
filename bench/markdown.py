"""Tables in Markdown, and sections of a file that a program writes."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def begin(section: str) -> str:
    return f"<!-- begin {section}: written by python -m bench.report -->"


def end(section: str) -> str:
    return f"<!-- end {section} -->"


def replace_section(text: str, section: str, content: str) -> str:
    """`text` with what stands between the section's marks replaced. Raises ValueError when it has no such marks, once each."""
    first, last = begin(section), end(section)
    if text.count(first) != 1 or text.count(last) != 1 or text.index(first) > text.index(last):
        raise ValueError(f"the marks {first} and {last} must stand once each, in this order")
    before, _, rest = text.partition(first)
    after = rest.partition(last)[2]
    return f"{before}{first}\n{content}\n{last}{after}"
