"""The Triton kernels of the paged attention: one that writes keys and values, two that attend (flash-decoding).

Owns: the arithmetic on the device. Must not know: launch parameters, steps, models.

A tile is up to TILE_ROWS consecutive rows of one sequence. One program takes a tile, some query heads that share a key
head, and one split of the keys: rows and heads make the M lines of its products, so that keys and values are read once
for all of them, straight from their blocks. Softmax is online in float32 (Milakov and Gimelshein 2018; Dao 2023,
FlashAttention-2, section 3.1); splits are joined by `join_kernel` (Dao et al. 2023, flash-decoding).

    keys of a tile    begin ... | split 0 | split 1 | ... | split n )  end = position of the tile's last row + 1

Every split but the used ones is empty: its weight is -inf and its values are neither written nor read.

Index tensors are views whose alignment changes with the step: kernels are not compiled anew for it.
Operands are converted to DOT before a product: on a device that is their own type; Triton's interpreter, which
multiplies bfloat16 as integers, needs float32.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def write_kernel(
    keys,  # (blocks * block size, heads, key dim)
    values,  # (blocks * block size, heads, value dim)
    slots,  # (tokens,)
    new_keys,  # (tokens, heads, key dim), any strides but 1 in the last dimension
    new_values,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    NUM_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    """One program a token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    head = tl.arange(0, HEADS_PAD)[:, None]

    dim = tl.arange(0, KEY_PAD)[None, :]
    real = (head < NUM_HEADS) & (dim < KEY_DIM)
    key = tl.load(new_keys + token * key_token_stride + head * key_head_stride + dim, mask=real)
    tl.store(keys + slot * (NUM_HEADS * KEY_DIM) + head * KEY_DIM + dim, key, mask=real)

    dim = tl.arange(0, VALUE_PAD)[None, :]
    real = (head < NUM_HEADS) & (dim < VALUE_DIM)
    value = tl.load(new_values + token * value_token_stride + head * value_head_stride + dim, mask=real)
    tl.store(values + slot * (NUM_HEADS * VALUE_DIM) + head * VALUE_DIM + dim, value, mask=real)


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["tiles", "tables"])
def attend_kernel(
    query,  # (tokens, heads, key dim), any strides but 1 in the last dimension
    keys,  # (blocks * block size, kv heads, key dim)
    values,  # (blocks * block size, kv heads, value dim)
    tiles,  # (tiles, 4): start in `tables`, first row among the tokens, number of rows, position of the first
    tables,  # block ids of all sequences, end to end
    output,  # (tokens, heads, value dim)
    partials,  # float32 (tokens, heads, splits, value dim); not touched where SPLIT is false
    weights,  # float32 (tokens, heads, splits): log2 of each split's sum of exponentials; likewise
    scale,
    softcap,
    query_token_stride,
    query_head_stride,
    num_splits,
    NUM_KV_HEADS: tl.constexpr,
    FOLD: tl.constexpr,  # query heads that share a key head
    FOLD_TILE: tl.constexpr,  # of these, how many a program takes
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    MIN_SPLIT_LEN: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    HAS_SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid: tiles, kv heads times pieces of FOLD, splits."""
    tile = tiles + tl.program_id(0) * 4
    num_rows = tl.load(tile + 2).to(tl.int32)
    if num_rows == 0:
        return
    table = tables + tl.load(tile)
    first_row = tl.load(tile + 1)
    first_position = tl.load(tile + 3).to(tl.int32)

    num_pieces: tl.constexpr = (FOLD + FOLD_TILE - 1) // FOLD_TILE
    kv_head = tl.program_id(1) // num_pieces
    line = tl.arange(0, M)
    row = line // FOLD_TILE
    fold = (tl.program_id(1) % num_pieces) * FOLD_TILE + line % FOLD_TILE
    real = (row < num_rows) & (fold < FOLD)
    position = first_position + row
    head = kv_head * FOLD + fold
    key_dim = tl.arange(0, KEY_PAD)
    value_dim = tl.arange(0, VALUE_PAD)

    at = (first_row + row) * query_token_stride + head * query_head_stride
    q = tl.load(query + at[:, None] + key_dim[None, :], mask=real[:, None] & (key_dim < KEY_DIM)[None, :], other=0.0)

    begin = first_position * 0
    if WINDOW > 0:
        begin = tl.maximum(first_position - WINDOW + 1, 0)
    end = first_position + num_rows
    split = tl.program_id(2)
    split_len = tl.cdiv(tl.maximum(tl.cdiv(end - begin, num_splits), MIN_SPLIT_LEN), N) * N
    start = begin + split * split_len
    stop = tl.minimum(start + split_len, end)

    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mean = tl.zeros([M, VALUE_PAD], tl.float32)
    for first in range(start, stop, N):
        kv = first + tl.arange(0, N)
        present = kv < stop
        block = tl.load(table + kv // BLOCK_SIZE, mask=present, other=0)
        entry = (block * BLOCK_SIZE + kv % BLOCK_SIZE) * NUM_KV_HEADS + kv_head

        here = present[:, None] & (key_dim < KEY_DIM)[None, :]
        k = tl.load(keys + entry[:, None] * KEY_DIM + key_dim[None, :], mask=here, other=0.0)
        score = tl.dot(q.to(DOT), tl.trans(k.to(DOT)), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            decay = tl.exp(tl.abs(score) * (-2.0 / softcap))  # tanh(|x|) = (1 - e^-2|x|) / (1 + e^-2|x|)
            score = tl.where(score < 0.0, -softcap, softcap) * (1.0 - decay) / (1.0 + decay)
        visible = present[None, :] & (kv[None, :] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (kv[None, :] > position[:, None] - WINDOW)
        score = tl.where(visible, score * LOG2_E, float("-inf"))

        higher = tl.maximum(highest, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        prob = tl.exp2(score - base[:, None])
        shrink = tl.exp2(highest - base)
        highest = higher
        total = total * shrink + tl.sum(prob, 1)

        here = present[:, None] & (value_dim < VALUE_DIM)[None, :]
        v = tl.load(values + entry[:, None] * VALUE_DIM + value_dim[None, :], mask=here, other=0.0)
        mean = mean * shrink[:, None]
        mean += tl.dot(prob.to(v.dtype).to(DOT), v.to(DOT), input_precision="ieee")

    mean = mean / tl.where(total > 0.0, total, 1.0)[:, None]
    row_head = (first_row + row) * (NUM_KV_HEADS * FOLD) + head
    here = real[:, None] & (value_dim < VALUE_DIM)[None, :]
    if SPLIT:
        part = row_head * num_splits + split
        weight = highest + tl.log2(tl.where(total > 0.0, total, 1.0))
        tl.store(weights + part, weight, mask=real)
        if start < end:
            tl.store(partials + part[:, None] * VALUE_DIM + value_dim[None, :], mean, mask=here)
    else:
        at = row_head[:, None] * VALUE_DIM + value_dim[None, :]
        tl.store(output + at, mean.to(output.dtype.element_ty), mask=here)


@triton.jit
def join_kernel(
    partials,  # as above
    weights,  # as above
    output,  # as above
    NUM_HEADS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    """Grid: tokens, heads. Joins the splits of one row and head by their weights; every token has a tile."""
    row_head = tl.program_id(0).to(tl.int64) * NUM_HEADS + tl.program_id(1)
    part = row_head * NUM_SPLITS + tl.arange(0, NUM_SPLITS)
    weight = tl.load(weights + part)
    used = weight > float("-inf")
    share = tl.exp2(weight - tl.max(weight, 0))
    dim = tl.arange(0, VALUE_PAD)
    here = used[:, None] & (dim < VALUE_DIM)[None, :]
    mean = tl.load(partials + part[:, None] * VALUE_DIM + dim[None, :], mask=here, other=0.0)
    joined = tl.sum(mean * share[:, None], 0) / tl.sum(share, 0)
    at = row_head * VALUE_DIM + dim
    tl.store(output + at, joined.to(output.dtype.element_ty), mask=dim < VALUE_DIM)
