"""Products with int8 weights in Triton, for as few rows as decode has, where the time is that of reading the weights.

Shape suffixes: R rows · O features out · I features in, all of one tile
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def int8_product_kernel(
    x,
    values,
    scales,
    out,
    num_rows,
    num_outputs,
    num_inputs,
    NUM_ROWS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
):
    """out = x · valuesᵀ · scales in float32; a program takes NUM_ROWS × NUM_OUTPUTS of it. x's dtype holds int8 exactly."""
    row_R = tl.program_id(1).to(tl.int64) * NUM_ROWS + tl.arange(0, NUM_ROWS)
    output_O = tl.program_id(0).to(tl.int64) * NUM_OUTPUTS + tl.arange(0, NUM_OUTPUTS)
    sum_RO = tl.zeros([NUM_ROWS, NUM_OUTPUTS], tl.float32)
    for first_input in range(0, num_inputs, NUM_INPUTS):
        input_I = first_input + tl.arange(0, NUM_INPUTS)
        x_RI = tl.load(
            x + row_R[:, None] * num_inputs + input_I[None, :],
            mask=(row_R < num_rows)[:, None] & (input_I < num_inputs)[None, :],
            other=0.0,
        )
        value_OI = tl.load(
            values + output_O[:, None] * num_inputs + input_I[None, :],
            mask=(output_O < num_outputs)[:, None] & (input_I < num_inputs)[None, :],
            other=0,
        )
        sum_RO = tl.dot(x_RI, tl.trans(value_OI.to(x_RI.dtype)), sum_RO, input_precision="ieee")
    scale_O = tl.load(scales + output_O, mask=output_O < num_outputs, other=0.0)
    tl.store(
        out + row_R[:, None] * num_outputs + output_O[None, :],
        sum_RO * scale_O[None, :],
        mask=(row_R < num_rows)[:, None] & (output_O < num_outputs)[None, :],
    )
