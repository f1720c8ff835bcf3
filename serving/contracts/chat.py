"""A chat format as plain strings: what is written before the first message, between two messages, and before the answer.

Every format that is known here, and almost every chat template in use, is this: texts that depend only on the roles of the two
messages that they stand between. So no template language has to run when a request is answered.
"""

import msgspec

START, SYSTEM, USER, ASSISTANT, ANSWER = "start", "system", "user", "assistant", "answer"
DATE_OPENS, DATE_CLOSES = "\ue000", "\ue001"
"""Around a strftime format in a literal, which is replaced by the day's date."""


class ChatFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How a conversation becomes a prompt."""

    name: str
    """"llama-2", "chatml", …; "template" for one that was read out of a checkpoint's own template."""
    literals: dict[str, str]
    """What stands between two messages, by `between(role, role)`; control tokens are written as their texts. Two roles that are
    not in it cannot follow each other."""
    trimmed_left: tuple[str, ...] = ()
    """Of a message that follows such a literal the spaces at its beginning are dropped."""
    trimmed_right: tuple[str, ...] = ()
    """Of a message that such a literal follows the spaces at its end are dropped."""
    system_before_last: bool = False
    """The system message stands before the last user message, and not first (Mistral's v0.3)."""
    system_joins_user: bool = False
    """The text between system message and user message is trimmed with an empty user message (Llama 2's)."""
    every_part_is_first: bool = False
    """Of a sentencepiece vocabulary: every part between control tokens is encoded like the beginning of a text (Llama 2's)."""
    default_system: str = ""
    """System message that is added when a conversation brings none. Where a checkpoint's template has one of its own, it stands
    in the literals, and `shown_system` tells it."""
    shown_system: str = ""

    def literal(self, before: str, after: str) -> str | None:
        """None for roles that cannot follow each other."""
        return self.literals.get(between(before, after))


def between(before: str, after: str) -> str:
    """Key of a literal."""
    return f"{before}>{after}"
