"""Everything about a checkpoint that can be told without computing with it. `serve` and `inspect` ask the same questions.

python -m serving.models.verify SOURCE [CHAT_FORMAT]        prints a JSON list of problems
"""

import json
import sys

from model_parallel.checkpoint.detect import CheckpointInfo, describe
from model_parallel.errors import CheckpointError, ConfigError
from serving.config import ChatConfig
from serving.models.chat import resolve_text
from serving.models.fetch import resolve_source
from serving.text.chat_formats import CHAT_FORMATS


def verify(info: CheckpointInfo, chat_format: str = "") -> list[str]:
    """Problems: with the tokenizer, with the control tokens of `chat_format` (the checkpoint's own when empty), with tensors
    that are missing, left over, of a wrong shape or type, with a tied head that differs."""
    problems = []
    for check in (_check_text, _check_weights):
        try:
            check(info, chat_format)
        except (CheckpointError, ConfigError) as error:
            problems.append(str(error))
    return problems


def _check_text(info: CheckpointInfo, chat_format: str) -> None:
    chat = ChatConfig.model_validate({"format": chat_format}) if chat_format in CHAT_FORMATS else None
    try:
        resolve_text(info, chat)
    except ConfigError as error:
        named = f" {chat_format}" if chat_format else ""
        raise ConfigError(f"{info.path}: the chat format{named} cannot be used: {error}") from error


def _check_weights(info: CheckpointInfo, chat_format: str) -> None:
    # Needs torch, which takes seconds to import.
    from model_parallel.checkpoint.loader import check_complete, check_tied_head, open_checkpoint  # noqa: PLC0415
    from model_parallel.model.partition import shard_table  # noqa: PLC0415

    checkpoint = open_checkpoint(info)
    table = shard_table(info.config, 1, 0)
    check_complete(info, checkpoint, table)
    check_tied_head(checkpoint, table)


def main() -> None:
    """See above."""
    source, chat_format = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    try:
        problems = verify(describe(resolve_source(source)), chat_format)
    except (CheckpointError, ConfigError) as error:
        problems = [str(error)]
    print(json.dumps(problems))


if __name__ == "__main__":
    main()
