"""LLSA's attention in two Triton kernels that share one softmax.

The coarse kernel processes tiles of queries with the keys that all of them attend to: pooled and global tokens. The
fine kernel processes one block of queries at a time with the tokens of its kept blocks, and merges its result with the
coarse one in the output by their log-sum-exps. Tokens are loaded directly from the sequence: nothing is permuted.

Queries are the rows of every product, also in tiles of 16: with these as columns, Triton 3.6 gave wrong sums and
illegal accesses on an H100, and it was no faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..arguments import Mask, Rows, Tokens, mask_of, rows_of
from ..block_sparse.forward import LOG2E, check_inputs
from ..launch import cdiv, check_contiguous, empty_rows, has_large_shared_memory, next_pow2_min16, register_limit
from .arguments import PooledKeys, bias_of, queries_of, static_of
from .forward_kernel import llsa_coarse_fwd_kernel, llsa_fine_fwd_kernel

__all__ = ["LaunchConfig", "Pooled", "check_tree", "llsa_blocks_attention", "pooled_of"]


@dataclass(frozen=True)
class Pooled:
    """Pooled tokens to attend to, weighted by the number of tokens that each covers; the last one is empty.

    keys, values: (B*H, P + 1, D) dense, of all levels. weight: (1|B, P + 1) float32, log2 of the valid tokens of each.
    indices: (B*H, n_2, m) int32, pooled tokens visible from each level-2 token, P for none; None = only one level.
    top: index of the first token of the top level; all grid queries attend to that level.
    """

    keys: Tensor
    values: Tensor
    weight: Tensor
    indices: Tensor | None
    top: int


@dataclass(frozen=True)
class LaunchConfig:
    """Launch parameters: queries and keys of a tile, warps, stages of the pipeline, maximum registers per thread."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def llsa_blocks_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    children: Sequence[Tensor],
    *,
    scale: float,
    before: int,
    n_grid: int,
    pooled: Pooled | None = None,
    key_mask: Tensor | None = None,
    whole: bool = False,
    return_lse: bool = False,
    coarse: LaunchConfig | None = None,
    fine: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of each block of grid queries over the blocks that it kept, its visible pooled tokens and the
    global tokens; global queries attend to every token. [LLSA, arXiv 2512.16615]

    Args:
        query, key, value: (B, H, S, D) float16, bfloat16 or float32, D at most 256, any strides.
        kept: (B*H, n_1, k) int32, blocks kept by each block, -1 = none.
        children: for each level (n, block) int64, tokens of the level below (for the first: positions on the grid), -1
            = none.
        scale: factor on the logits.
        before, n_grid: the grid tokens are rows before to before + n_grid - 1.
        pooled: pooled tokens; None = attend to none.
        key_mask: (B, S) bool, True = attend; masked keys are not read.
        whole: known to have no -1 in kept and children, and no P in pooled.indices.
        return_lse: whether to return the log-sum-exp, too.
        coarse, fine: launch parameters of the two kernels; None = choose by GPU.
    Returns: (B, H, S, D) in query.dtype, dense in the order (B, S, H, D); (B, H, S) float32 log-sum-exp, natural log,
        -inf for a query without a visible key; such a row is 0 in the output.
    Raises: ValueError: a dtype, head dim or device that the kernels do not support, or tables that are not contiguous;
        OutOfResources: the GPU has too little shared memory for them.
    """
    check_inputs(query)
    check_tree(children, pooled)
    check_contiguous(kept=kept)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    key_mask = key_mask if key_mask is None or key_mask.stride(-1) == 1 else key_mask.contiguous()
    batch, heads, length, _ = query.shape
    out = empty_rows(query)
    has_coarse = pooled is not None or length > n_grid
    lse = None
    if return_lse or has_coarse:
        lse = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    rows = rows_of(query), rows_of(key), rows_of(value), rows_of(out)
    tokens, mask, scale = Tokens(length, before, 1, 1, n_grid), mask_of(key_mask), scale * LOG2E
    if has_coarse:
        config = coarse or _coarse_config(query, whole and len(children) <= 2)
        _launch_coarse(config, query, rows, lse, mask, children, pooled, tokens, scale, whole)
    config = fine or _fine_config(query, children[0].shape[1])
    coarse_lse, lse = lse if has_coarse else None, lse if return_lse else None
    _launch_fine(config, query, rows, lse, coarse_lse, mask, kept, children[0], tokens, scale, whole)
    return out, lse


def check_tree(children: Sequence[Tensor], pooled: Pooled | None = None) -> None:
    """Raises: ValueError: index tables or pooled tokens that are not contiguous; the kernels do not read their
    strides."""
    check_contiguous(**{f"children[{i}]": table for i, table in enumerate(children)})
    if pooled is not None:
        check_contiguous(keys=pooled.keys, values=pooled.values, weight=pooled.weight, indices=pooled.indices)


def pooled_of(pooled: Pooled | None) -> PooledKeys:
    """Group of pooled tokens; None = there are none."""
    if pooled is None:
        return PooledKeys(None, None, *bias_of(None), 0, 0, None, 0, None, None)
    indices, length = pooled.indices, pooled.keys.shape[1]
    n_indices = 0 if indices is None else indices.shape[2]
    bias, batch = bias_of(pooled.weight)
    return PooledKeys(pooled.keys, pooled.values, bias, batch, length, pooled.top, indices, n_indices, None, None)


def _launch_coarse(
    config: LaunchConfig,
    query: Tensor,
    rows: tuple[Rows, ...],
    lse: Tensor | None,
    mask: Mask,
    children: Sequence[Tensor],
    pooled: Pooled | None,
    tokens: Tokens,
    scale: float,
    whole: bool,
) -> None:
    batch, heads = query.shape[:2]
    block, n_grid = children[0].shape[1], tokens.g2
    queries = queries_of(children, pooled.indices if pooled else None)
    config = _fitting(config, queries.n_slots)
    n_tiles = cdiv(tokens.length - n_grid, config.block_q) + queries.n_nodes * cdiv(queries.n_slots, config.block_q)
    group = pooled_of(pooled)
    indices_whole, top_whole = (n % config.block_k == 0 for n in (group.n_indices, group.length - 1 - group.top))
    if whole and indices_whole and len(children) == 2:
        group = group._replace(indices_bias=math.log2(block))
    if whole and top_whole:
        group = group._replace(top_bias=len(children) * math.log2(block))
    static = static_of(query, block, config.block_q, config.block_k)._replace(
        GLOBAL=tokens.length > n_grid, INDICES_WHOLE=indices_whole, TOP_WHOLE=top_whole,
        ALL_SLOTS=whole and queries.n_slots % config.block_q == 0 and tokens.length == n_grid,
    )  # fmt: skip
    llsa_coarse_fwd_kernel[(n_tiles * batch * heads,)](
        *rows, lse, mask, queries, group, tokens, batch * heads, heads, scale, S=static,
        num_warps=config.num_warps, num_stages=config.num_stages, **register_limit(query, config.max_registers),
    )  # fmt: skip


def _launch_fine(
    config: LaunchConfig,
    query: Tensor,
    rows: tuple[Rows, ...],
    lse: Tensor | None,
    coarse_lse: Tensor | None,
    mask: Mask,
    kept: Tensor,
    blocks: Tensor,
    tokens: Tokens,
    scale: float,
    whole: bool,
) -> None:
    batch, heads = query.shape[:2]
    n_blocks, block = blocks.shape
    n_kept = kept.shape[2]
    block_q = min(config.block_q, next_pow2_min16(block))
    block_k = min(config.block_k, next_pow2_min16(n_kept * block))
    static = static_of(query, block, block_q, block_k)._replace(
        N_KEPT=n_kept, WHOLE=whole and n_kept * block % block_k == 0, ALL_SLOTS=whole and block % block_q == 0
    )
    llsa_fine_fwd_kernel[(batch * heads * n_blocks * cdiv(block, block_q),)](
        *rows, lse, coarse_lse, mask, kept, blocks, tokens, n_blocks, heads, scale, S=static,
        num_warps=config.num_warps, num_stages=config.num_stages, **register_limit(query, config.max_registers),
    )  # fmt: skip


def _fitting(config: LaunchConfig, n_slots: int) -> LaunchConfig:
    """Halve the queries per tile if that leaves fewer slots empty."""
    half = config.block_q // 2
    if half < 16 or cdiv(n_slots, half) * half >= cdiv(n_slots, config.block_q) * config.block_q:
        return config
    return replace(config, block_q=half, num_warps=max(4, config.num_warps // 2))


def _coarse_config(query: Tensor, uniform: bool) -> LaunchConfig:
    """Launch parameters of the coarse kernel. At 128 registers per thread, two programs or more share a multiprocessor
    on Hopper; weights that differ between keys take registers, so tiles must be smaller."""
    dim = query.shape[-1]
    if query.dtype == torch.float32:
        return LaunchConfig(32, 32, 8, 1) if dim > 64 else LaunchConfig(64, 32, 8, 1)
    if dim > 128:
        return LaunchConfig(64, 32, 8, 1)
    if not has_large_shared_memory(query):
        return LaunchConfig(64, 64, 4, 1 if torch.version.hip else 2)
    if not uniform:
        return LaunchConfig(128, 32, 8, 3, 128) if dim <= 64 else LaunchConfig(64, 32, 4, 3, 128)
    return LaunchConfig(64, 64, 4, 2, 128) if dim <= 64 else LaunchConfig(128, 64, 4, 2)


def _fine_config(query: Tensor, block: int) -> LaunchConfig:
    """Launch parameters of the fine kernel: a warp per 16 queries, so that its results need no exchange between warps,
    and many programs share a multiprocessor."""
    dim = query.shape[-1]
    if query.dtype == torch.float32:
        return LaunchConfig(min(16 if dim > 64 else 32, next_pow2_min16(block)), 32, 4, 1)
    block_q = min(32 if dim > 128 else 64, next_pow2_min16(block))
    return LaunchConfig(block_q, 32, max(1, block_q // 16), 2 if has_large_shared_memory(query) else 1)
