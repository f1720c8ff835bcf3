"""Around products of e4m3 numbers in Triton: rows of activations in e4m3, and sums times their scales.

Arithmetic is float32. e4m3 needs compute capability 8.9. Shape suffixes: E a row's features, padded to a power of two
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def quantize_rows_kernel(
    x,
    values,
    scales,
    num_rows,
    num_columns,
    num_stored,
    LARGEST_VALUE: tl.constexpr,
    SMALLEST_LARGEST: tl.constexpr,
    NUM_COLUMNS_PADDED: tl.constexpr,
):
    """A row a program: values [rows, num_stored] in e4m3 and the row's scale, as kernels/fp8.py; zeros past x's rows and columns.

    x is read once.
    """
    row = tl.program_id(0).to(tl.int64)
    column_E = tl.arange(0, NUM_COLUMNS_PADDED)
    inside_E = (column_E < num_columns) & (row < num_rows)
    x_E = tl.load(x + row * num_columns + column_E, mask=inside_E, other=0.0).to(tl.float32)
    # tl.max passes NaN over; it reaches the values.
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x_E), 0), SMALLEST_LARGEST), LARGEST_VALUE)
    value_E = tl.div_rn(x_E, tl.broadcast_to(scale, [NUM_COLUMNS_PADDED])).to(values.dtype.element_ty)
    tl.store(values + row * num_stored + column_E, value_E, mask=column_E < num_stored)
    tl.store(scales + row, scale)


@triton.jit
def scale_kernel(product, row_scales, column_scales, out, num_columns, num_stored, NUM_COLUMNS_A_PROGRAM: tl.constexpr):
    """out [T, num_columns] = product · scale of its row · scale of its column; product has `num_stored` columns."""
    row = tl.program_id(0).to(tl.int64)
    column_E = tl.program_id(1) * NUM_COLUMNS_A_PROGRAM + tl.arange(0, NUM_COLUMNS_A_PROGRAM)
    inside_E = column_E < num_columns
    row_scale = tl.load(row_scales + row)
    column_scale_E = tl.load(column_scales + column_E, mask=inside_E, other=0.0)
    product_E = tl.load(product + row * num_stored + column_E, mask=inside_E, other=0.0)
    scaled_E = product_E * row_scale * column_scale_E
    tl.store(out + row * num_columns + column_E, scaled_E.to(out.dtype.element_ty), mask=inside_E)


@triton.jit
def scaled_swiglu_kernel(
    gate_up, row_scales, column_scales, out, num_columns, num_stored, NUM_COLUMNS_A_PROGRAM: tl.constexpr
):
    """elementwise.swiglu_kernel of products that are still to be scaled, in rows of `num_stored`."""
    row = tl.program_id(0).to(tl.int64)
    column_E = tl.program_id(1) * NUM_COLUMNS_A_PROGRAM + tl.arange(0, NUM_COLUMNS_A_PROGRAM)
    inside_E = column_E < num_columns
    row_scale = tl.load(row_scales + row)
    gate_scale_E = tl.load(column_scales + column_E, mask=inside_E, other=0.0)
    up_scale_E = tl.load(column_scales + num_columns + column_E, mask=inside_E, other=0.0)
    place_E = row * num_stored + column_E
    gate_E = tl.load(gate_up + place_E, mask=inside_E, other=0.0) * row_scale * gate_scale_E
    up_E = tl.load(gate_up + place_E + num_columns, mask=inside_E, other=0.0) * row_scale * up_scale_E
    product_E = gate_E * tl.sigmoid(gate_E) * up_E
    tl.store(out + row * num_columns + column_E, product_E.to(out.dtype.element_ty), mask=inside_E)
