"""The licence that a checkpoint is served under."""

import re

from model_parallel.checkpoint.detect import CheckpointInfo, directory_name
from serving.contracts.models import Licence
from serving.models.known_llama import llama_2_size

LLAMA_2_LICENCE = Licence(
    name="LLAMA 2 Community License",
    notice=(
        "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
    ),
    use_policy_url="https://ai.meta.com/llama/use-policy",
)
_NAME = re.compile(r"llama[-_ ]?2")


def licence_of(info: CheckpointInfo) -> Licence:
    """Llama 2's licence for a Llama 2 model, else what the checkpoint states.

    A checkpoint is taken for Llama 2 when it says so (its licence or its directory's name), or when it has exactly the sizes
    and the context of one and states no other licence. Derived models keep the sizes, and the licence, of what they are
    derived from; LLaMA 1 and its reproductions have a shorter context.
    """
    stated = info.licence.lower()
    if _NAME.search(stated):
        return LLAMA_2_LICENCE
    if not stated and (_NAME.search(directory_name(info.path)) or llama_2_size(info.config)):
        return LLAMA_2_LICENCE
    return Licence(name=info.licence or "not stated")
