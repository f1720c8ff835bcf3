"""Writes a checkpoint of Hugging Face's format with its linear layers in four bits, each rounded to the nearest number.

No calibration, as GPTQ and AWQ have it: what this loses is the most that such a checkpoint should lose.

Shape suffixes: O outputs · I inputs · G groups · N inputs of a group
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BITS = 4
_LARGEST = (1 << BITS) - 1
_PER_WORD = 32 // BITS


def quantize_checkpoint(source: Path, target: Path, group_size: int) -> None:
    """In GPTQ's layout, version 2, asymmetric. `source` holds one model.safetensors; embedding, head and norms stay."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, target)
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if "_proj." in name:
            parts = _gptq_parts(weight.float(), group_size)
            tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
        else:
            tensors[name] = weight
    save_file(tensors, target / "model.safetensors")
    settings = {
        "quant_method": "gptq", "bits": BITS, "group_size": group_size, "sym": False, "desc_act": False,
        "checkpoint_format": "gptq_v2",
    }  # fmt: skip
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def _gptq_parts(weight_OI: Tensor, group_size: int) -> dict[str, Tensor]:
    num_inputs = weight_OI.shape[1]
    groups_OGN = torch.nn.functional.pad(weight_OI, (0, -num_inputs % group_size)).unflatten(1, (-1, group_size))
    low_OG, high_OG = groups_OGN.amin(2).clamp(max=0.0), groups_OGN.amax(2).clamp(min=0.0)
    scales_OG = ((high_OG - low_OG) / _LARGEST).clamp(min=1e-7).half()
    zeros_OG = (-low_OG / scales_OG.float()).round().clamp(0, _LARGEST)
    numbers_OGN = (groups_OGN / scales_OG.float().unsqueeze(2) + zeros_OG.unsqueeze(2)).round().clamp(0, _LARGEST)
    return {
        "qweight": _words(numbers_OGN.flatten(1)[:, :num_inputs]).t().contiguous(),
        "qzeros": _words(zeros_OG.t()),
        "scales": scales_OG.t().contiguous(),
    }


def _words(numbers: Tensor) -> Tensor:
    """int32: eight numbers a word along the last dimension, the first in the lowest bits."""
    parts = numbers.to(torch.int64).unflatten(1, (-1, _PER_WORD))
    words = (parts << torch.arange(0, 32, BITS)).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
