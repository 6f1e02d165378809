"""Gradients of SLA's linear branch, in Triton. [SLA, arXiv 2509.24006, eq. 5-7 and their derivatives]

Gradients of the queries and of the projection are computed per row; gradients of keys and values are computed from the
gradients of the sums A and z.

With the sums A = Σ φ(k)ᵀ v and z = Σ φ(k) of ``forward.py`` without the projection, u = φ(q) A / t with
t = φ(q)·z + eps, and g = dO W: dW = dOᵀ u, dA = Σ φ(q)ᵀ g / t, dz = -Σ φ(q) g·u / t.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import Tokens, mask_of, rows_of
from ..launch import cdiv, check_contiguous, empty_rows, next_pow2_min16
from ..tiling import Tiling
from .arguments import OfQueries, Static
from .backward_kernel import linear_rows_bwd_kernel
from .forward import EPSILON, LinearState, block_states, linear_state, marginal_states

__all__ = ["LinearGradients", "linear_backward"]


class LinearGradients(NamedTuple):
    """Gradients of query, key and value (set for grid tokens only) and of the projection, and the linear branch's part
    of Σ dO O over the head dim, (B, H, S) float32."""

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    delta: Tensor


def linear_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sums: LinearState,
    weight: Tensor,
    feature_map: str,
    q_tiling: Tiling,
    k_tiling: Tiling,
    before: int,
    key_mask: Tensor | None = None,
    marginal: Tensor | None = None,
    n_marginal: int = 1,
) -> LinearGradients:
    """Gradients of φ(q) A Wᵀ / t at the grid queries.

    Args:
        grad: (B, H, S, D) gradient of the output, 0 in rows without a valid key.
        query, key, value: (B, H, S, D).
        sums: the means A and z without the projection: over all keys (:func:`linear_state`), or over the marginal
            blocks of each query tile (:func:`marginal_linear_state`).
        weight: (D, D).
        q_tiling, k_tiling: tilings of queries and of keys.
        before, key_mask: as in :func:`linear_state`.
        marginal, n_marginal: as in :func:`marginal_linear_state`; None = the sums are over all keys.
    """
    batch, heads, length, dim = query.shape
    n_grid = q_tiling.n_tokens
    by_row = grad.transpose(1, 2)
    g = (by_row @ weight.to(grad.dtype)).transpose(1, 2)
    d_query, product = empty_rows(query), empty_rows(query)
    # the divisor may be as small as eps: float16 overflows for the quotient and for dA, which is summed from it
    wide = torch.float32 if query.dtype == torch.float16 else query.dtype
    quotient = empty_rows(query, wide)
    d_total, delta = torch.zeros(2, batch, heads, length, device=query.device)
    state, norm = sums.state.flatten(0, -3), sums.norm.flatten(0, -2)
    of_queries = OfQueries(sums.eps, quotient, d_total, delta)
    _launch_rows(query, g, state, norm, d_query, product, feature_map, q_tiling, before, None, of_queries)
    for rows in (slice(0, before), slice(before + n_grid, length)):
        if rows.start < rows.stop:
            product[:, :, rows] = 0
    d_weight = by_row.reshape(-1, dim).mT @ product.transpose(1, 2).reshape(-1, dim)
    if marginal is None:  # means over all grid tokens; the forward's are over the valid ones
        d_sums = linear_state(query, quotient, before, n_grid, feature_map, None, norm_weights=d_total)
        more = (sums.eps * (n_grid / EPSILON)).view(batch, heads, 1)
        state, norm = (d_sums.state * more[..., None]).to(wide), d_sums.norm * more
    else:
        states, norms = block_states(query, quotient, q_tiling, before, feature_map, None, wide, norm_weights=d_total)
        count = n_marginal * k_tiling.volume / q_tiling.volume
        turned = marginal.mT[:, : k_tiling.n_tiles].to(wide)
        state, norm, _ = marginal_states(turned, states, norms, q_tiling.volume, count)
    d_key, d_value = empty_rows(key), empty_rows(value)
    state, norm = state.flatten(0, -3), norm.flatten(0, -2)
    of_keys = OfQueries(None, None, None, None)
    _launch_rows(key, value, state, norm, d_key, d_value, feature_map, k_tiling, before, key_mask, of_keys)
    return LinearGradients(d_query, d_key, d_value, d_weight, delta)


def _launch_rows(
    x: Tensor,
    y: Tensor,
    state: Tensor,
    norm: Tensor,
    d_x: Tensor,
    product: Tensor,
    feature_map: str,
    tiling: Tiling,
    before: int,
    key_mask: Tensor | None,
    of_queries: OfQueries,
) -> None:
    """Launch the kernel for queries or for keys; see there. state: (B*H or B*H*tiles, D, D)."""
    batch, heads, length, dim = x.shape
    x, y = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, y))
    check_contiguous(eps=of_queries.eps, d_total=of_queries.d_total, delta=of_queries.delta)
    block_n, block_e, num_warps = _rows_config(dim, max(x.element_size(), state.element_size()))
    block_d, block_n = next_pow2_min16(dim), min(block_n, next_pow2_min16(tiling.volume))
    static = Static(
        D=dim, BLOCK_D=block_d, BLOCK_E=min(block_d, block_e), BLOCK_N=block_n, BOX=tiling.box,
        PARTS=cdiv(tiling.volume, block_n), FEATURE_MAP=feature_map, BY_TILE=len(state) > batch * heads,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    linear_rows_bwd_kernel[(batch * heads * tiling.n_tiles * static.PARTS,)](
        rows_of(x), rows_of(y), state.contiguous(), norm.contiguous(), rows_of(d_x), product, of_queries,
        mask_of(key_mask), heads, tiling.n_tiles, Tokens(length, before, *tiling.grid), S=static, num_warps=num_warps,
        num_stages=1,
    )  # fmt: skip


def _rows_config(dim: int, itemsize: int) -> tuple[int, int, int]:
    """Launch parameters: rows per program, columns per step, warps."""
    if itemsize == 2:
        return (64, 128, 4) if dim <= 128 else (32, 64, 4)
    return 32, 32, 4
