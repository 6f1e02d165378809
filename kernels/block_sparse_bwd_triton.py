"""Gradients of the attention of ``block_sparse_triton.py``, in two Triton kernels over a plan and its transpose.

Deterministic: no two programs write to the same location.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .block_plan import BlockPlan
from .block_sparse_bwd_triton_kernel import (
    block_sparse_bwd_dkv_kernel,
    block_sparse_bwd_dq_kernel,
    statistics_bwd_kernel,
)
from .block_sparse_triton import check_inputs, check_plan, cost_mode, log2_scale
from .launch import (
    box_descriptors,
    cdiv,
    check_contiguous,
    empty_rows,
    has_large_shared_memory,
    next_pow2_min16,
    next_power_of_2,
)

__all__ = ["Gradients", "block_sparse_attention_backward", "row_statistics"]


class Gradients(NamedTuple):
    """Gradients of query, key, value, of the pooled keys and values if there are any, and (D,) float32 of the bias if
    there is one."""

    query: Tensor
    key: Tensor
    value: Tensor
    extra_key: Tensor | None
    extra_value: Tensor | None
    bias: Tensor | None


class _Build(NamedTuple):
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
    real: Tensor | None = None,
    extra: tuple[Tensor, Tensor, Tensor | None] | None = None,
    share: Tensor | None = None,
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
    check_plan(plan, extra and extra[2])
    if added:
        check_contiguous(**{f"added[{i}]": x.transpose(1, 2) for i, x in enumerate(added)})
    query, key, value, grad = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, grad))
    real = real if real is None or real.stride(-1) == 1 else real.contiguous()
    batch, heads, length_q, dim = query.shape
    kv_heads, length_k = key.shape[1:3]
    q, kv, mask = plan.q, plan.kv, plan.mask
    extra_k, extra_v, real2 = extra if extra else (None, None, None)
    length_2 = 0 if extra_k is None else extra_k.shape[2]
    if extra_k is not None and extra_v is not None:
        extra_k, extra_v = extra_k.contiguous(), extra_v.contiguous()
    d_q, d_k, d_v = added or (empty_rows(x) for x in (query, key, value))
    d_extra = (None, None) if extra_k is None else (torch.empty_like(extra_k), torch.empty_like(extra_k))
    statistics, d_bias = row_statistics(grad, out, lse, share, bias, before[0], q.n_tokens)
    k2, v2 = (key, value) if extra_k is None else (extra_k, extra_v)
    n_text_q, n_text_k = length_q - q.n_tokens, length_k - kv.n_tokens
    intervals = mask.intervals if mask else (False,) * 3
    weights = (mask and mask.weights) or (0.0, 0.0, 0.0)
    ordered = mask.ordered if mask else (False,) * 3
    magnitude = log2_scale(scale)
    window = plan.n_full is not None and not plan.all_full
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3])
    common = {
        "D": dim, "BLOCK_D": next_pow2_min16(dim), "QB0": q.box[0], "QB1": q.box[1], "QB2": q.box[2], "KB0": kv.box[0],
        "KB1": kv.box[1], "KB2": kv.box[2], "HAS_REAL": real is not None, "HAS_WINDOW": window,
        "HAS_TEXT_QUERIES": n_text_q > 0, "HAS_REAL2": real2 is not None, "IN0": intervals[0], "IN1": intervals[1],
        "IN2": intervals[2], "BALL0": bool(weights[0]), "BALL1": bool(weights[1]), "BALL2": bool(weights[2]),
        "COST": cost_mode(mask), "OR0": ordered[0], "OR1": ordered[1], "OR2": ordered[2], "HAS_ADD": added is not None,
        "NEGATE": scale < 0, "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    tables, balls, longest = (mask.tables, mask.ball, mask.tables.shape[2]) if mask else (None, None, 0)
    ball = (*weights, mask.limit if mask else 0.0)
    mask_strides = 0 if real is None else real.stride(0), 0 if real2 is None else real2.stride(0)

    build, keys_build = _builds(query, any(weights))
    block_m, block_n = min(build.own, next_pow2_min16(q.volume)), min(build.other, next_pow2_min16(kv.volume))
    q_parts, k_parts = cdiv(q.volume, block_m), cdiv(kv.volume, block_n)
    n_text_tiles, n_items = cdiv(n_text_q, block_m), q.n_tiles * q_parts
    whole = kv.is_whole and k_parts * block_n == kv.volume and real is None
    fetched = real is None and not any(ordered)
    boxes = box_descriptors(key, value, kv, before[1], block_n) if fetched else None
    block_sparse_bwd_dq_kernel[((n_text_tiles + n_items) * batch * heads,)](
        query, key, value, grad, statistics, d_q, real, plan.tiles, plan.n_full, plan.n_tiles, tables, balls, k2, v2,
        real2, *(boxes[:2] if boxes else (None, None)),
        *strides, *d_q.stride()[:3], mask_strides[0], *k2.stride()[:3], mask_strides[1],
        plan.tiles.stride(0) if plan.tiles.shape[0] > 1 else 0, heads, heads // kv_heads, length_q, length_k, length_2,
        *before, batch * heads, n_text_tiles, q.n_tiles, n_items, plan.tiles.shape[2], longest, magnitude, scale, *ball,
        *q.grid, *kv.grid, BM=block_m, BN=block_n, Q_PARTS=q_parts, K_PARTS=k_parts, WHOLE=whole,
        HAS_TEXT_KEYS=n_text_k > 0, HAS_EXTRA=extra is not None, BOXES=boxes[2] if boxes else 0,
        num_warps=build.num_warps, num_stages=build.num_stages, **common,
    )  # fmt: skip

    lists = plan.transposed
    block_n, block_m = min(keys_build.own, next_pow2_min16(kv.volume)), min(keys_build.other, next_pow2_min16(q.volume))
    q_parts, k_parts = cdiv(q.volume, block_m), cdiv(kv.volume, block_n)
    n_text_tiles, n_extra_tiles = cdiv(n_text_k, block_n), cdiv(length_2, block_n)
    n_items = kv.n_tiles * k_parts
    fetched = not any(ordered) and grad.dtype == query.dtype
    boxes = box_descriptors(query, grad, q, before[0], block_m) if fetched else None
    d_k2, d_v2 = (d_k, d_v) if d_extra[0] is None else d_extra
    assert d_k2 is not None
    block_sparse_bwd_dkv_kernel[((n_text_tiles + n_extra_tiles + n_items) * batch * kv_heads,)](
        query, key, value, grad, statistics, d_k, d_v, real, lists.tiles, lists.first, lists.n_full, lists.n_tiles,
        tables, balls, k2, v2, d_k2, d_v2, real2, *(boxes[:2] if boxes else (None, None)),
        *strides, *d_k.stride()[:3], mask_strides[0], *k2.stride()[:3],
        *d_k2.stride()[:3], mask_strides[1], lists.tiles.stride(0) if lists.tiles.shape[0] > 1 else 0, kv_heads,
        heads // kv_heads, length_q, length_k, length_2, *before, batch * kv_heads, n_text_tiles, n_extra_tiles,
        kv.n_tiles, n_items, longest, magnitude, scale, *ball, *q.grid, *kv.grid, BM=block_m, BN=block_n,
        Q_PARTS=q_parts, K_PARTS=k_parts, BOXES=boxes[2] if boxes else 0,
        num_warps=keys_build.num_warps, num_stages=keys_build.num_stages, **common,
    )  # fmt: skip
    return Gradients(d_q, d_k, d_v, d_extra[0], d_extra[1], d_bias)


def row_statistics(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    share: Tensor | None = None,
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
    check_contiguous(lse=lse, share=share)
    out = out if out.stride(-1) == 1 else out.contiguous()
    statistics = torch.empty(batch, heads, length, 2, dtype=torch.float32, device=grad.device)
    block_m = 64
    n_programs = batch * heads * cdiv(length, block_m)
    d_bias = None if bias is None else torch.empty(n_programs, dim, dtype=torch.float32, device=grad.device)
    statistics_bwd_kernel[(n_programs,)](
        grad, out, lse, share, None if bias is None else bias.contiguous(), statistics, d_bias, *grad.stride()[:3],
        *out.stride()[:3], heads, length, before, n_grid, D=dim, HAS_SHARE=share is not None, HAS_BIAS=bias is not None,
        BLOCK_M=block_m, BLOCK_D=next_power_of_2(dim), num_warps=4,
    )  # fmt: skip
    return statistics, None if d_bias is None else d_bias.sum(0)


def _builds(query: Tensor, has_ball: bool) -> tuple[_Build, _Build]:
    """Launch parameters of the dQ and the dK/dV kernel: the fastest on an H100 of those that fit the shared memory and
    registers of each class of GPU."""
    dim, half = query.shape[-1], query.element_size() == 2
    if half and dim <= 128 and has_large_shared_memory(query):
        return _Build(128, 64, 8, 2) if has_ball else _Build(64, 64, 4, 2), _Build(64, 64, 4, 2)
    if half:
        build = _Build(64, 32, 4, 2) if dim <= 128 else _Build(32, 32, 4, 1)
    elif dim <= 128:  # with 4 warps Triton 3.6 gave wrong sums for keys under a padding mask at D 128 (H100)
        build = _Build(32, 32, 8, 1)
    else:
        build = _Build(16, 16, 4, 1)
    return build, build
