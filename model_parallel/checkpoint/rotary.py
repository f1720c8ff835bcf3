"""Where other formats keep the rows of query and key projections.

RoPE (Su et al. 2021) turns pairs of a head's rows. Hugging Face and this project pair row i with row i + head_dim/2; Meta's own
files, and GGUF after them, pair rows 2i and 2i + 1.
"""

import numpy as np
from torch import Tensor

QUERY_AND_KEY = (".q_proj.weight", ".k_proj.weight")
"""Endings of the names of what is paired."""


def interleaved_rows(rows: range, head_dim: int) -> np.ndarray:
    """Where the adjacent-pair layout keeps these rows of the half-split one, [len(rows)]."""
    row = np.arange(rows.start, rows.stop)
    head, within = row // head_dim, row % head_dim
    half, pair = within // (head_dim // 2), within % (head_dim // 2)
    return np.asarray(head * head_dim + 2 * pair + half)


def half_split_as_pairs(rows_OE: Tensor, head_dim: int) -> Tensor:
    """[H, D/2, 2, E]: a view of the half-split rows of whole heads in the order of the adjacent-pair layout."""
    return rows_OE.view(-1, 2, head_dim // 2, rows_OE.shape[-1]).transpose(1, 2)
