"""Selection of key blocks per query block by the scores of their mean-pooled tokens, in Triton.

Two launches: one multiplies the pooled blocks, one selects. They are separate kernels because the product needs 64-row
tiles for the matrix units, whereas the selection needs one row per warp, so that counting needs no barrier; the
intermediate scores are 4 bytes per pair of blocks.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, check_contiguous, exact_products, next_power_of_2

__all__ = ["MAX_BLOCKS", "ordered", "select_blocks"]

MAX_BLOCKS = 16384  # key blocks whose scores fit the registers of one program
SCRATCH_BYTES = 256 * 2**20  # limit of the scratch for scores; heads are processed in chunks that fit it


def select_blocks(
    pooled_q: Tensor,
    pooled_k: Tensor,
    n_critical: int | Tensor,
    n_negligible: int | Tensor,
    valid_blocks: Tensor | None = None,
    want_marginal: bool = True,
    *,
    map_dtype: torch.dtype = torch.float32,
    n_max: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Critical and marginal key blocks of each query block. [SLA, arXiv 2509.24006, eq. 2-4: M_c = 1 and 0]

    Scores are pooled_q pooled_kᵀ, with float32 precision. Subtracting the mean key ("smooth key") moves every score
    of a row by the same amount and does not change the selection: pass pooled keys as they are. If scores are equal,
    the block of lower index ranks higher, for both counts (a stable sort, as in ``sla.reference``); -0 equals 0, NaN is
    above all. More than MAX_BLOCKS key blocks are sorted by torch, with the same result.

    Args:
        pooled_q, pooled_k: (B, H, Mq, D), (B, H, Mk, D) float32, D at most 256.
        n_critical, n_negligible: blocks to select and to leave out; int, or (B,) int32 on the same device.
        valid_blocks: (1|B, Mk) bool, key blocks with at least one valid token: others are neither critical nor
            marginal.
        want_marginal: whether to return the map.
        map_dtype: dtype of the map.
        n_max: length of the lists if the counts are tensors; None = their maximum, which synchronizes the device.
    Returns: (B*H, Mq, n_max) int32, critical blocks in ascending order, then zeros (fewer than n_critical if fewer are
        valid); (B*H, Mq, Mk rounded up to a multiple of 16) 0/1 map of those that are neither critical nor among the
        n_negligible lowest, 0 past Mk (cuBLAS is fast if every axis is aligned), or None.
    """
    batch, heads, n_q, dim = pooled_q.shape
    n_k = pooled_k.shape[2]
    if n_max is None:
        n_max = int(n_critical.max()) if isinstance(n_critical, Tensor) else n_critical
    queries, keys = (x.reshape(batch * heads, -1, dim).contiguous() for x in (pooled_q, pooled_k))
    pitch = cdiv(n_k, 16) * 16
    lists = torch.empty(batch * heads, n_q, n_max, dtype=torch.int32, device=queries.device)
    marginal = None
    if want_marginal:
        marginal = torch.empty(batch * heads, n_q, pitch, dtype=map_dtype, device=queries.device)
    if valid_blocks is not None:
        valid_blocks = valid_blocks.expand(batch, -1)
    if isinstance(n_critical, Tensor) or isinstance(n_negligible, Tensor):
        n_critical, n_negligible = (
            torch.as_tensor(n, dtype=torch.int32, device=queries.device).expand(batch).contiguous()
            for n in (n_critical, n_negligible)
        )
    step = min(batch * heads, max(1, SCRATCH_BYTES // (n_q * pitch * 4)))
    scratch = torch.empty(step, n_q, pitch, dtype=torch.float32, device=queries.device)
    pick = _launch_pick if n_k <= MAX_BLOCKS else _sort_and_pick
    for first in range(0, batch * heads, step):
        run = slice(first, min(first + step, batch * heads))
        scores = scratch[: run.stop - first]
        _launch_scores(queries[run], keys[run], scores)
        picked = None if marginal is None else marginal[run]
        pick(scores, first, heads, n_k, n_critical, n_negligible, valid_blocks, lists[run], picked)
    return lists, marginal


def _launch_scores(queries: Tensor, keys: Tensor, scores: Tensor) -> None:
    check_contiguous(queries=queries, keys=keys, scores=scores)
    groups, n_q, dim = queries.shape
    n_k = keys.shape[1]
    block_m, block_n = 64, 64
    _block_scores_fwd_kernel[(groups * cdiv(n_q, block_m) * cdiv(n_k, block_n),)](
        queries,
        keys,
        scores,
        n_q,
        n_k,
        scores.shape[2],
        D=dim,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=min(32, next_power_of_2(dim)),
        PRECISION=exact_products(),
        num_warps=4,
    )


@triton.jit
def _block_scores_fwd_kernel(
    q_ptr,
    k_ptr,
    scores_ptr,
    n_q,
    n_k,
    pitch,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) tile of q kᵀ of one head."""
    n_cols = tl.cdiv(n_k, BLOCK_N)
    n_tiles = tl.cdiv(n_q, BLOCK_M) * n_cols
    tile = tl.program_id(0) % n_tiles
    i_g = (tl.program_id(0) // n_tiles).to(tl.int64)
    rows = tile // n_cols * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile % n_cols * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_K):
        dims = start + tl.arange(0, BLOCK_K)
        p_q = q_ptr + (i_g * n_q + rows[:, None]) * D + dims[None, :]
        b_q = tl.load(p_q, mask=(rows < n_q)[:, None] & (dims < D)[None, :], other=0.0)
        p_k = k_ptr + (i_g * n_k + cols[:, None]) * D + dims[None, :]
        b_k = tl.load(p_k, mask=(cols < n_k)[:, None] & (dims < D)[None, :], other=0.0)
        acc = tl.dot(b_q, tl.trans(b_k), acc, input_precision=PRECISION)
    p_scores = scores_ptr + (i_g * n_q + rows[:, None]) * pitch + cols[None, :]
    tl.store(p_scores, acc, mask=(rows < n_q)[:, None] & (cols < pitch)[None, :])  # padding columns as well


def _launch_pick(
    scores: Tensor,
    first: int,
    heads: int,
    n_k: int,
    n_critical: int | Tensor,
    n_negligible: int | Tensor,
    valid_blocks: Tensor | None,
    lists: Tensor,
    marginal: Tensor | None,
) -> None:
    """Write ``lists`` and ``marginal`` of the heads from ``first`` on."""
    check_contiguous(scores=scores, lists=lists, marginal=marginal)
    groups, n_q, pitch = scores.shape
    valid_blocks = None if valid_blocks is None else valid_blocks.view(torch.uint8)
    block = next_power_of_2(pitch)
    _pick_blocks_fwd_kernel[(groups * n_q,)](
        scores,
        scores if valid_blocks is None else valid_blocks,
        lists,
        scores if marginal is None else marginal,
        n_critical,
        n_negligible,
        first,
        heads,
        n_q,
        n_k,
        pitch,
        lists.shape[2],
        0 if valid_blocks is None else valid_blocks.stride(0),
        0 if valid_blocks is None else valid_blocks.stride(1),
        PER_BATCH=isinstance(n_critical, Tensor),
        HAS_VALID=valid_blocks is not None,
        WANT_MARGINAL=marginal is not None,
        BLOCK=block,
        num_warps=min(16, max(1, block // 1024)),  # 32 scores per thread; one warp counts without a barrier
    )


@triton.jit(do_not_specialize=["n_critical", "n_negligible", "first", "n_max"])
def _pick_blocks_fwd_kernel(
    scores_ptr,
    valid_ptr,
    lists_ptr,
    marginal_ptr,
    n_critical,
    n_negligible,
    first,
    n_heads,
    n_q,
    n_k,
    pitch,
    n_max,
    stride_vb,
    stride_vm,
    PER_BATCH: tl.constexpr,
    HAS_VALID: tl.constexpr,
    WANT_MARGINAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Select in one row of scores. n_critical and n_negligible are pointers with PER_BATCH, otherwise numbers."""
    row = tl.program_id(0).to(tl.int64)
    i_b = (first + row // n_q) // n_heads
    cols = tl.arange(0, BLOCK)
    valid = cols < n_k
    # loaded up to a multiple of 16, so that the mask allows vector loads of four
    b_scores = tl.load(scores_ptr + row * pitch + cols, mask=cols < pitch, other=0.0)
    if HAS_VALID:
        valid = valid & (tl.load(valid_ptr + i_b * stride_vb + cols * stride_vm, mask=valid, other=0) != 0)
    if PER_BATCH:
        n_critical = tl.load(n_critical + i_b)
        n_negligible = tl.load(n_negligible + i_b)
    image = tl.where(valid, tl.maximum(ordered(b_scores), 1), 0)
    critical = _highest(image, n_critical)
    place = tl.cumsum(critical.to(tl.int32), 0) - 1
    n_chosen = tl.sum(critical.to(tl.int32), 0)
    p_lists = lists_ptr + row * n_max
    tl.store(p_lists + place, cols, mask=critical & (place < n_max))
    if n_chosen < n_max:
        for start in range(0, n_max, BLOCK):  # one iteration, because a row has at least as many blocks as its list
            tl.store(p_lists + start + cols, 0, mask=(start + cols >= n_chosen) & (start + cols < n_max))
    if WANT_MARGINAL:
        n_valid = tl.sum(valid.to(tl.int32), 0)
        marginal = _highest(image, tl.maximum(n_valid - n_negligible, 0)) & ~critical
        b_map = marginal.to(marginal_ptr.dtype.element_ty)
        tl.store(marginal_ptr + row * pitch + cols, b_map, mask=cols < pitch)


@triton.jit
def ordered(x):
    """Map floats to uint32 in the same order; -0 becomes 0, and NaN is above all."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.uint32, bitcast=True)
    image = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(x != x, tl.full(image.shape, 0xFFFFFFFF, tl.uint32), image)


@triton.jit
def _highest(image, n):
    """Mask of the n highest elements, ties broken by index; 0 = no element.

    The n-th value is found by a binary search over its bits: it is the largest number that at least n elements reach.
    """
    bit = tl.full([], 0x80000000, tl.uint32)
    none = tl.full([], 0, tl.uint32)
    least = none
    while bit > none:
        trial = least | bit
        count = tl.sum((image >= trial).to(tl.int32), 0)
        least = tl.where(count >= n, trial, least)
        bit = tl.where(count == n, none, bit >> 1)  # the lower bits no longer matter
    higher = image > least
    tie = (image == least) & (image > 0)
    room = n - tl.sum(higher.to(tl.int32), 0)
    if tl.sum(tie.to(tl.int32), 0) > room:  # rarely needed, and a scan costs as much as several bits
        tie = tie & (tl.cumsum(tie.to(tl.int32), 0) <= room)
    return higher | tie


def _sort_and_pick(
    scores: Tensor,
    first: int,
    heads: int,
    n_k: int,
    n_critical: int | Tensor,
    n_negligible: int | Tensor,
    valid_blocks: Tensor | None,
    lists: Tensor,
    marginal: Tensor | None,
) -> None:
    """Same as :func:`_launch_pick` for any number of key blocks: one head at a time, because a sort needs memory."""
    for i, head_scores in enumerate(scores[..., :n_k]):
        i_b = (first + i) // heads
        valid = torch.ones(n_k, dtype=torch.bool, device=scores.device) if valid_blocks is None else valid_blocks[i_b]
        critical_n, negligible_n = (n[i_b] if isinstance(n, Tensor) else n for n in (n_critical, n_negligible))
        ranked = torch.where(valid, head_scores, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        rank = torch.empty_like(ranked)
        rank.scatter_(-1, ranked, torch.arange(n_k, device=scores.device).expand(ranked.shape))
        critical = valid & (rank < critical_n)
        index = torch.where(critical, torch.arange(n_k, device=scores.device), n_k).sort(-1).values
        index = index[:, : lists.shape[2]]
        lists[i] = torch.where(index < n_k, index, 0)
        if marginal is not None:
            marginal[i, :, :n_k] = valid & ~critical & (rank < valid.sum() - negligible_n)
            marginal[i, :, n_k:] = 0
