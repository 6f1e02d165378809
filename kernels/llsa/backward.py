"""Gradients of LLSA's attention, in Triton: dQ by looping over keys, dK and dV by looping over the queries that list a
key block, and gradients of pooled tokens propagated down to the tokens that they cover. [LLSA, arXiv 2512.16615]

Deterministic: no two programs write to the same location. The selection has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import Rows, Tokens, mask_of, rows_of
from ..block_sparse.backward import lse_and_delta
from ..block_sparse.forward import LOG2E, check_inputs
from ..block_sparse.plan import transpose_block_lists
from ..launch import cdiv, check_contiguous, empty_rows, has_large_shared_memory, next_pow2_min16
from .arguments import Above, Interval, KeyTiles, QueryLists, Splits, bias_of, queries_of, static_of
from .backward_kernel import llsa_coarse_bwd_dq_kernel, llsa_dkv_kernel, llsa_fine_bwd_dq_kernel
from .forward import LaunchConfig, Pooled, check_tree, pooled_of

__all__ = ["llsa_blocks_attention_backward"]

NO_ROWS = Interval(None, 0, 0)
NO_LISTS = QueryLists(None, None, 0, None, None)
PROGRAMS = 528  # programs that share a loop over all queries: four per multiprocessor of an H100 or H200


class _LaunchConfigs(NamedTuple):
    """Launch parameters of the kernels, by the tile held by a program: queries of the coarse and the fine kernel; keys
    of a block, pooled keys under one level-2 token, and an interval of keys visible to all queries."""

    coarse: LaunchConfig
    fine: LaunchConfig
    tokens: LaunchConfig
    pooled: LaunchConfig
    interval: LaunchConfig


class _Call(NamedTuple):
    """Arguments shared by all launches of one backward pass."""

    grad: Tensor
    query: Tensor
    lse_delta: Tensor
    scale: float
    tokens: Tokens
    children: Sequence[Tensor]
    configs: _LaunchConfigs


class _Keys(NamedTuple):
    """Keys and values (B, H, n, D), their gradients (splits, B, H, m, D) and mask (B, n); weight: (1|B, n) of pooled
    keys."""

    key: Tensor
    value: Tensor
    d_key: Tensor
    d_value: Tensor
    key_mask: Tensor | None
    weight: Tensor | None


def llsa_blocks_attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Sequence[Tensor],
    children: Sequence[Tensor],
    places: Sequence[Tensor],
    *,
    scale: float,
    before: int,
    n_grid: int,
    pooled: Pooled | None = None,
    number: Tensor | None = None,
    rows: Sequence[int] = (),
    key_mask: Tensor | None = None,
    whole: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`llsa_blocks_attention` with respect to query, key and value, including the path through
    pooled tokens.

    Args:
        grad: (B, H, S, D) gradient of the output.
        out, lse: outputs of the forward pass.
        kept: for each level l = 1 … L (B*H, n_l, k) int32, tokens of that level kept by each of its tokens, -1 = none.
        children, places, number, rows: of the tree, as in ``llsa_tree_triton``.
        query, key, value, scale, before, n_grid, pooled, key_mask, whole: as in the forward pass.
    """
    check_inputs(query)
    check_tree(children, pooled)
    check_contiguous(**{f"kept[{i}]": x for i, x in enumerate(kept)})
    query, key, value, grad = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, grad))
    key_mask = key_mask if key_mask is None or key_mask.stride(-1) == 1 else key_mask.contiguous()
    length = query.shape[2]
    configs = _launch_configs(query, children[0].shape[1])
    sequence = Tokens(length, before, 1, 1, n_grid)
    call = _Call(grad, query, lse_and_delta(grad, out, lse)[0], scale, sequence, children, configs)
    d_query = _queries(call, key, value, kept[0], pooled, key_mask)
    above = None
    if pooled is not None:
        assert number is not None
        above = _spread(_pooled(call, kept, places, pooled, rows, whole), number, children, places, rows)
    d_key, d_value = empty_rows(key), empty_rows(value)
    n_global = length - n_grid
    tokens = _Keys(key, value, d_key[None], d_value[None], key_mask, None)
    keys = KeyTiles(children[0], before, len(children[0]), *NO_ROWS)
    global_rows = Interval(n_global or None, before, n_grid)
    lists = _query_lists(call, kept[0], keys.n_tiles, whole)
    _launch_dkv(call, tokens, configs.tokens, keys, lists=lists, above=above, rows=global_rows)
    if n_global:
        _interval_gradients(call, tokens, Interval(n_global, before, n_grid), Interval(length, 0, 0))
    return d_query, d_key, d_value


