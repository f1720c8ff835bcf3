"""Paged attention in Triton: FlashAttention-2 (Dao 2023) over a block table, for decode and chunked prefill alike.

A program takes a tile of one run's tokens and all query heads that read one key/value head, so that every cached key is
loaded once for all of them (Ainslie et al. 2023). In decode, where a run has one token, programs also share its context:
each takes a part, and `combine_kernel` puts the parts together (Flash-Decoding, Dao et al. 2023).

Shape suffixes: N rows of a tile, each a token with a query head · L cached positions of a tile · D head dim, padded to a power
of two · P parts of a context
"""

import triton
import triton.language as tl


@triton.jit
def paged_attention_kernel(
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
    IS_DECODE: tl.constexpr,
    NUM_TOKENS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
):
    """Program (i, k, s) takes run s and key/value head k: tile i of its tokens, or part i of the context in decode.

    q, out: [T, H, D]; keys, values: [blocks, K, BLOCK_SIZE, D]; runs, blocks: as in AttentionPlan; queries_of_kv: [K,
    GROUP_SIZE]. NUM_TOKENS are a tile's, NUM_ROWS its rows: tokens × GROUP_SIZE, and more where tl.dot wants more. Runs
    of one token are for IS_DECODE, all others for programs without it; runs of none are padding.
    """
    kv_head = tl.program_id(1)
    run = tl.program_id(2).to(tl.int64)
    first_row = tl.load(runs + run * 4)
    num_tokens = tl.load(runs + run * 4 + 1)
    start = tl.load(runs + run * 4 + 2)
    table = blocks + tl.load(runs + run * 4 + 3)
    if IS_DECODE:
        first_token = 0
        part = tl.program_id(0)
        is_mine = num_tokens == 1
    else:
        first_token = tl.program_id(0) * NUM_TOKENS
        part = 0
        is_mine = (num_tokens > 1) & (first_token < num_tokens)
    if not is_mine:
        return

    row_N = tl.arange(0, NUM_ROWS)
    token_N = first_token + row_N // GROUP_SIZE
    in_tile_N = (row_N < NUM_TOKENS * GROUP_SIZE) & (token_N < num_tokens)
    query_head_N = tl.load(queries_of_kv + kv_head * GROUP_SIZE + row_N % GROUP_SIZE, mask=in_tile_N, other=-1)
    column_D = tl.arange(0, HEAD_DIM_PADDED)
    q_place_ND = ((first_row + token_N) * num_query_heads + query_head_N)[:, None] * HEAD_DIM + column_D[None, :]
    wanted_ND = (in_tile_N & (query_head_N >= 0))[:, None] & (column_D < HEAD_DIM)[None, :]
    q_ND = tl.load(q + q_place_ND, mask=wanted_ND, other=0.0)

    # The last token of the tile sees the most; parts are whole tiles of keys, the last ones may be empty.
    context_len = start + tl.minimum(first_token + NUM_TOKENS, num_tokens)
    part_len = tl.cdiv(tl.cdiv(context_len, NUM_KEYS), NUM_PARTS) * NUM_KEYS
    part_end = tl.minimum(context_len, (part + 1) * part_len)
    maximum_N = tl.full([NUM_ROWS], float("-inf"), tl.float32)
    sum_N = tl.zeros([NUM_ROWS], tl.float32)
    out_ND = tl.zeros([NUM_ROWS, HEAD_DIM_PADDED], tl.float32)
    for first_key in range(part * part_len, part_end, NUM_KEYS):
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
        seen_NL = held_L[None, :] & (key_L[None, :] <= (start + token_N)[:, None])
        score_NL = tl.where(seen_NL, score_NL, float("-inf"))
        new_maximum_N = tl.maximum(maximum_N, tl.max(score_NL, 1))
        shrink_N = tl.exp2(maximum_N - new_maximum_N)
        weight_NL = tl.exp2(score_NL - new_maximum_N[:, None])
        sum_N = sum_N * shrink_N + tl.sum(weight_NL, 1)
        out_ND = out_ND * shrink_N[:, None]
        out_ND = tl.dot(weight_NL.to(v_LD.dtype), v_LD, out_ND, input_precision="ieee")
        maximum_N = new_maximum_N

    if NUM_PARTS == 1:
        tl.store(out + q_place_ND, (out_ND / sum_N[:, None]).to(out.dtype.element_ty), mask=wanted_ND)
    else:
        part_place_N = (run * num_query_heads + query_head_N) * NUM_PARTS + part
        wanted_N = in_tile_N & (query_head_N >= 0)
        tl.store(part_maxima + part_place_N, maximum_N, mask=wanted_N)
        tl.store(part_sums + part_place_N, sum_N, mask=wanted_N)
        tl.store(part_outs + part_place_N[:, None] * HEAD_DIM + column_D[None, :], out_ND, mask=wanted_ND)


@triton.jit
def combine_kernel(
    part_outs,
    part_maxima,
    part_sums,
    out,
    runs,
    num_query_heads,
    NUM_PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
):
    """Program (h, s) puts together what the parts of run s found for query head h."""
    query_head = tl.program_id(0)
    run = tl.program_id(1).to(tl.int64)
    if tl.load(runs + run * 4 + 1) != 1:
        return
    part_place_P = (run * num_query_heads + query_head) * NUM_PARTS + tl.arange(0, NUM_PARTS)
    column_D = tl.arange(0, HEAD_DIM_PADDED)
    maximum_P = tl.load(part_maxima + part_place_P)
    shrink_P = tl.exp2(maximum_P - tl.max(maximum_P, 0))
    total = tl.sum(shrink_P * tl.load(part_sums + part_place_P), 0)
    part_out_PD = tl.load(
        part_outs + part_place_P[:, None] * HEAD_DIM + column_D[None, :],
        mask=(column_D < HEAD_DIM)[None, :],
        other=0.0,
    )
    out_D = tl.sum(shrink_P[:, None] * part_out_PD, 0) / total
    row = tl.load(runs + run * 4)
    out_place_D = (row * num_query_heads + query_head) * HEAD_DIM + column_D
    tl.store(out + out_place_D, out_D.to(out.dtype.element_ty), mask=column_D < HEAD_DIM)
