"""Gradients of LLSA's attention, in Triton: dQ by looping over keys, dK and dV by looping over the queries that list a
key block, and gradients of pooled tokens propagated down to the tokens that they cover. [LLSA, arXiv 2512.16615]

Deterministic: no two programs write to the same location. The selection has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..block_sparse.backward import lse_and_delta
from ..block_sparse.forward import LOG2E, check_inputs
from ..block_sparse.plan import transpose_block_lists
from ..launch import cdiv, check_contiguous, empty_rows, has_large_shared_memory, next_pow2_min16
from .backward_kernel import llsa_coarse_bwd_dq_kernel, llsa_dkv_kernel, llsa_fine_bwd_dq_kernel
from .forward import LaunchConfig, Pooled, check_tree

__all__ = ["llsa_blocks_attention_backward"]

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
    before: int
    n_grid: int
    children: Sequence[Tensor]
    configs: _LaunchConfigs

    @property
    def precision(self) -> str:
        return "ieee" if self.query.dtype == torch.float32 else "tf32"


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
    call = _Call(grad, query, lse_and_delta(grad, out, lse)[0], scale, before, n_grid, children, configs)
    d_query = _queries(call, key, value, kept[0], pooled, key_mask)
    above = None
    if pooled is not None:
        assert number is not None
        above = _spread(_pooled(call, kept, places, pooled, rows, whole), number, children, places, rows)
    d_key, d_value = empty_rows(key), empty_rows(value)
    n_global = length - n_grid
    tokens = _Keys(key, value, d_key[None], d_value[None], key_mask, None)
    n_blocks = len(children[0])
    _launch_dkv(
        call, tokens, configs.tokens, n_blocks, table=children[0], first_key=before,
        lists=_transpose_lists(kept[0], n_blocks, whole), above=above, n_rows=n_global, row_cut=before, row_skip=n_grid,
    )  # fmt: skip
    if n_global:
        _interval_gradients(call, tokens, n_global, (before, n_grid), length, (0, 0))
    return d_query, d_key, d_value


def _queries(
    call: _Call, key: Tensor, value: Tensor, kept: Tensor, pooled: Pooled | None, key_mask: Tensor | None
) -> Tensor:
    query, grad, children = call.query, call.grad, call.children
    batch, heads, length, dim = query.shape
    d_query = empty_rows(query)
    n_blocks, block = children[0].shape
    strides = [s for x in (query, key, value, grad, d_query) for s in x.stride()[:3]]
    strides.append(0 if key_mask is None else key_mask.stride(0))
    given = (query, key, value, grad, call.lse_delta, d_query, key_mask)
    scales = (call.scale * LOG2E, call.scale)
    common: dict[str, Any] = {
        "D": dim, "BLOCK_D": next_pow2_min16(dim), "BLOCK": block, "HAS_KEY_MASK": key_mask is not None,
        "PRECISION": call.precision,
    }  # fmt: skip
    n_global, has_coarse = length - call.n_grid, pooled is not None or length > call.n_grid
    if has_coarse:
        indices = None if pooled is None else pooled.indices
        n_slots, n_nodes = (n_blocks * block, 1) if indices is None else (block * block, indices.shape[1])
        config = call.configs.coarse
        block_q = min(config.block_q, next_pow2_min16(n_slots))
        n_global_tiles, n_items = cdiv(n_global, block_q), n_nodes * cdiv(n_slots, block_q)
        weight = pooled.weight if pooled else None
        llsa_coarse_bwd_dq_kernel[((n_global_tiles + n_items) * batch * heads,)](
            *given, *((pooled.keys, pooled.values) if pooled else (None, None)), weight, indices, children[0],
            None if indices is None else children[1], *strides,
            0 if weight is None or len(weight) == 1 else weight.stride(0),
            heads, length, call.before, call.n_grid, pooled.keys.shape[1] if pooled else 0, pooled.top if pooled else 0,
            0 if indices is None else indices.shape[2], n_nodes, n_slots, batch * heads, n_global_tiles, n_items,
            *scales, BM=block_q, BN=config.block_k, HAS_NODES=indices is not None, HAS_POOLED=pooled is not None,
            HAS_GLOBAL=n_global > 0, num_warps=config.num_warps, num_stages=config.num_stages, **common,
        )  # fmt: skip
    config = call.configs.fine
    block_q = min(config.block_q, next_pow2_min16(block))
    llsa_fine_bwd_dq_kernel[(batch * heads * n_blocks * cdiv(block, block_q),)](
        *given, kept, children[0], *strides, heads, n_blocks, length, call.before, *scales,
        BM=block_q, BN=min(config.block_k, next_pow2_min16(kept.shape[2] * block)), N_KEPT=kept.shape[2],
        HAS_COARSE=has_coarse,
        num_warps=config.num_warps, num_stages=config.num_stages, **common,
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
        lists = _transpose_lists(kept[level] if ancestor is None else kept[level][:, ancestor], n, whole)
        _launch_dkv(
            call, keys, call.configs.pooled, n, table=call.children[level], first_key=rows[level - 1], lists=lists,
            nodes=True,
        )  # fmt: skip
    n_top = len(call.children[-1])
    _interval_gradients(call, keys, n_top, (0, pooled.top), call.n_grid, (0, call.before))
    return d_pooled[:, 0]


def _transpose_lists(kept: Tensor, n: int, whole: bool) -> tuple[Tensor, Tensor]:
    """Rows that kept each of n tokens; see :func:`transpose_block_lists`."""
    return transpose_block_lists(kept if whole else torch.where(kept < 0, n, kept), n)


def _interval_gradients(
    call: _Call, keys: _Keys, n_keys: int, key_interval: tuple[int, int], n_rows: int, row_interval: tuple[int, int]
) -> None:
    """Gradients of keys that a whole interval of queries attends to: the interval is split between programs, and their
    sums are added in order. Intervals: (cut, rows to skip from the cut on)."""
    batch, heads, _, dim = call.query.shape
    config = call.configs.interval
    n_tiles = cdiv(n_keys, config.block_k)
    n_splits = max(1, min(cdiv(n_rows, 1024), PROGRAMS // (n_tiles * batch * heads)))
    split_rows = cdiv(cdiv(n_rows, n_splits), config.block_q) * config.block_q
    n_splits = cdiv(n_rows, split_rows)
    parts = torch.empty(2, n_splits, batch, heads, n_keys, dim, dtype=torch.float32, device=call.query.device)
    cut, skip = key_interval
    _launch_dkv(
        call, keys._replace(d_key=parts[0], d_value=parts[1]), config, n_tiles, n_keys=n_keys,
        key_interval=key_interval, n_rows=n_rows, row_cut=row_interval[0], row_skip=row_interval[1],
        split_rows=split_rows,
    )  # fmt: skip
    for to, total in zip((keys.d_key, keys.d_value), parts.sum(1).to(keys.d_key.dtype), strict=True):
        if cut:
            to[0][:, :, :cut] = total[:, :, :cut]
        to[0][:, :, cut + skip : skip + n_keys] = total[:, :, cut:]


def _launch_dkv(
    call: _Call,
    keys: _Keys,
    config: LaunchConfig,
    n_tiles: int,
    *,
    table: Tensor | None = None,
    first_key: int = 0,
    lists: tuple[Tensor, Tensor] | None = None,
    nodes: bool = False,
    above: Tensor | None = None,
    n_keys: int = 0,
    key_interval: tuple[int, int] = (0, 0),
    n_rows: int = 0,
    row_cut: int = 0,
    row_skip: int = 0,
    split_rows: int | None = None,
) -> None:
    """Launch the dK/dV kernel; see there."""
    query, grad, children = call.query, call.grad, call.children
    batch, heads, length, dim = query.shape
    block = children[0].shape[1]
    block_k = min(config.block_k, next_pow2_min16(block)) if table is not None else config.block_k
    parts = cdiv(block, block_k) if table is not None else 1
    n_splits = len(keys.d_key)
    split_rows = max(1, n_rows) if split_rows is None else split_rows
    strides = [s for x in (query, keys.key, keys.value, grad) for s in x.stride()[:3]]
    d_strides = keys.d_key.stride()[:4]
    weight, key_mask = keys.weight, keys.key_mask
    llsa_dkv_kernel[(n_tiles * parts * batch * heads * n_splits,)](
        query, keys.key, keys.value, grad, call.lse_delta, key_mask, weight, *(lists or (None, None)), table,
        children[0], children[1] if nodes else None, *((None, None) if above is None else above), keys.d_key,
        keys.d_value, *strides, *d_strides, 0 if key_mask is None else key_mask.stride(0),
        0 if weight is None or len(weight) == 1 else weight.stride(0), lists[0].stride(0) if lists else 0,
        heads, batch * heads, length, n_tiles, n_keys, first_key, *key_interval, n_rows, row_cut, row_skip,
        split_rows, call.before, call.scale * LOG2E, call.scale, D=dim, BLOCK_D=next_pow2_min16(dim), BK=block_k,
        BN=config.block_q, BLOCK=block, BY_TABLE=table is not None, HAS_LISTS=lists is not None, HAS_NODES=nodes,
        HAS_ROWS=n_rows > 0,
        HAS_WEIGHT=weight is not None, HAS_KEY_MASK=key_mask is not None, HAS_ABOVE=above is not None,
        PRECISION=call.precision, num_warps=config.num_warps, num_stages=config.num_stages,
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