def _queries(
    call: _Call, key: Tensor, value: Tensor, kept: Tensor, pooled: Pooled | None, key_mask: Tensor | None
) -> Tensor:
    query, grad, children, tokens = call.query, call.grad, call.children, call.tokens
    batch, heads = query.shape[:2]
    d_query = empty_rows(query)
    n_blocks, block = children[0].shape
    rows = rows_of(query), rows_of(key), rows_of(value), rows_of(grad)
    common = *rows, call.lse_delta, rows_of(d_query), mask_of(key_mask)
    scales = call.scale * LOG2E, call.scale
    n_global = tokens.length - tokens.g2
    has_coarse = pooled is not None or n_global > 0
    if has_coarse:
        queries = queries_of(children, pooled.indices if pooled else None)
        config = call.configs.coarse
        block_q = min(config.block_q, next_pow2_min16(queries.n_slots))
        n_tiles = cdiv(n_global, block_q) + queries.n_nodes * cdiv(queries.n_slots, block_q)
        llsa_coarse_bwd_dq_kernel[(n_tiles * batch * heads,)](
            *common, queries, pooled_of(pooled), tokens, batch * heads, heads, *scales,
            S=static_of(query, block, block_q, config.block_k)._replace(GLOBAL=n_global > 0),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    config, n_kept = call.configs.fine, kept.shape[2]
    block_q, block_k = min(config.block_q, next_pow2_min16(block)), min(config.block_k, next_pow2_min16(n_kept * block))
    llsa_fine_bwd_dq_kernel[(batch * heads * n_blocks * cdiv(block, block_q),)](
        *common, kept, children[0], tokens, n_blocks, heads, *scales,
        S=static_of(query, block, block_q, block_k)._replace(N_KEPT=n_kept, ADD=has_coarse),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return d_query


def _pooled(
    call: _Call, kept: Sequence[Tensor], places: Sequence[Tensor], pooled: Pooled, rows: Sequence[int], whole: bool
) -> Tensor:
    """Gradients of pooled keys and values, (2, B, H, P + 1, D) float32; those of the last, empty token are
    uninitialized."""
    batch, heads = call.query.shape[:2]
    key, value = (x.unflatten(0, (batch, heads)) for x in (pooled.keys, pooled.values))
    d_pooled = torch.empty(2, 1, *key.shape, dtype=torch.float32, device=key.device)
    keys = _Keys(key, value, d_pooled[0], d_pooled[1], None, pooled.weight)
    block = call.children[0].shape[1]
    ancestor: Tensor | None = None  # of the level-2 tokens; None = themselves
    for level in range(1, len(call.children)):  # visible if the ancestor of the query kept the parent
        if level > 1:
            ancestor = (places[level] if ancestor is None else places[level][ancestor]) // block
        n = len(call.children[level])
        visible = kept[level] if ancestor is None else kept[level][:, ancestor]
        lists = _query_lists(call, visible, n, whole, nodes=call.children[1])
        _launch_dkv(
            call, keys, call.configs.pooled, KeyTiles(call.children[level], rows[level - 1], n, *NO_ROWS), lists=lists
        )
    n_top = len(call.children[-1])
    grid_rows = Interval(call.tokens.g2, 0, call.tokens.before)
    _interval_gradients(call, keys, Interval(n_top, 0, pooled.top), grid_rows)
    return d_pooled[:, 0]


def _query_lists(call: _Call, kept: Tensor, n: int, whole: bool, nodes: Tensor | None = None) -> QueryLists:
    """Blocks, or with ``nodes`` level-2 tokens, that kept each of n tokens; see :func:`transpose_block_lists`."""
    lists, ends = transpose_block_lists(kept if whole else torch.where(kept < 0, n, kept), n)
    return QueryLists(lists, ends, lists.stride(0), call.children[0], nodes)


def _interval_gradients(call: _Call, keys: _Keys, key_rows: Interval, rows: Interval) -> None:
    """Gradients of an interval of keys that a whole interval of queries attends to: that of queries is split between
    programs, and their sums are added in order."""
    batch, heads, _, dim = call.query.shape
    config = call.configs.interval
    n_keys, cut, skip = key_rows
    n_tiles = cdiv(n_keys, config.block_k)
    n_splits = max(1, min(cdiv(rows.length, 1024), PROGRAMS // (n_tiles * batch * heads)))
    split_rows = cdiv(cdiv(rows.length, n_splits), config.block_q) * config.block_q
    n_splits = cdiv(rows.length, split_rows)
    parts = torch.empty(2, n_splits, batch, heads, n_keys, dim, dtype=torch.float32, device=call.query.device)
    split_keys = keys._replace(d_key=parts[0], d_value=parts[1])
    _launch_dkv(call, split_keys, config, KeyTiles(None, 0, n_tiles, *key_rows), rows=rows, split_rows=split_rows)
    for to, total in zip((keys.d_key, keys.d_value), parts.sum(1).to(keys.d_key.dtype), strict=True):
        if cut:
            to[0][:, :, :cut] = total[:, :, :cut]
        to[0][:, :, cut + skip : skip + n_keys] = total[:, :, cut:]


def _launch_dkv(
    call: _Call,
    keys: _Keys,
    config: LaunchConfig,
    tiles: KeyTiles,
    *,
    lists: QueryLists = NO_LISTS,
    above: Tensor | None = None,
    rows: Interval = NO_ROWS,
    split_rows: int | None = None,
) -> None:
    """Launch the dK/dV kernel. Queries: those in ``lists``, and ``rows``, split_rows of them per program, None = all.
    above: see :func:`_spread`."""
    query = call.query
    batch, heads = query.shape[:2]
    block, block_k, n_parts = call.children[0].shape[1], config.block_k, 1
    if tiles.table is not None:
        block_k = min(block_k, next_pow2_min16(block))
        n_parts = cdiv(block, block_k)
    n_splits, split_stride, d_strides = len(keys.d_key), keys.d_key.stride(0), keys.d_key.stride()[1:4]
    llsa_dkv_kernel[(tiles.n_tiles * n_parts * batch * heads * n_splits,)](
        rows_of(query), rows_of(keys.key), rows_of(keys.value), rows_of(call.grad), call.lse_delta,
        Rows(keys.d_key, *d_strides), Rows(keys.d_value, *d_strides), mask_of(keys.key_mask), bias_of(keys.weight),
        Above(None, None) if above is None else Above(*above), tiles, lists,
        Splits(*rows, max(1, rows.length or 0) if split_rows is None else split_rows, split_stride), call.tokens,
        batch * heads, heads, call.scale * LOG2E, call.scale, S=static_of(query, block, config.block_q, block_k),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _launch_configs(query: Tensor, block: int) -> _LaunchConfigs:
    """Launch parameters: the fastest on an H100 of those that fit registers and shared memory of every GPU. In most of
    them a warp owns 16 rows of a block, so that its results need no exchange between warps."""
    half, dim = query.element_size() == 2, query.shape[-1]
    if not half or dim > 128:
        tile = 16 if dim > 128 and not half else 32
        same = LaunchConfig(tile, tile, 4, 1)
        return _LaunchConfigs(same, same, same, same, same)
    roomy = has_large_shared_memory(query)
    stages = 2 if roomy else 1
    rows = min(64, next_pow2_min16(block))
    warps = rows // 16
    return _LaunchConfigs(
        coarse=LaunchConfig(64, 64, 4, stages),
        fine=LaunchConfig(rows, 32, warps, stages + 1) if dim <= 64 else LaunchConfig(rows, 64, 4, stages),
        tokens=LaunchConfig(32, rows, warps, stages + 1),
        pooled=LaunchConfig(128 if roomy else 64, 64, 4, stages),
        interval=LaunchConfig(64, 64 if roomy else 32, 4, stages),
    )


def _spread(
    d_pooled: Tensor, number: Tensor, children: Sequence[Tensor], places: Sequence[Tensor], rows: Sequence[int]
) -> Tensor:
    """Gradient of each valid token of a level-1 block through all pooled tokens that cover it, (2, B, H, n_1, D)
    float32: a mean distributes its gradient evenly among the tokens that it covers."""
    block = children[0].shape[1]
    per_token = d_pooled[..., :-1, :] / number[:, None, :-1, None].clamp(min=1)
    total: Tensor | None = None
    for level in reversed(range(len(children))):
        own = per_token[..., rows[level] : rows[level] + len(children[level]), :]
        total = own if total is None else own + total[..., places[level + 1] // block, :]
    assert total is not None
    return total.contiguous()
