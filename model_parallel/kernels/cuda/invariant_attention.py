"""Paged attention in Triton in which a token's bits depend on its own sequence alone: not on what else is in the step, nor on
whether it comes by itself, in decode, or with others, in a prompt.

A context is cut into parts of PART_LEN positions, always from its beginning on. Within a part it is FlashAttention-2 (Dao 2023)
with tiles of one size, and the parts are joined one after another. In decode programs share the parts of a context
(Flash-Decoding, Dao et al. 2023) and `join_parts_kernel` joins them; in prefill one program does both. The tiles are alike in
both, since a GPU has other instructions for other sizes. What a tile computes beyond a token's own positions is an exact zero.
Launch with enable_fp_fusion=False: which multiplications and additions a compiler fuses is its own choice in each kernel.

Shape suffixes: N rows of a tile, each a token with a query head · L cached positions of a tile · D head dim, padded to a power
of two
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_parts"])
def invariant_attention_kernel(
    q,
    keys,
    values,
    out,
    part_outs,
    part_maxima,
    part_sums,
    runs,
    blocks,
    queries_of_kv,
    scale_log2,
    num_query_heads,
    num_kv_heads,
    num_parts,
    IS_DECODE: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    PART_LEN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
):
    """Program (i, k, s) takes run s and key/value head k: tile i of its tokens, or in decode every part of the context whose
    number is i and a multiple of the number of such programs.

    q, out: [T, H, D]; keys, values: [blocks, K, BLOCK_SIZE, D]; part_outs [S, H, num_parts, D], part_maxima and part_sums
    without D; runs, blocks: as in AttentionPlan; queries_of_kv: [K, GROUP_SIZE]. Runs of one token are for IS_DECODE, all
    others for programs without it; runs of none are padding.
    """
    kv_head = tl.program_id(1)
    run = tl.program_id(2).to(tl.int64)
    first_row = tl.load(runs + run * 4)
    num_tokens = tl.load(runs + run * 4 + 1)
    start = tl.load(runs + run * 4 + 2)
    table = blocks + tl.load(runs + run * 4 + 3)
    if IS_DECODE:
        first_token = 0
        first_part, parts_a_step = tl.program_id(0), tl.num_programs(0)
        is_mine = num_tokens == 1
    else:
        first_token = tl.program_id(0) * NUM_TOKENS
        first_part, parts_a_step = 0, 1
        is_mine = (num_tokens > 1) & (first_token < num_tokens)
    if not is_mine:
        return

    row_N = tl.arange(0, NUM_ROWS)
    token_N = first_token + row_N // GROUP_SIZE
    in_tile_N = (row_N < NUM_TOKENS * GROUP_SIZE) & (token_N < num_tokens)
    query_head_N = tl.load(queries_of_kv + kv_head * GROUP_SIZE + row_N % GROUP_SIZE, mask=in_tile_N, other=-1)
    column_D = tl.arange(0, HEAD_DIM_PADDED)
    q_place_ND = ((first_row + token_N) * num_query_heads + query_head_N)[:, None] * HEAD_DIM + column_D[None, :]
    wanted_N = in_tile_N & (query_head_N >= 0)
    wanted_ND = wanted_N[:, None] & (column_D < HEAD_DIM)[None, :]
    q_ND = tl.load(q + q_place_ND, mask=wanted_ND, other=0.0)
    position_N = start + token_N
    context_len = start + tl.minimum(first_token + NUM_TOKENS, num_tokens)

    # Of the parts that are joined already; in decode join_parts_kernel joins them.
    all_maximum_N = tl.full([NUM_ROWS], float("-inf"), tl.float32)
    all_sum_N = tl.zeros([NUM_ROWS], tl.float32)
    all_out_ND = tl.zeros([NUM_ROWS, HEAD_DIM_PADDED], tl.float32)
    for part in range(first_part, tl.cdiv(context_len, PART_LEN), parts_a_step):
        part_end = tl.minimum((part + 1) * PART_LEN, context_len)
        maximum_N = tl.full([NUM_ROWS], float("-inf"), tl.float32)
        sum_N = tl.zeros([NUM_ROWS], tl.float32)
        out_ND = tl.zeros([NUM_ROWS, HEAD_DIM_PADDED], tl.float32)
        for first_key in range(part * PART_LEN, part_end, NUM_KEYS):
            key_L = first_key + tl.arange(0, NUM_KEYS)
            held_L = key_L < part_end
            block_L = tl.load(table + key_L // BLOCK_SIZE, mask=held_L, other=0)
            kv_place_L = ((block_L * num_kv_heads + kv_head) * BLOCK_SIZE + key_L % BLOCK_SIZE) * HEAD_DIM
            # What lies past the end are other requests' leftovers; a NaN among them would reach the sum through 0 · NaN.
            kv_place_LD = kv_place_L[:, None] + column_D[None, :]
            held_LD = held_L[:, None] & (column_D < HEAD_DIM)[None, :]
            k_LD = tl.load(keys + kv_place_LD, mask=held_LD, other=0.0).to(q_ND.dtype)
            v_LD = tl.load(values + kv_place_LD, mask=held_LD, other=0.0).to(q_ND.dtype)

            score_NL = tl.dot(q_ND, tl.trans(k_LD), input_precision="ieee") * scale_log2
            seen_NL = held_L[None, :] & (key_L[None, :] <= position_N[:, None])
            score_NL = tl.where(seen_NL, score_NL, float("-inf"))
            new_maximum_N = tl.maximum(maximum_N, tl.max(score_NL, 1))
            base_N = tl.where(new_maximum_N == float("-inf"), 0.0, new_maximum_N)  # of rows that see nothing here
            shrink_N = tl.exp2(maximum_N - base_N)
            weight_NL = tl.exp2(score_NL - base_N[:, None])
            sum_N = sum_N * shrink_N + tl.sum(weight_NL, 1)
            out_ND = out_ND * shrink_N[:, None]
            out_ND = tl.dot(weight_NL.to(v_LD.dtype), v_LD, out_ND, input_precision="ieee")
            maximum_N = new_maximum_N

        if IS_DECODE:
            part_place_N = (run * num_query_heads + query_head_N) * num_parts + part
            tl.store(part_maxima + part_place_N, maximum_N, mask=wanted_N)
            tl.store(part_sums + part_place_N, sum_N, mask=wanted_N)
            tl.store(part_outs + part_place_N[:, None] * HEAD_DIM + column_D[None, :], out_ND, mask=wanted_ND)
        else:
            sees_N = part * PART_LEN <= position_N  # a token that sees nothing of the part keeps what it has
            new_maximum_N = tl.maximum(all_maximum_N, maximum_N)
            shrink_N, part_shrink_N = tl.exp2(all_maximum_N - new_maximum_N), tl.exp2(maximum_N - new_maximum_N)
            joined_N = all_sum_N * shrink_N + sum_N * part_shrink_N
            joined_ND = all_out_ND * shrink_N[:, None] + out_ND * part_shrink_N[:, None]
            all_maximum_N = tl.where(sees_N, new_maximum_N, all_maximum_N)
            all_sum_N = tl.where(sees_N, joined_N, all_sum_N)
            all_out_ND = tl.where(sees_N[:, None], joined_ND, all_out_ND)
    if not IS_DECODE:
        tl.store(out + q_place_ND, (all_out_ND / all_sum_N[:, None]).to(out.dtype.element_ty), mask=wanted_ND)


@triton.jit(do_not_specialize=["num_parts"])
def join_parts_kernel(
    part_outs,
    part_maxima,
    part_sums,
    out,
    runs,
    num_query_heads,
    num_parts,
    PART_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
):
    """Program (h, s) joins what the parts of run s, of one token, found for query head h."""
    query_head = tl.program_id(0)
    run = tl.program_id(1).to(tl.int64)
    if tl.load(runs + run * 4 + 1) != 1:
        return
    first_place = (run * num_query_heads + query_head) * num_parts
    column_D = tl.arange(0, HEAD_DIM_PADDED)
    maximum = float("-inf")
    total = 0.0
    out_D = tl.zeros([HEAD_DIM_PADDED], tl.float32)
    for part in range(tl.load(runs + run * 4 + 2) // PART_LEN + 1):
        place = first_place + part
        part_maximum = tl.load(part_maxima + place)
        part_out_D = tl.load(part_outs + place * HEAD_DIM + column_D, mask=column_D < HEAD_DIM, other=0.0)
        new_maximum = tl.maximum(maximum, part_maximum)
        shrink, part_shrink = tl.exp2(maximum - new_maximum), tl.exp2(part_maximum - new_maximum)
        total = total * shrink + tl.load(part_sums + place) * part_shrink
        out_D = out_D * shrink + part_out_D * part_shrink
        maximum = new_maximum
    row = tl.load(runs + run * 4)
    place_D = (row * num_query_heads + query_head) * HEAD_DIM + column_D
    tl.store(out + place_D, (out_D / total).to(out.dtype.element_ty), mask=column_D < HEAD_DIM)
