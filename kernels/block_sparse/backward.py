"""Gradients of the attention of ``block_sparse/forward.py``, in two Triton kernels over a plan and its transpose.

Deterministic: no two programs write to the same location.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import mask_of, rows_of
from ..launch import (
    box_descriptors,
    cdiv,
    check_contiguous,
    empty_rows,
    has_large_shared_memory,
    next_pow2_min16,
    next_power_of_2,
)
from .arguments import FullTiles, lists_of, pooled_of, static_of, tokens_of, window_of
from .backward_kernel import block_sparse_bwd_dkv_kernel, block_sparse_bwd_dq_kernel, preprocess_bwd_kernel
from .forward import check_inputs, check_plan, log2_scale
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
    batch, heads, length_q, _ = query.shape
    kv_heads, length_k = key.shape[1:3]
    q, kv = plan.q, plan.kv
    pooled_key, pooled_value, pooled_mask = pooled if pooled else (None, None, None)
    n_pooled = 0 if pooled_key is None else pooled_key.shape[2]
    if pooled_key is not None and pooled_value is not None:
        pooled_key, pooled_value = pooled_key.contiguous(), pooled_value.contiguous()
    d_q, d_k, d_v = added or (empty_rows(x) for x in (query, key, value))
    d_pooled = (None, None) if pooled_key is None else (torch.empty_like(pooled_key), torch.empty_like(pooled_key))
    lse_delta, d_bias = lse_and_delta(grad, out, lse, linear_delta, bias, before[0], q.n_tokens)
    n_global = length_q - q.n_tokens, length_k - kv.n_tokens
    counted = plan.full_kv_counts is not None and not plan.all_full
    full: FullTiles = "counted" if counted else "all"
    window, pooled_keys = window_of(plan.mask), pooled_of(pooled_key, pooled_value, pooled_mask)
    inputs = rows_of(query), rows_of(key), rows_of(value), rows_of(grad), lse_delta
    sizes = tokens_of(length_q, before[0], q), tokens_of(length_k, before[1], kv)
    scales = log2_scale(scale), scale
    ordered = plan.mask is not None and any(plan.mask.ordered)
    static = partial(static_of, query, plan, scale=scale, full=full, n_global=n_global, add=added is not None)

    config, keys_config = _launch_configs(query, plan.mask is not None and plan.mask.weights is not None)
    block_m, block_n = min(config.own, next_pow2_min16(q.volume)), min(config.other, next_pow2_min16(kv.volume))
    boxes = box_descriptors(key, value, kv, before[1], block_n) if key_mask is None and not ordered else None
    whole = kv.is_whole and kv.volume % block_n == 0 and key_mask is None
    n_items = cdiv(n_global[0], block_m) + q.n_tiles * cdiv(q.volume, block_m)
    block_sparse_bwd_dq_kernel[(n_items * batch * heads,)](
        *inputs, rows_of(d_q), mask_of(key_mask), lists_of(plan), window, *pooled_keys,
        *(boxes[:2] if boxes else (None, None)), *sizes, batch * heads, heads, heads // kv_heads, *scales,
        S=static(block_m, block_n, whole=whole, boxes=boxes), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip

    block_n = min(keys_config.own, next_pow2_min16(kv.volume))
    block_m = min(keys_config.other, next_pow2_min16(q.volume))
    fetched = not ordered and grad.dtype == query.dtype
    boxes = box_descriptors(query, grad, q, before[0], block_m) if fetched else None
    n_items = cdiv(n_global[1], block_n) + cdiv(n_pooled, block_n) + kv.n_tiles * cdiv(kv.volume, block_n)
    block_sparse_bwd_dkv_kernel[(n_items * batch * kv_heads,)](
        *inputs, rows_of(d_k), rows_of(d_v), mask_of(key_mask), lists_of(plan.transposed), window, *pooled_keys,
        rows_of(d_pooled[0]), rows_of(d_pooled[1]), *(boxes[:2] if boxes else (None, None)), *sizes, batch * kv_heads,
        heads, heads // kv_heads, *scales, S=static(block_m, block_n, whole=False, boxes=boxes),
        num_warps=keys_config.num_warps, num_stages=keys_config.num_stages,
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
        rows_of(grad), rows_of(out), lse, linear_delta, None if bias is None else bias.contiguous(), lse_delta, d_bias,
        heads, length, before, n_grid, D=dim, BLOCK_M=block_m, BLOCK_D=next_power_of_2(dim), num_warps=4,
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
