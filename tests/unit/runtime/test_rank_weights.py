"""A rank loads the weights that the model was deployed with, and no others that lie at the same place."""

from dataclasses import replace
from pathlib import Path

import pytest

from model_parallel.checkpoint.detect import describe
from model_parallel.checkpoint.fingerprint import weights_fingerprint
from model_parallel.errors import CheckpointError
from tests.support.ranks import group_config, prompt_logits, save_random_llama


@pytest.mark.parametrize("tp_size", [1, 2])
def test_weights_that_were_replaced_are_refused(tmp_path: Path, tp_size: int) -> None:
    model = save_random_llama(tmp_path)
    config = replace(group_config(tmp_path, tp_size), weights=weights_fingerprint(describe(tmp_path)))
    prompt_logits(config, [1, 2, 3], chunk=3)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    prompt_logits(config, [1, 2, 3], chunk=3)
    model.model.embed_tokens.weight.data += 1
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path} is not what the model was deployed from"):
        prompt_logits(config, [1, 2, 3], chunk=3)
    prompt_logits(replace(config, weights=""), [1, 2, 3], chunk=3)
