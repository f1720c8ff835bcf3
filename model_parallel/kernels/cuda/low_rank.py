"""What adapters add to products, in Triton: many adapters in one launch.

A tile is up to NUM_ROWS neighbouring rows of one adapter, and every dot has the same shape, so what is added to a row does not
depend on the others. Weights lie wherever each adapter was loaded: a program finds their addresses in a table.

Shape suffixes: R rows of a tile · O outputs, or ranks in the first half · I inputs of one dot
"""

import triton
import triton.language as tl

ENTRY_SIZE = 17
"""Numbers of one adapter about one product: address and ranks of `down`, and PART_SIZE numbers of each of its parts."""
PART_SIZE = 5
"""Address of `up`, first rank, ranks, first output, outputs. A part that is not there has no outputs."""


@triton.jit
def shrink_kernel(
    x,
    tiles,
    table,
    h,
    num_inputs,
    h_width,
    ENTRY_SIZE: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
):
    """h = x · downᵀ in float32: a program takes one tile and NUM_RANKS of the ranks. tiles: first row, rows, run."""
    tile = tl.program_id(0)
    first_row, num_rows, run = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    num_ranks = tl.load(table + run * ENTRY_SIZE + 1)
    first_rank = tl.program_id(1) * NUM_RANKS
    if first_rank >= num_ranks:
        return
    down = tl.load(table + run * ENTRY_SIZE).to(tl.pointer_type(x.dtype.element_ty))
    row_R = tl.arange(0, NUM_ROWS)
    rank_O = first_rank + tl.arange(0, NUM_RANKS)
    sum_RO = tl.zeros([NUM_ROWS, NUM_RANKS], tl.float32)
    for first_input in range(0, num_inputs, NUM_INPUTS):
        input_I = first_input + tl.arange(0, NUM_INPUTS)
        x_RI = tl.load(
            x + (first_row + row_R)[:, None] * num_inputs + input_I[None, :],
            mask=(row_R < num_rows)[:, None] & (input_I < num_inputs)[None, :],
            other=0.0,
        )
        down_OI = tl.load(
            down + rank_O[:, None] * num_inputs + input_I[None, :],
            mask=(rank_O < num_ranks)[:, None] & (input_I < num_inputs)[None, :],
            other=0.0,
        )
        sum_RO = tl.dot(x_RI, tl.trans(down_OI), sum_RO, input_precision="ieee")
    tl.store(
        h + (first_row + row_R)[:, None] * h_width + rank_O[None, :],
        sum_RO,
        mask=(row_R < num_rows)[:, None] & (rank_O < num_ranks)[None, :],
    )


@triton.jit
def expand_kernel(
    h,
    tiles,
    table,
    out,
    x,
    h_width,
    out_width,
    ENTRY_SIZE: tl.constexpr,
    PART_SIZE: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
):
    """out += h · upᵀ: a program takes one tile, one part and NUM_OUTPUTS of its outputs. `x` tells the weights' type."""
    tile = tl.program_id(0)
    first_row, num_rows, run = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    part = table + run * ENTRY_SIZE + 2 + tl.program_id(1) * PART_SIZE
    num_outputs = tl.load(part + 4)
    first = tl.program_id(2) * NUM_OUTPUTS
    if first >= num_outputs:
        return
    up = tl.load(part).to(tl.pointer_type(x.dtype.element_ty))
    first_rank, num_ranks, first_output = tl.load(part + 1), tl.load(part + 2), tl.load(part + 3)
    row_R = tl.arange(0, NUM_ROWS)
    output_O = first + tl.arange(0, NUM_OUTPUTS)
    sum_RO = tl.zeros([NUM_ROWS, NUM_OUTPUTS], tl.float32)
    for begin in range(0, num_ranks, NUM_RANKS):
        rank_I = begin + tl.arange(0, NUM_RANKS)
        h_RI = tl.load(
            h + (first_row + row_R)[:, None] * h_width + (first_rank + rank_I)[None, :],
            mask=(row_R < num_rows)[:, None] & (rank_I < num_ranks)[None, :],
            other=0.0,
        )
        up_OI = tl.load(
            up + output_O[:, None] * num_ranks + rank_I[None, :],
            mask=(output_O < num_outputs)[:, None] & (rank_I < num_ranks)[None, :],
            other=0.0,
        )
        sum_RO = tl.dot(h_RI, tl.trans(up_OI.to(tl.float32)), sum_RO, input_precision="ieee")
    place = out + (first_row + row_R)[:, None] * out_width + (first_output + output_O)[None, :]
    mask = (row_R < num_rows)[:, None] & (output_O < num_outputs)[None, :]
    tl.store(place, tl.load(place, mask=mask, other=0.0) + sum_RO, mask=mask)
