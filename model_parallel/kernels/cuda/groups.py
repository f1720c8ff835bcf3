"""Products with weights in groups (weight_format.GroupFormat) in Triton, for few rows; and dequantising them, for many.

Numbers q are multiplied with x in x's dtype, which holds them exactly, and summed in float32; a group's scale and minimum are
applied to its sums.

Shape suffixes: R rows · O features out · I features in, all of one tile
"""

import triton
import triton.language as tl


@triton.jit
def _scale_and_minimum(
    scales,
    minimums,
    codes,
    minimum_codes,
    group,
    output_O,
    is_there_O,
    num_outputs,
    GROUP_KIND: tl.constexpr,
    FIXED_ZERO: tl.constexpr,
    GROUPS_PER_SPAN: tl.constexpr,
):
    """Of one group, float32. GROUP_KIND: see GroupFormat.kind. `minimums` of the kind "zeros" are whole numbers."""
    at_span = group // GROUPS_PER_SPAN * num_outputs + output_O
    at_group = group * num_outputs + output_O
    scale_O = tl.load(scales + at_span, mask=is_there_O, other=0.0).to(tl.float32)
    if GROUP_KIND == "scale_codes" or GROUP_KIND == "minimum_codes":
        scale_O = scale_O * tl.load(codes + at_group, mask=is_there_O, other=0).to(tl.float32)
    if GROUP_KIND == "minimums" or GROUP_KIND == "minimum_codes":
        minimum_O = tl.load(minimums + at_span, mask=is_there_O, other=0.0).to(tl.float32)
        if GROUP_KIND == "minimum_codes":
            minimum_O = minimum_O * tl.load(minimum_codes + at_group, mask=is_there_O, other=0).to(tl.float32)
    else:
        minimum_O = scale_O * FIXED_ZERO
        if GROUP_KIND == "zeros":
            zero_O = tl.load(minimums + at_span, mask=is_there_O, other=0).to(tl.float32)
            minimum_O = scale_O * (zero_O + FIXED_ZERO)
    return scale_O, minimum_O


@triton.jit
def _places(order, input_I, num_before, HAS_ORDER: tl.constexpr):
    """Where in x the groups' inputs are; outside of x: nowhere."""
    if HAS_ORDER:  # noqa: SIM108  # Triton compiles only the branch that is meant
        place_I = tl.load(order + input_I)
    else:
        place_I = input_I - num_before
    return place_I


@triton.jit
def _load_x(x, row_R, place_I, num_rows, num_inputs):
    is_there_RI = (row_R < num_rows)[:, None] & ((place_I >= 0) & (place_I < num_inputs))[None, :]
    return tl.load(x + row_R[:, None] * num_inputs + place_I[None, :], mask=is_there_RI, other=0.0)


