"""Triton kernels of rows: norms, SwiGLU, the rotation that fills the cache, and what a softmax needs.

Arithmetic is float32, whatever is stored, except in softmax_parts_kernel, where it is that of the values.

Shape suffixes: A heads of a program · C half a head's features · E a row's features, padded to a power of two, or a part of them
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    x, residual, weight, out, num_columns, eps, NUM_COLUMNS_PADDED: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):
    """A row a program. With a residual, the norm of their sum, which takes the residual's place."""
    column_E = tl.arange(0, NUM_COLUMNS_PADDED)
    inside_E = column_E < num_columns
    place_E = tl.program_id(0).to(tl.int64) * num_columns + column_E
    x_E = tl.load(x + place_E, mask=inside_E, other=0.0)
    if HAS_RESIDUAL:
        x_E += tl.load(residual + place_E, mask=inside_E, other=0.0)
        tl.store(residual + place_E, x_E, mask=inside_E)
    scale = tl.rsqrt(tl.sum(x_E * x_E) / num_columns + eps)
    weight_E = tl.load(weight + column_E, mask=inside_E, other=0.0).to(tl.float32)
    tl.store(out + place_E, (x_E * scale * weight_E).to(out.dtype.element_ty), mask=inside_E)


@triton.jit
def swiglu_kernel(gate_up, out, num_columns, NUM_COLUMNS_A_PROGRAM: tl.constexpr):
    """out = silu(gate) · up, where a row of gate_up holds `num_columns` of one and then of the other."""
    row = tl.program_id(0).to(tl.int64)
    column_E = tl.program_id(1) * NUM_COLUMNS_A_PROGRAM + tl.arange(0, NUM_COLUMNS_A_PROGRAM)
    inside_E = column_E < num_columns
    gate_place_E = row * 2 * num_columns + column_E
    gate_E = tl.load(gate_up + gate_place_E, mask=inside_E, other=0.0).to(tl.float32)
    up_E = tl.load(gate_up + gate_place_E + num_columns, mask=inside_E, other=0.0).to(tl.float32)
    product_E = gate_E * tl.sigmoid(gate_E) * up_E
    tl.store(out + row * num_columns + column_E, product_E.to(out.dtype.element_ty), mask=inside_E)


@triton.jit
def rotate_and_store_kernel(
    qkv,
    q_out,
    keys,
    values,
    slots,
    cos,
    sin,
    num_query_heads,
    num_kv_heads,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    NUM_HEADS_A_PROGRAM: tl.constexpr,
):
    """Queries, rotated, to q_out [T, H, D]; keys, rotated, and values to their slots of the cache [blocks, K, P, D], which may be
    in e4m3.

    A program takes one token and some of its query, key and value heads.
    """
    token = tl.program_id(0).to(tl.int64)
    head_A1 = tl.program_id(1) * NUM_HEADS_A_PROGRAM + tl.arange(0, NUM_HEADS_A_PROGRAM)[:, None]
    column_C = tl.arange(0, HALF_PADDED)
    half: tl.constexpr = HEAD_DIM // 2
    num_heads = num_query_heads + 2 * num_kv_heads
    inside_AC = (head_A1 < num_heads) & (column_C < half)

    place_AC = (token * num_heads + head_A1) * HEAD_DIM + column_C
    first_AC = tl.load(qkv + place_AC, mask=inside_AC, other=0.0).to(tl.float32)
    second_AC = tl.load(qkv + place_AC + half, mask=inside_AC, other=0.0).to(tl.float32)
    cos_C = tl.load(cos + token * HEAD_DIM + column_C, mask=column_C < half, other=0.0)
    sin_C = tl.load(sin + token * HEAD_DIM + column_C, mask=column_C < half, other=0.0)
    is_query_A1 = head_A1 < num_query_heads
    is_value_A1 = head_A1 >= num_query_heads + num_kv_heads
    is_key_A1 = (head_A1 >= num_query_heads) & (head_A1 < num_query_heads + num_kv_heads)
    turned_first_AC = first_AC * cos_C - second_AC * sin_C
    turned_second_AC = second_AC * cos_C + first_AC * sin_C
    first_AC = tl.where(is_value_A1, first_AC, turned_first_AC).to(qkv.dtype.element_ty)
    second_AC = tl.where(is_value_A1, second_AC, turned_second_AC).to(qkv.dtype.element_ty)

    q_place_AC = (token * num_query_heads + head_A1) * HEAD_DIM + column_C
    tl.store(q_out + q_place_AC, first_AC, mask=inside_AC & is_query_A1)
    tl.store(q_out + q_place_AC + half, second_AC, mask=inside_AC & is_query_A1)
    slot = tl.load(slots + token)
    kv_head_A1 = head_A1 - num_query_heads - tl.where(is_value_A1, num_kv_heads, 0)
    kv_row_A1 = (slot // BLOCK_SIZE * num_kv_heads + kv_head_A1) * BLOCK_SIZE + slot % BLOCK_SIZE
    kv_place_AC = kv_row_A1 * HEAD_DIM + column_C
    tl.store(keys + kv_place_AC, first_AC.to(keys.dtype.element_ty), mask=inside_AC & is_key_A1)
    tl.store(keys + kv_place_AC + half, second_AC.to(keys.dtype.element_ty), mask=inside_AC & is_key_A1)
    tl.store(values + kv_place_AC, first_AC.to(values.dtype.element_ty), mask=inside_AC & is_value_A1)
    tl.store(values + kv_place_AC + half, second_AC.to(values.dtype.element_ty), mask=inside_AC & is_value_A1)


@triton.jit
def softmax_parts_kernel(values, out, num_columns, NUM_COLUMNS_A_PASS: tl.constexpr):
    """out, float64 [rows, 3]: the maximum of a row, the sum of exp(value − maximum), the first index of the maximum.

    A program takes a row, and reads it from its beginning on, some columns at a time. Of a row of −∞ alone the sum is 0.
    """
    row = tl.program_id(0).to(tl.int64)
    maximum = tl.full([], float("-inf"), values.dtype.element_ty)
    index = tl.full([], 0, tl.int32)
    for first_column in range(0, num_columns, NUM_COLUMNS_A_PASS):
        column_E = first_column + tl.arange(0, NUM_COLUMNS_A_PASS)
        value_E = tl.load(values + row * num_columns + column_E, mask=column_E < num_columns, other=float("-inf"))
        here, place = tl.max(value_E, 0, return_indices=True, return_indices_tie_break_left=True)
        index = tl.where(here > maximum, first_column + place, index)
        maximum = tl.maximum(maximum, here)
    base = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.full([], 0.0, values.dtype.element_ty)
    for first_column in range(0, num_columns, NUM_COLUMNS_A_PASS):
        column_E = first_column + tl.arange(0, NUM_COLUMNS_A_PASS)
        value_E = tl.load(values + row * num_columns + column_E, mask=column_E < num_columns, other=float("-inf"))
        total += tl.sum(tl.exp(value_E - base), 0)
    tl.store(out + row * 3, maximum.to(tl.float64))
    tl.store(out + row * 3 + 1, total.to(tl.float64))
    tl.store(out + row * 3 + 2, index.to(tl.float64))
