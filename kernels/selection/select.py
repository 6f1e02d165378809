"""Selection of key blocks per query block by the scores of their mean-pooled tokens, in Triton.

Two launches: one multiplies the pooled blocks, one selects. They are separate kernels because the product needs 64-row
tiles for the matrix units, whereas the selection needs one row per warp, so that counting needs no barrier; the
intermediate scores are 4 bytes per pair of blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import Mask, mask_of
from ..launch import cdiv, check_contiguous, exact_products, next_power_of_2
from .select_kernel import block_scores_fwd_kernel, pick_blocks_fwd_kernel

__all__ = ["MAX_BLOCKS", "select_blocks"]

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
    """Write scores (G, Mq, Mk rounded up) of queries (G, Mq, D) and keys (G, Mk, D)."""
    check_contiguous(queries=queries, keys=keys, scores=scores)
    groups, n_q, dim = queries.shape
    n_k = keys.shape[1]
    block_m, block_n = 64, 64
    block_scores_fwd_kernel[(groups * cdiv(n_q, block_m) * cdiv(n_k, block_n),)](
        queries, keys, scores, n_q, n_k, scores.shape[2], D=dim, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=min(32, next_power_of_2(dim)), PRECISION=exact_products(), num_warps=4,
    )  # fmt: skip


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
    block = next_power_of_2(pitch)
    # not the stride 0 of mask_of for one row: Triton would load 16 entries per thread, of the scores as well
    mask = mask_of(None) if valid_blocks is None else Mask(valid_blocks, *valid_blocks.stride())
    pick_blocks_fwd_kernel[(groups * n_q,)](
        scores, lists, marginal, mask, n_critical, n_negligible, first, heads, n_q, n_k, pitch,
        lists.shape[2], BLOCK=block,
        num_warps=min(16, max(1, block // 1024)),  # 32 scores per thread; one warp counts without a barrier
    )  # fmt: skip


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