@triton.jit(do_not_specialize=["num_rows"])
def group_product_kernel(
    x,
    values,
    scales,
    minimums,
    codes,
    minimum_codes,
    order,
    out,
    num_rows,
    num_outputs,
    num_inputs,
    num_before,
    num_groups,
    groups_per_part,
    NUM_BITS: tl.constexpr,
    GROUP_KIND: tl.constexpr,
    FIXED_ZERO: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS_PER_SPAN: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr,
):
    """out [parts, rows, outputs], float32: x · weightᵀ over the groups of each part.

    A program takes NUM_ROWS × NUM_OUTPUTS of one part.
    """
    output_O = tl.program_id(0).to(tl.int64) * NUM_OUTPUTS + tl.arange(0, NUM_OUTPUTS)
    part = tl.program_id(1).to(tl.int64)
    row_R = tl.program_id(2).to(tl.int64) * NUM_ROWS + tl.arange(0, NUM_ROWS)
    is_there_O = output_O < num_outputs
    sum_RO = tl.zeros([NUM_ROWS, NUM_OUTPUTS], tl.float32)
    for group in range(part * groups_per_part, tl.minimum((part + 1) * groups_per_part, num_groups)):
        scale_O, minimum_O = _scale_and_minimum(
            scales,
            minimums,
            codes,
            minimum_codes,
            group,
            output_O,
            is_there_O,
            num_outputs,
            GROUP_KIND,
            FIXED_ZERO,
            GROUPS_PER_SPAN,
        )
        matrix = values + (group * num_outputs + output_O)[None, :] * (GROUP_SIZE * NUM_BITS // 8)
        if NUM_BITS == 4:
            byte_I = tl.arange(0, GROUP_SIZE // 2)
            even_I = group * GROUP_SIZE + 2 * byte_I
            even_RI = _load_x(x, row_R, _places(order, even_I, num_before, HAS_ORDER), num_rows, num_inputs)
            odd_RI = _load_x(x, row_R, _places(order, even_I + 1, num_before, HAS_ORDER), num_rows, num_inputs)
            byte_IO = tl.load(matrix + byte_I[:, None], mask=is_there_O[None, :], other=0)
            lower_IO = (byte_IO & 15).to(tl.int8).to(even_RI.dtype)
            upper_IO = (byte_IO >> 4).to(tl.int8).to(even_RI.dtype)
            product_RO = tl.dot(even_RI, lower_IO, input_precision="ieee")
            product_RO = tl.dot(odd_RI, upper_IO, product_RO, input_precision="ieee")
            x_sum_R = tl.sum(even_RI.to(tl.float32), 1) + tl.sum(odd_RI.to(tl.float32), 1)
        else:
            input_I = tl.arange(0, GROUP_SIZE)
            place_I = _places(order, group * GROUP_SIZE + input_I, num_before, HAS_ORDER)
            x_RI = _load_x(x, row_R, place_I, num_rows, num_inputs)
            value_IO = tl.load(matrix + input_I[:, None], mask=is_there_O[None, :], other=0)
            product_RO = tl.dot(x_RI, value_IO.to(x_RI.dtype), input_precision="ieee")
            x_sum_R = tl.sum(x_RI.to(tl.float32), 1)
        sum_RO += product_RO * scale_O[None, :] - x_sum_R[:, None] * minimum_O[None, :]
    tl.store(
        out + (part * num_rows + row_R)[:, None] * num_outputs + output_O[None, :],
        sum_RO,
        mask=(row_R < num_rows)[:, None] & is_there_O[None, :],
    )


@triton.jit(do_not_specialize=["num_rows", "first_row"])
def dequantize_rows_kernel(
    rows,
    values,
    scales,
    minimums,
    codes,
    minimum_codes,
    order,
    out,
    first_row,
    num_rows,
    num_outputs,
    num_inputs,
    num_before,
    NUM_BITS: tl.constexpr,
    GROUP_KIND: tl.constexpr,
    FIXED_ZERO: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS_PER_SPAN: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    NUM_ROWS: tl.constexpr,
):
    """out [rows, inputs] = the weights of outputs rows[r] − first_row; zero for those that the matrix does not have.

    A program takes NUM_ROWS of one group.
    """
    group = tl.program_id(0).to(tl.int64)
    row_R = tl.program_id(1).to(tl.int64) * NUM_ROWS + tl.arange(0, NUM_ROWS)
    output_R = tl.load(rows + row_R, mask=row_R < num_rows, other=-1) - first_row
    is_there_R = (output_R >= 0) & (output_R < num_outputs)
    scale_R, minimum_R = _scale_and_minimum(
        scales,
        minimums,
        codes,
        minimum_codes,
        group,
        output_R,
        is_there_R,
        num_outputs,
        GROUP_KIND,
        FIXED_ZERO,
        GROUPS_PER_SPAN,
    )
    byte_B = tl.arange(0, GROUP_SIZE * NUM_BITS // 8)
    matrix = values + (group * num_outputs + output_R)[:, None] * (GROUP_SIZE * NUM_BITS // 8)
    byte_RB = tl.load(matrix + byte_B[None, :], mask=is_there_R[:, None], other=0)
    for half in tl.static_range(8 // NUM_BITS):
        value_RB = byte_RB
        if NUM_BITS == 4:
            value_RB = ((byte_RB >> 4 * half) & 15).to(tl.int8)
        weight_RB = value_RB.to(tl.float32) * scale_R[:, None] - minimum_R[:, None]
        input_B = group * GROUP_SIZE + byte_B * (8 // NUM_BITS) + half
        place_B = _places(order, input_B, num_before, HAS_ORDER)
        is_kept = (row_R < num_rows)[:, None] & ((place_B >= 0) & (place_B < num_inputs))[None, :]
        tl.store(out + row_R[:, None] * num_inputs + place_B[None, :], weight_RB, mask=is_kept)
