"""Whether two checkpoints are the same one, told in milliseconds and not by reading all of their weights."""

import hashlib
from pathlib import Path

_SUFFIXES = frozenset({".bin", ".gguf", ".json", ".model", ".pth", ".safetensors"})
_END_BYTES = 1 << 20
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4096
"""Of a larger one, beside its first and last MiB."""


def fingerprint(source: Path) -> str:
    """A digest (hex) of the names and sizes of a checkpoint's files, of all small ones, and of samples of the large ones.

    Weights that were trained further differ in nearly every page; that a file is changed in places that are not sampled is not
    noticed. Raises OSError.
    """
    digest = hashlib.sha256()
    files = [source] if source.is_file() else sorted(path for path in source.iterdir() if path.suffix in _SUFFIXES)
    for path in files:
        num_bytes = path.stat().st_size
        digest.update(f"{path.name}\0{num_bytes}\0".encode())
        with path.open("rb") as file:
            if num_bytes <= 2 * _END_BYTES:
                digest.update(file.read())
                continue
            digest.update(file.read(_END_BYTES))
            for sample in range(_NUM_SAMPLES):
                file.seek(num_bytes * sample // _NUM_SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
            file.seek(-_END_BYTES, 2)
            digest.update(file.read())
    return digest.hexdigest()
