"""Gradients of the attention of ``block_sparse_triton.py``, in two Triton kernels over a plan and its transpose.

Deterministic: no two programs write to the same location.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..launch import (
    box_descriptors,
    cdiv,
    check_contiguous,
    empty_rows,
    has_large_shared_memory,
    next_pow2_min16,
    next_power_of_2,
)
from .backward_kernel import block_sparse_bwd_dkv_kernel, block_sparse_bwd_dq_kernel, preprocess_bwd_kernel
from .forward import check_inputs, check_plan, cost_mode, log2_scale
from .plan import BlockPlan

__all__ = ["Gradients", "block_sparse_attention_backward", "lse_and_delta"]


class Gradients(NamedTuple):
    """Gradients of query, key, value, of the pooled keys and values if there are any, and (D,) float32 of the bias if
    there is one."""

    query: Tensor
    key: Tensor
    value: Tensor
    pooled_key: Tensor | None
    pooled_value: Tensor | None
    bias: Tensor | None


class _LaunchConfig(NamedTuple):
    """Launch parameters: rows of the tile held by a program, rows per step of its loop, warps, stages."""

    own: int
    other: int
    num_warps: int
    num_stages: int


def block_sparse_attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    *,
    scale: float,
    before: tuple[int, int] = (0, 0),
    key_mask: Tensor | None = None,
    pooled: tuple[Tensor, Tensor, Tensor | None] | None = None,
    linear_delta: Tensor | None = None,
    bias: Tensor | None = None,
    added: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Gradients:
    """Gradients of :func:`block_sparse_attention`.

    Args:
        grad: (B, H, Sq, D) gradient of the output.
        out, lse: outputs of the forward pass.
        query, key, value, plan, scale, before, key_mask, pooled: as there.
        linear_delta: (B, H, Sq) float32, the part of Σ grad · out over the head dim due to the linear branch; None = 0.
        bias: (D,) added to ``out`` at grid queries, besides softmax and linear branch; None = 0.
        added: other gradients of query, key and value, in rows as returned by :func:`empty_rows`; the gradients of grid
            tokens are added to them (rows of global tokens are overwritten).
    Returns: gradients in the dtypes of their tensors; those of masked keys are 0.
    """
    check_inputs(query)
    check_plan(plan, pooled and pooled[2])
    if added and added[1].stride() != added[2].stride():
        raise ValueError(
            f"added gradients of key and value must have the same strides, got {added[1].stride()} and "
            f"{added[2].stride()}: make both by empty_rows"
        )
    query, key, value, grad = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, grad))
    key_mask = key_mask if key_mask is None or key_mask.stride(-1) == 1 else key_mask.contiguous()
    batch, heads, length_q, dim = query.shape
    kv_heads, length_k = key.shape[1:3]
    q, kv, mask = plan.q, plan.kv, plan.mask
    pooled_key, pooled_value, pooled_mask = pooled if pooled else (None, None, None)
    n_pooled = 0 if pooled_key is None else pooled_key.shape[2]
    if pooled_key is not None and pooled_value is not None:
        pooled_key, pooled_value = pooled_key.contiguous(), pooled_value.contiguous()
    d_q, d_k, d_v = added or (empty_rows(x) for x in (query, key, value))
    d_pooled = (None, None) if pooled_key is None else (torch.empty_like(pooled_key), torch.empty_like(pooled_key))
    lse_delta, d_bias = lse_and_delta(grad, out, lse, linear_delta, bias, before[0], q.n_tokens)
    pooled_k, pooled_v = (key, value) if pooled_key is None else (pooled_key, pooled_value)
    n_global_q, n_global_k = length_q - q.n_tokens, length_k - kv.n_tokens
    intervals = mask.intervals if mask else (False,) * 3
    weights = (mask and mask.weights) or (0.0, 0.0, 0.0)
    ordered = mask.ordered if mask else (False,) * 3
    magnitude = log2_scale(scale)
    window = plan.n_full is not None and not plan.all_full
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3])
    common = {
        "D": dim, "BLOCK_D": next_pow2_min16(dim), "QB0": q.box[0], "QB1": q.box[1], "QB2": q.box[2], "KB0": kv.box[0],
        "KB1": kv.box[1], "KB2": kv.box[2], "HAS_KEY_MASK": key_mask is not None, "HAS_WINDOW": window,
        "HAS_GLOBAL_QUERIES": n_global_q > 0, "HAS_POOLED_MASK": pooled_mask is not None, "IN0": intervals[0],
        "IN1": intervals[1], "IN2": intervals[2], "BALL0": bool(weights[0]), "BALL1": bool(weights[1]),
        "BALL2": bool(weights[2]), "COST": cost_mode(mask), "OR0": ordered[0], "OR1": ordered[1], "OR2": ordered[2],
        "HAS_ADD": added is not None, "NEGATE": scale < 0,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    tables, balls, longest = (mask.tables, mask.ball, mask.tables.shape[2]) if mask else (None, None, 0)
    ball = (*weights, mask.limit if mask else 0.0)
    mask_strides = 0 if key_mask is None else key_mask.stride(0), 0 if pooled_mask is None else pooled_mask.stride(0)

    config, keys_config = _launch_configs(query, any(weights))
    block_m, block_n = min(config.own, next_pow2_min16(q.volume)), min(config.other, next_pow2_min16(kv.volume))
    q_parts, k_parts = cdiv(q.volume, block_m), cdiv(kv.volume, block_n)
    n_global_tiles, n_items = cdiv(n_global_q, block_m), q.n_tiles * q_parts
    whole = kv.is_whole and k_parts * block_n == kv.volume and key_mask is None
    fetched = key_mask is None and not any(ordered)
    boxes = box_descriptors(key, value, kv, before[1], block_n) if fetched else None
    block_sparse_bwd_dq_kernel[((n_global_tiles + n_items) * batch * heads,)](
        query, key, value, grad, lse_delta, d_q, key_mask, plan.tiles, plan.n_full, plan.n_tiles, tables, balls,
        pooled_k, pooled_v, pooled_mask, *(boxes[:2] if boxes else (None, None)),
        *strides, *d_q.stride()[:3], mask_strides[0], *pooled_k.stride()[:3], mask_strides[1],
        plan.tiles.stride(0) if plan.tiles.shape[0] > 1 else 0, heads, heads // kv_heads, length_q, length_k, n_pooled,
        *before, batch * heads, n_global_tiles, q.n_tiles, n_items, plan.tiles.shape[2], longest, magnitude, scale,
        *ball, *q.grid, *kv.grid, BM=block_m, BN=block_n, Q_PARTS=q_parts, K_PARTS=k_parts, WHOLE=whole,
        HAS_GLOBAL_KEYS=n_global_k > 0, HAS_POOLED=pooled is not None, BOXES=boxes[2] if boxes else 0,
        num_warps=config.num_warps, num_stages=config.num_stages, **common,
    )  # fmt: skip

    lists = plan.transposed
    block_n, block_m = (
        min(keys_config.own, next_pow2_min16(kv.volume)),
        min(keys_config.other, next_pow2_min16(q.volume)),
    )
    q_parts, k_parts = cdiv(q.volume, block_m), cdiv(kv.volume, block_n)
    n_global_tiles, n_pooled_tiles = cdiv(n_global_k, block_n), cdiv(n_pooled, block_n)
    n_items = kv.n_tiles * k_parts
    fetched = not any(ordered) and grad.dtype == query.dtype
    boxes = box_descriptors(query, grad, q, before[0], block_m) if fetched else None
    d_pooled_k, d_pooled_v = (d_k, d_v) if d_pooled[0] is None else d_pooled
    assert d_pooled_k is not None
    block_sparse_bwd_dkv_kernel[((n_global_tiles + n_pooled_tiles + n_items) * batch * kv_heads,)](
        query, key, value, grad, lse_delta, d_k, d_v, key_mask, lists.tiles, lists.first, lists.n_full, lists.n_tiles,
        tables, balls, pooled_k, pooled_v, d_pooled_k, d_pooled_v, pooled_mask, *(boxes[:2] if boxes else (None, None)),
        *strides, *d_k.stride()[:3], mask_strides[0], *pooled_k.stride()[:3],
        *d_pooled_k.stride()[:3], mask_strides[1], lists.tiles.stride(0) if lists.tiles.shape[0] > 1 else 0, kv_heads,
        heads // kv_heads, length_q, length_k, n_pooled, *before, batch * kv_heads, n_global_tiles, n_pooled_tiles,
        kv.n_tiles, n_items, longest, magnitude, scale, *ball, *q.grid, *kv.grid, BM=block_m, BN=block_n,
        Q_PARTS=q_parts, K_PARTS=k_parts, BOXES=boxes[2] if boxes else 0,
        num_warps=keys_config.num_warps, num_stages=keys_config.num_stages, **common,
    )  # fmt: skip
    return Gradients(d_q, d_k, d_v, d_pooled[0], d_pooled[1], d_bias)


def lse_and_delta(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    linear_delta: Tensor | None = None,
    bias: Tensor | None = None,
    before: int = 0,
    n_grid: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Preprocess the rows of the backward pass.

    Returns: (B, H, S, 2) float32: per row the log-sum-exp in units of log2, +inf for a row without a visible key so
        that its weights are 0, and delta = Σ grad · out over the head dim, less linear_delta and, in the n_grid rows
        after the first ``before``, less the bias's part; and the gradient of the bias.
    """
    batch, heads, length, dim = grad.shape
    check_contiguous(lse=lse, linear_delta=linear_delta)
    out = out if out.stride(-1) == 1 else out.contiguous()
    lse_delta = torch.empty(batch, heads, length, 2, dtype=torch.float32, device=grad.device)
    block_m = 64
    n_programs = batch * heads * cdiv(length, block_m)
    d_bias = None if bias is None else torch.empty(n_programs, dim, dtype=torch.float32, device=grad.device)
    preprocess_bwd_kernel[(n_programs,)](
        grad, out, lse, linear_delta, None if bias is None else bias.contiguous(), lse_delta, d_bias,
        *grad.stride()[:3], *out.stride()[:3], heads, length, before, n_grid, D=dim,
        HAS_LINEAR_DELTA=linear_delta is not None, HAS_BIAS=bias is not None, BLOCK_M=block_m,
        BLOCK_D=next_power_of_2(dim), num_warps=4,
    )  # fmt: skip
    return lse_delta, None if d_bias is None else d_bias.sum(0)


def _launch_configs(query: Tensor, has_ball: bool) -> tuple[_LaunchConfig, _LaunchConfig]:
    """Launch parameters of the dQ and the dK/dV kernel: the fastest on an H100 of those that fit the shared memory and
    registers of each class of GPU."""
    dim, half = query.shape[-1], query.element_size() == 2
    if half and dim <= 128 and has_large_shared_memory(query):
        return _LaunchConfig(128, 64, 8, 2) if has_ball else _LaunchConfig(64, 64, 4, 2), _LaunchConfig(64, 64, 4, 2)
    if half:
        config = _LaunchConfig(64, 32, 4, 2) if dim <= 128 else _LaunchConfig(32, 32, 4, 1)
    elif dim <= 128:  # with 4 warps Triton 3.6 gave wrong sums for keys under a padding mask at D 128 (H100)
        config = _LaunchConfig(32, 32, 8, 1)
    else:
        config = _LaunchConfig(16, 16, 4, 1)
    return config, config
