# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of ``selection/select.py``, and the selection of the highest elements of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention_kernel import attended

__all__ = ["block_scores_fwd_kernel", "highest", "ordered", "pick_blocks_fwd_kernel"]


@triton.jit
def ordered(x):
    """Map floats to uint32 in the same order; -0 becomes 0, and NaN is above all."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.uint32, bitcast=True)
    image = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(x != x, tl.full(image.shape, 0xFFFFFFFF, tl.uint32), image)


@triton.jit
def highest(image, n):
    """Mask of the n highest elements of each row of a block (rows, columns) of uint32, ties broken by index; 0 = no
    element.

    n: number, or (rows,). The n-th value is found by removing the maximum n - 1 times if n is small and known at
    compile time, otherwise by a binary search over its bits: it is the largest number that at least n elements reach.
    """
    if not isinstance(n, tl.tensor):  # noqa: SIM102
        if n <= 16:
            after = image.shape[1] - 1 - tl.arange(0, image.shape[1])
            key = tl.where(image > 0, (image.to(tl.uint64) << 32) | after.to(tl.uint64)[None, :], 0)  # distinct keys
            least_key = tl.max(key, 1)
            for _ in range(n - 1):
                least_key = tl.max(tl.where(key < least_key[:, None], key, 0), 1)
            return (key >= least_key[:, None]) & (image > 0)
    bit = tl.full([], 0x80000000, tl.uint32)
    none = tl.full([], 0, tl.uint32)
    least = tl.zeros((image.shape[0],), tl.uint32)
    while bit > none:
        trial = least | bit
        count = tl.sum((image >= trial[:, None]).to(tl.int32), 1)
        least = tl.where(count >= n, trial, least)
        bit = bit >> 1
        if image.shape[0] == 1:  # the lower bits no longer matter
            bit = tl.where(tl.max((count == n).to(tl.int32), 0) > 0, none, bit)
    higher = image > least[:, None]
    tie = (image == least[:, None]) & (image > 0)
    room = n - tl.sum(higher.to(tl.int32), 1)
    excess = tl.sum(tie.to(tl.int32), 1) - room
    # rarely needed in one row, and a scan costs as much as several bits
    if image.shape[0] > 1 or tl.max(excess, 0) > 0:
        tie = tie & (tl.cumsum(tie.to(tl.int32), 1) <= room[:, None])
    return higher | tie


@triton.jit
def block_scores_fwd_kernel(
    p_queries, p_keys, p_scores, n_q, n_k, pitch, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) tile of q kᵀ of one head, in rows of ``pitch`` columns."""
    n_cols = tl.cdiv(n_k, BLOCK_N)
    n_tiles = tl.cdiv(n_q, BLOCK_M) * n_cols
    tile = tl.program_id(0) % n_tiles
    bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    row = tile // n_cols * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile % n_cols * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        p_q = p_queries + (bh * n_q + row[:, None]) * D + d[None, :]
        b_q = tl.load(p_q, mask=(row < n_q)[:, None] & (d < D)[None, :], other=0.0)
        p_k = p_keys + (bh * n_k + col[:, None]) * D + d[None, :]
        b_k = tl.load(p_k, mask=(col < n_k)[:, None] & (d < D)[None, :], other=0.0)
        acc = tl.dot(b_q, tl.trans(b_k), acc, input_precision=PRECISION)
    p_tile = p_scores + (bh * n_q + row[:, None]) * pitch + col[None, :]
    tl.store(p_tile, acc, mask=(row < n_q)[:, None] & (col < pitch)[None, :])  # padding columns as well


@triton.jit(do_not_specialize=["n_critical", "n_negligible", "first", "n_max"])
def pick_blocks_fwd_kernel(
    p_scores, p_lists, p_marginal, valid_blocks, n_critical, n_negligible, first, n_heads, n_q, n_k, pitch, n_max,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Selection in one row of scores. n_critical and n_negligible are numbers, or pointers to one for each batch
    element."""
    row = tl.program_id(0).to(tl.int64)
    b = (first + row // n_q) // n_heads
    col = tl.arange(0, BLOCK)[None, :]
    # (1, BLOCK), loaded up to a multiple of 16, so that the mask allows vector loads of four
    b_scores = tl.load(p_scores + row * pitch + col, mask=col < pitch, other=0.0)
    valid = attended(valid_blocks, b, col, col < n_k)
    if n_critical.dtype.is_ptr():
        n_critical, n_negligible = tl.load(n_critical + b), tl.load(n_negligible + b)
    image = tl.where(valid, tl.maximum(ordered(b_scores), 1), 0)
    critical = highest(image, n_critical)
    place = tl.cumsum(critical.to(tl.int32), 1) - 1
    n_chosen = tl.sum(critical.to(tl.int32))
    p_list = p_lists + row * n_max
    tl.store(p_list + place, col, mask=critical & (place < n_max))
    if n_chosen < n_max:
        for start in range(0, n_max, BLOCK):  # one iteration, because a row has at least as many blocks as its list
            tl.store(p_list + start + col, 0, mask=(start + col >= n_chosen) & (start + col < n_max))
    if p_marginal is not None:
        n_valid = tl.sum(valid.to(tl.int32))
        marginal = highest(image, tl.maximum(n_valid - n_negligible, 0)) & ~critical
        tl.store(p_marginal + row * pitch + col, marginal.to(p_marginal.dtype.element_ty), mask=col < pitch)
