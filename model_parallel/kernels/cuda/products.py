"""Products with dense or int8 weights in Triton, a tile of outputs a program.

Every output is one chain of multiply-adds over the inputs in their order.

Shape suffixes: R rows · O features out · I features in, all of one tile
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def product_kernel(
    x,
    weight,
    scales,
    out,
    num_rows,
    num_outputs,
    num_inputs,
    NUM_ROWS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
    NUM_INPUTS: tl.constexpr,
):
    """out = x · weightᵀ, in float32 and then of out's dtype; a program takes NUM_ROWS × NUM_OUTPUTS of it.

    weight: of x's dtype, or int8, which x's dtype holds exactly. scales: None, or what each output is multiplied with. Programs
    for the same outputs are neighbours, so that they find the weights in the cache.
    """
    row_R = tl.program_id(0).to(tl.int64) * NUM_ROWS + tl.arange(0, NUM_ROWS)
    output_O = tl.program_id(1).to(tl.int64) * NUM_OUTPUTS + tl.arange(0, NUM_OUTPUTS)
    sum_RO = tl.zeros([NUM_ROWS, NUM_OUTPUTS], tl.float32)
    for first_input in range(0, num_inputs, NUM_INPUTS):
        input_I = first_input + tl.arange(0, NUM_INPUTS)
        x_RI = tl.load(
            x + row_R[:, None] * num_inputs + input_I[None, :],
            mask=(row_R < num_rows)[:, None] & (input_I < num_inputs)[None, :],
            other=0.0,
        )
        weight_OI = tl.load(
            weight + output_O[:, None] * num_inputs + input_I[None, :],
            mask=(output_O < num_outputs)[:, None] & (input_I < num_inputs)[None, :],
            other=0,
        )
        sum_RO = tl.dot(x_RI, tl.trans(weight_OI.to(x_RI.dtype)), sum_RO, input_precision="ieee")
    if scales is not None:
        sum_RO = sum_RO * tl.load(scales + output_O, mask=output_O < num_outputs, other=0.0)[None, :]
    tl.store(
        out + row_R[:, None] * num_outputs + output_O[None, :],
        sum_RO.to(out.dtype.element_ty),
        mask=(row_R < num_rows)[:, None] & (output_O < num_outputs)[None, :],
    )
