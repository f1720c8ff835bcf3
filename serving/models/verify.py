"""Everything about a checkpoint that can be told without computing with it. `serve` and `inspect` ask the same questions.

python -m serving.models.verify SOURCE [CHAT]        prints a JSON list of problems; CHAT is models.chat as JSON
"""

import json
import sys
from functools import partial

from model_parallel.checkpoint.detect import CheckpointInfo, describe
from model_parallel.errors import CheckpointError, ConfigError
from serving.config import ChatConfig
from serving.models.chat import resolve_text
from serving.models.fetch import resolve_source


def verify(info: CheckpointInfo, chat: ChatConfig | None = None) -> list[str]:
    """Problems: with the tokenizer, with the control tokens of the chat format (the checkpoint's own when `chat` is None), with
    tensors that are missing, left over, of a wrong shape or type, with a tied head that differs."""
    problems = []
    for check in (partial(resolve_text, info, chat), partial(_check_weights, info)):
        try:
            check()
        except (CheckpointError, ConfigError) as error:
            problems.append(str(error))
    return problems


def _check_weights(info: CheckpointInfo) -> None:
    # Needs torch, which takes seconds to import.
    from model_parallel.checkpoint.loader import check_complete, check_tied_head, open_checkpoint  # noqa: PLC0415
    from model_parallel.model.partition import shard_table  # noqa: PLC0415

    checkpoint = open_checkpoint(info)
    table = shard_table(info.config, 1, 0)
    check_complete(info, checkpoint, table)
    check_tied_head(checkpoint, table)


def main() -> None:
    """See above."""
    source = sys.argv[1]
    chat = ChatConfig.model_validate_json(sys.argv[2]) if len(sys.argv) > 2 else None
    try:
        problems = verify(describe(resolve_source(source)), chat)
    except (CheckpointError, ConfigError) as error:
        problems = [str(error)]
    print(json.dumps(problems))


if __name__ == "__main__":
    main()
