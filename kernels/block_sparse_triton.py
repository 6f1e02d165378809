# mypy: allow-untyped-defs, allow-incomplete-defs
"""Softmax attention over lists of key tiles, in one Triton kernel: windows, selected blocks, text, pooled tokens.

A sequence is ``[before | grid | after]``. A program takes one box of grid queries through the key boxes of its list,
then through the tokens off the grid and, where there are any, through pooled tokens; the first programs take the
queries off the grid, which see everything. Boxes are fetched from where they lie in the sequence: nothing is permuted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .block_linear_triton import feature
from .block_plan import BlockPlan, WindowMask
from .launch import register_limit
from .tiling_triton import tile_places

__all__ = ["Config", "LinearBranch", "block_sparse_attention", "check_inputs", "tile_volumes"]

HIDDEN = tl.constexpr(float("-inf"))
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634
TINY_SCALE = 1e-30  # stands for 0: -inf times 0 would be NaN
INTERPRETED = triton.knobs.runtime.interpret
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class LinearBranch:
    """What the linear branch adds to a grid query q: φ(q)·state / (φ(q)·norm + eps) + bias.

    state: (G, 1 or q tiles, D, D) in the queries' dtype, projection folded in. norm: (G, 1 or q tiles, D) float32.
    eps: (G,) float32. bias: (D,) or None. G = B*H. state None = the bias alone.
    """

    state: Tensor | None
    norm: Tensor | None
    eps: Tensor | None
    bias: Tensor | None
    feature_map: str


@triton.jit
def _load_rows(x, row, valid, stride, d, D: tl.constexpr, MASKED: tl.constexpr):
    """Rows (n, BLOCK_D) of x; zeros where not valid and past D."""
    p_x = x + row.to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED:
        return tl.load(p_x, mask=valid[:, None] & (d < D)[None, :], other=0.0)
    if d.shape[0] != D:
        return tl.load(p_x, mask=(d < D)[None, :], other=0.0)
    return tl.load(p_x)


@triton.jit
def _logits(q, k, NEGATE: tl.constexpr, PRECISION: tl.constexpr):
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if NEGATE:
        s = -s
    return s


@triton.jit
def _update(acc, m, l, s, v, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax; s are logits without their scale, which is in units of log2 and positive."""
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    shift = m_new
    if MASKED:  # a row that has seen no key yet must not give -inf - -inf
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * scale - shift[:, None])
    alpha = tl.exp2(m - shift)
    l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_new, l


@triton.jit
def _run(
    acc, m, l, q, K, V, REAL, row, valid, skr, svr, scale, d,
    D: tl.constexpr, HAS_REAL: tl.constexpr, MASKED: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys at the given rows, seen by every query where they are valid and real."""
    if HAS_REAL:
        valid = valid & (tl.load(REAL + row, mask=valid, other=0) != 0)
    k = _load_rows(K, row, valid, skr, d, D, MASKED)
    v = _load_rows(V, row, valid, svr, d, D, MASKED)
    s = _logits(q, k, NEGATE, PRECISION)
    if MASKED:
        s = tl.where(valid[None, :], s, float("-inf"))
    return _update(acc, m, l, s, v, scale, MASKED, PRECISION)


@triton.jit
def _token(
    TABLES, x0, x1, x2, valid, longest, G1, G2, OR0: tl.constexpr, OR1: tl.constexpr, OR2: tl.constexpr
):  # fmt: skip
    """Raster index of the token at these places; under dilation a table tells the coordinate at a place."""
    if OR0:
        x0 = tl.load(TABLES + x0, mask=valid, other=0)
    if OR1:
        x1 = tl.load(TABLES + 3 * longest + x1, mask=valid, other=0)
    if OR2:
        x2 = tl.load(TABLES + 6 * longest + x2, mask=valid, other=0)
    return tl.where(valid, (x0 * G1 + x1) * G2 + x2, 0)


@triton.jit
def _box(DESC, BOXES: tl.constexpr, b, hk, n_heads, tile, n1, n2, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
         BN: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """(BN, BLOCK_D): a box through a tensor descriptor; zeros off the grid."""
    x1 = tile // n2 % n1 * B1
    x2 = tile % n2 * B2
    if BOXES == 1:
        return DESC.load([b * n_heads + hk, tile // (n1 * n2) * B0, x1, x2, 0]).reshape(BN, BLOCK_D)
    return DESC.load([b, hk, x1, x2, 0]).reshape(BN, BLOCK_D)


@triton.jit
def _query_run(TABLES, axis: tl.constexpr, place, length, longest):
    """Middle and half length of the run of places that queries see along an axis (halves are exact)."""
    first = tl.load(TABLES + (3 * axis + 1) * longest + place, mask=place < length, other=0).to(tl.float32)
    last = tl.load(TABLES + (3 * axis + 2) * longest + place, mask=place < length, other=0).to(tl.float32)
    return (first + last) * 0.5, (last - first) * 0.5


@triton.jit
def _in_ball(
    x0, x1, x2, y0, y1, y2, w0, w1, w2, limit, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, COST: tl.constexpr
):
    """(n, m): whether w·(x - y)² < limit, for keys at x (m,) and queries at y (n,).

    COST 0: the weights are one; the square is multiplied out, x² - 2 x y < limit - y², two operations an axis and
    exact in float32. COST 1 in float32, COST 2 in float64, as it stands.
    """
    if COST == 0:
        near = x1 * 0.0
        left = limit - y1 * 0.0
        if B0:
            near += x0 * x0
            left -= y0 * y0
        if B1:
            near += x1 * x1
            left -= y1 * y1
        if B2:
            near += x2 * x2
            left -= y2 * y2
        cost = near[None, :]
        if B0:
            cost = x0[None, :] * (-2 * y0)[:, None] + cost
        if B1:
            cost = x1[None, :] * (-2 * y1)[:, None] + cost
        if B2:
            cost = x2[None, :] * (-2 * y2)[:, None] + cost
        return cost < left[:, None]
    cost = (x1 * 0.0)[None, :]
    if B0:
        cost = cost + (x0[None, :] - y0[:, None]) * (x0[None, :] - y0[:, None]) * w0
    if B1:
        cost = cost + (x1[None, :] - y1[:, None]) * (x1[None, :] - y1[:, None]) * w1
    if B2:
        cost = cost + (x2[None, :] - y2[:, None]) * (x2[None, :] - y2[:, None]) * w2
    return cost < limit


@triton.jit
def _linear(q, STATE, NORM, EPS, d, D: tl.constexpr, FEATURE_MAP: tl.constexpr, PRECISION: tl.constexpr):
    """(BM, BLOCK_D) φ(q) state / (φ(q)·norm + eps)."""
    phi = feature(q.to(tl.float32), FEATURE_MAP, D)
    norm = tl.load(NORM + d, mask=d < D, other=0.0)
    total = tl.sum(phi * norm[None, :], 1) + tl.load(EPS)
    m_state = (d < D)[:, None] & (d < D)[None, :]
    state = tl.load(STATE + d[:, None] * D + d[None, :], mask=m_state, other=0.0)
    linear = tl.dot(phi.to(state.dtype), state, input_precision=PRECISION)
    return linear / tl.where(total == 0, 1.0, total)[:, None]


@triton.jit
def block_sparse_fwd_kernel(
    Q, K, V, OUT, LSE, REAL, TILES, N_FULL, N_TILES, TABLES, K2, V2, REAL2, STATE, NORM, EPS, BIAS, K_BOXES, V_BOXES,
    sqb, sqh, sqr, skb, skh, skr, svb, svh, svr, sob, soh, sor, srb, s2b, s2h, s2r, sr2,
    list_stride, n_q_heads, group, length_q, length_k, length_2, q_before, k_before,
    n_batch_heads, n_text_tiles, n_q_tiles, n_items, n_list, longest, scale, w0, w1, w2, limit,
    Q0, Q1, Q2, K0, K1, K2_, D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    QB0: tl.constexpr, QB1: tl.constexpr, QB2: tl.constexpr, KB0: tl.constexpr, KB1: tl.constexpr, KB2: tl.constexpr,
    Q_PARTS: tl.constexpr, K_PARTS: tl.constexpr, FULL: tl.constexpr, HAS_REAL: tl.constexpr,
    HAS_PARTIAL: tl.constexpr, HAS_TEXT_QUERIES: tl.constexpr, HAS_TEXT_KEYS: tl.constexpr,
    HAS_EXTRA: tl.constexpr, HAS_REAL2: tl.constexpr, IN0: tl.constexpr, IN1: tl.constexpr, IN2: tl.constexpr,
    BALL0: tl.constexpr, BALL1: tl.constexpr, BALL2: tl.constexpr, COST: tl.constexpr,
    OR0: tl.constexpr, OR1: tl.constexpr, OR2: tl.constexpr, HAS_LSE: tl.constexpr, STATE_MODE: tl.constexpr,
    HAS_BIAS: tl.constexpr, FEATURE_MAP: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
    BOXES: tl.constexpr,
):  # fmt: skip
    # which tile of queries, and whose
    pid = tl.program_id(0)
    if HAS_TEXT_QUERIES:  # they come first: they take longest
        is_text = pid < n_text_tiles * n_batch_heads
        local = tl.where(is_text, pid, pid - n_text_tiles * n_batch_heads)
        per_head = tl.where(is_text, n_text_tiles, n_items)
    else:
        is_text: tl.constexpr = False  # type: ignore[no-redef]
        local = pid
        per_head = n_items
    bh = local // per_head
    item = local % per_head
    b, h = bh // n_q_heads, bh % n_q_heads
    hk = h // group
    Q += b.to(tl.int64) * sqb + h.to(tl.int64) * sqh
    K += b.to(tl.int64) * skb + hk.to(tl.int64) * skh
    V += b.to(tl.int64) * svb + hk.to(tl.int64) * svh
    if HAS_REAL:
        REAL += b.to(tl.int64) * srb

    lane_q = tl.arange(0, BM)
    lane_k = tl.arange(0, BN)
    d = tl.arange(0, BLOCK_D)
    n_grid_q = Q0 * Q1 * Q2
    n_grid_k = K0 * K1 * K2_
    tile_q = item // Q_PARTS
    box_lane = item % Q_PARTS * BM + lane_q
    # (BM,) row of each query in the sequence
    q0, q1, q2, valid_q = tile_places(tile_q, box_lane, Q0, Q1, Q2, QB0, QB1, QB2)
    row_q = q_before + _token(TABLES, q0, q1, q2, valid_q, longest, Q1, Q2, OR0, OR1, OR2)
    if HAS_TEXT_QUERIES:
        off_grid = item * BM + lane_q
        text_row = tl.where(off_grid < q_before, off_grid, off_grid + n_grid_q)
        row_q = tl.where(is_text, text_row, row_q)
        valid_q = tl.where(is_text, text_row < length_q, valid_q)
    q = _load_rows(Q, row_q, valid_q, sqr, d, D, True)
    p_o = OUT + b.to(tl.int64) * sob + h.to(tl.int64) * soh + row_q.to(tl.int64)[:, None] * sor + d[None, :]
    m_o = valid_q[:, None] & (d < D)[None, :]
    if STATE_MODE > 0:  # noqa: SIM102
        if not is_text:  # kept where the output will stand: the registers are needed for the softmax
            which = bh.to(tl.int64)
            if STATE_MODE == 2:
                which = which * n_q_tiles + tile_q
            linear = _linear(q, STATE + which * D * D, NORM + which * D, EPS + bh, d, D, FEATURE_MAP, PRECISION)
            tl.store(p_o, linear.to(OUT.dtype.element_ty), mask=m_o)
            tl.debug_barrier()
    acc = tl.zeros((BM, BLOCK_D), dtype=tl.float32)
    m = tl.full((BM,), float("-inf"), dtype=tl.float32)
    l = tl.zeros((BM,), dtype=tl.float32)

    if is_text:
        n_whole = 0 if HAS_REAL else length_k // BN
        for i in range(n_whole):
            row = i * BN + lane_k
            acc, m, l = _run(
                acc, m, l, q, K, V, REAL, row, row < length_k, skr, svr, scale, d, D, False, False, NEGATE, PRECISION
            )
        for i in tl.range(n_whole, tl.cdiv(length_k, BN), num_stages=1):
            row = i * BN + lane_k
            acc, m, l = _run(
                acc, m, l, q, K, V, REAL, row, row < length_k, skr, svr, scale, d, D, HAS_REAL, True, NEGATE, PRECISION
            )
    else:
        n1 = tl.cdiv(K1, KB1)
        n2 = tl.cdiv(K2_, KB2)
        p_list = TILES + bh.to(tl.int64) * list_stride + tile_q.to(tl.int64) * n_list
        g_list = tl.where(list_stride > 0, bh, 0) * n_q_tiles + tile_q
        n_tiles = tl.load(N_TILES + g_list)
        if FULL == 0:  # none
            n_full = n_tiles * 0
        elif FULL == 1:  # as the plan counts
            n_full = tl.load(N_FULL + g_list)
        elif FULL == 2:  # all
            n_full = n_tiles
        else:  # all but the very last tile of the grid, which can only stand last in an ascending list
            n_full = n_tiles
            if n_tiles > 0:
                n_full = n_tiles - (tl.load(p_list + n_tiles - 1) == tl.cdiv(K0, KB0) * n1 * n2 - 1).to(tl.int32)
        if FULL > 0:
            for i in range(n_full * K_PARTS):
                tile = tl.load(p_list + i // K_PARTS)
                x0, x1, x2, valid = tile_places(tile, i % K_PARTS * BN + lane_k, K0, K1, K2_, KB0, KB1, KB2)
                if BOXES > 0:
                    k = _box(K_BOXES, BOXES, b, hk, n_q_heads // group, tile, n1, n2, KB0, KB1, KB2, BN, BLOCK_D)
                    v = _box(V_BOXES, BOXES, b, hk, n_q_heads // group, tile, n1, n2, KB0, KB1, KB2, BN, BLOCK_D)
                else:
                    row = k_before + _token(TABLES, x0, x1, x2, valid, longest, K1, K2_, OR0, OR1, OR2)
                    k = _load_rows(K, row, valid, skr, d, D, K_PARTS * BN != KB0 * KB1 * KB2)
                    v = _load_rows(V, row, valid, svr, d, D, K_PARTS * BN != KB0 * KB1 * KB2)
                s = _logits(q, k, NEGATE, PRECISION)
                if K_PARTS * BN != KB0 * KB1 * KB2:
                    s = tl.where(valid[None, :], s, float("-inf"))
                acc, m, l = _update(acc, m, l, s, v, scale, K_PARTS > 1, PRECISION)

        if HAS_PARTIAL:
            # (BM,) the middle and half the length of the run that a query sees along each axis
            if IN0:
                middle0, half0 = _query_run(TABLES, 0, q0, Q0, longest)
            if IN1:
                middle1, half1 = _query_run(TABLES, 1, q1, Q1, longest)
            if IN2:
                middle2, half2 = _query_run(TABLES, 2, q2, Q2, longest)
            # small whole numbers, in a type that holds them and their squares: from the first query of the box on
            o0, o1, o2, _ = tile_places(tile_q, 0, Q0, Q1, Q2, QB0, QB1, QB2)
            TYPE: tl.constexpr = tl.float64 if COST == 2 else tl.float32
            y0, y1, y2 = (q0 - o0).to(TYPE), (q1 - o1).to(TYPE), (q2 - o2).to(TYPE)
            for i in range(n_full * K_PARTS, n_tiles * K_PARTS):
                tile = tl.load(p_list + i // K_PARTS)
                part = i % K_PARTS * BN + lane_k
                k0, k1, k2, valid = tile_places(tile, part, K0, K1, K2_, KB0, KB1, KB2)
                row = k_before + _token(TABLES, k0, k1, k2, valid, longest, K1, K2_, OR0, OR1, OR2)
                if HAS_REAL:
                    valid = valid & (tl.load(REAL + row, mask=valid, other=0) != 0)
                if BOXES > 0:
                    k = _box(K_BOXES, BOXES, b, hk, n_q_heads // group, tile, n1, n2, KB0, KB1, KB2, BN, BLOCK_D)
                    v = _box(V_BOXES, BOXES, b, hk, n_q_heads // group, tile, n1, n2, KB0, KB1, KB2, BN, BLOCK_D)
                else:
                    k = _load_rows(K, row, valid, skr, d, D, True)
                    v = _load_rows(V, row, valid, svr, d, D, True)
                s = _logits(q, k, NEGATE, PRECISION)
                s += tl.where(valid, 0.0, float("-inf"))[None, :]
                if IN0:
                    s = tl.where(tl.abs(k0.to(tl.float32)[None, :] - middle0[:, None]) <= half0[:, None], s, HIDDEN)
                if IN1:
                    s = tl.where(tl.abs(k1.to(tl.float32)[None, :] - middle1[:, None]) <= half1[:, None], s, HIDDEN)
                if IN2:
                    s = tl.where(tl.abs(k2.to(tl.float32)[None, :] - middle2[:, None]) <= half2[:, None], s, HIDDEN)
                if BALL0 or BALL1 or BALL2:
                    x0, x1, x2 = (k0 - o0).to(TYPE), (k1 - o1).to(TYPE), (k2 - o2).to(TYPE)
                    s = tl.where(
                        _in_ball(x0, x1, x2, y0, y1, y2, w0, w1, w2, limit, BALL0, BALL1, BALL2, COST), s, HIDDEN
                    )
                acc, m, l = _update(acc, m, l, s, v, scale, True, PRECISION)

        if HAS_TEXT_KEYS:
            n_text = length_k - n_grid_k
            n_whole = 0 if HAS_REAL else n_text // BN
            for i in range(n_whole):
                row = i * BN + lane_k
                row = tl.where(row < k_before, row, row + n_grid_k)
                acc, m, l = _run(
                    acc, m, l, q, K, V, REAL, row, row >= 0, skr, svr, scale, d, D, False, False, NEGATE, PRECISION
                )
            for i in tl.range(n_whole, tl.cdiv(n_text, BN), num_stages=1):
                row = i * BN + lane_k
                valid = row < n_text
                row = tl.where(row < k_before, row, row + n_grid_k)
                acc, m, l = _run(
                    acc, m, l, q, K, V, REAL, row, valid, skr, svr, scale, d, D, HAS_REAL, True, NEGATE, PRECISION
                )
        if HAS_EXTRA:
            K2 += b.to(tl.int64) * s2b + hk.to(tl.int64) * s2h
            V2 += b.to(tl.int64) * s2b + hk.to(tl.int64) * s2h
            if HAS_REAL2:
                REAL2 += b.to(tl.int64) * sr2
            for i in range(tl.cdiv(length_2, BN)):
                row = i * BN + lane_k
                acc, m, l = _run(
                    acc, m, l, q, K2, V2, REAL2, row, row < length_2, s2r, s2r, scale, d, D, HAS_REAL2, True, NEGATE,
                    PRECISION,
                )  # fmt: skip

    o = acc / tl.where(l > 0, l, 1.0)[:, None]
    if STATE_MODE > 0 or HAS_BIAS:  # noqa: SIM102
        if not is_text:
            linear = tl.zeros((BM, BLOCK_D), dtype=tl.float32)
            if STATE_MODE > 0:
                linear += tl.load(p_o, mask=m_o, other=0.0).to(tl.float32)
            if HAS_BIAS:
                linear += tl.load(BIAS + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            o += tl.where(l > 0, 1.0, 0.0)[:, None] * linear
    tl.store(p_o, o.to(OUT.dtype.element_ty), mask=m_o)
    if HAS_LSE:
        tl.store(LSE + bh.to(tl.int64) * length_q + row_q, (m + tl.log2(l)) * LN2, mask=valid_q)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    *,
    scale: float,
    before: tuple[int, int] = (0, 0),
    real: Tensor | None = None,
    extra: tuple[Tensor, Tensor, Tensor | None] | None = None,
    linear: LinearBranch | None = None,
    return_lse: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of each box of grid queries over its list of key boxes and over every key off the grid;
    queries off the grid see every key.

    Args:
        query: (B, H, Sq, D) float16, bfloat16 or float32, D at most 256, any strides.
        key, value: (B, Hk, Sk, D), H a multiple of Hk.
        plan: boxes and lists, on the same device.
        scale: factor on the logits.
        before: tokens in front of the grid, among queries and among keys.
        real: (B, Sk) bool, False hides a key; what lies there is not read.
        extra: more keys and values (B, Hk, P, D) that grid queries see, and which of them are real (B, P) or None.
        linear: the linear branch, added to grid queries.
        return_lse: whether to give the log-sum-exp, too.
        config: how the kernel is built; None = by itself, and on Hopper GPUs with a kernel of their own where it can.
    Returns: (B, H, Sq, D) in query.dtype, dense in the order (B, Sq, H, D); (B, H, Sq) float32 log-sum-exp of the
        softmax part, natural log, -inf where a query sees no key; such a row is 0 in the output.
    Raises: ValueError: a dtype, head dim or device that the kernel does not take.
    """
    check_inputs(query)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    real = real if real is None or real.stride(-1) == 1 else real.contiguous()
    batch, heads, length_q, dim = query.shape
    kv_heads, length_k = key.shape[1:3]
    q, kv, mask = plan.q, plan.kv, plan.mask
    out = torch.empty(batch, length_q, heads, dim, dtype=query.dtype, device=query.device).transpose(1, 2)
    lse = torch.empty(batch, heads, length_q, dtype=torch.float32, device=query.device) if return_lse else None
    if extra:
        extra = (extra[0].contiguous(), extra[1].contiguous(), extra[2])
    full_mode, magnitude = _full_mode(plan, real), max(abs(scale) * LOG2E, TINY_SCALE)
    hopper = None if config else _hopper(query.device)
    if hopper and hopper.takes(query, key, value, plan, scale, real, extra, linear):
        hopper.block_sparse_hopper(
            query, key, value, plan, out, lse, scale=magnitude, before=before, extra=extra and extra[:2], linear=linear,
            full_mode=full_mode,
        )  # fmt: skip
        return out, lse
    config = config or choose_config(query, _kind(plan))
    block_q, block_k = min(config.block_q, _lanes(q.volume)), min(config.block_k, _lanes(kv.volume))
    q_parts, k_parts = triton.cdiv(q.volume, block_q), triton.cdiv(kv.volume, block_k)
    n_text_q, n_text_k = length_q - q.n_tokens, length_k - kv.n_tokens
    n_text_tiles, n_items = triton.cdiv(n_text_q, block_q), q.n_tiles * q_parts
    k2, v2, real2 = extra if extra else (key, value, None)
    ordered = mask.ordered if mask else (False,) * 3
    boxes = None if real is not None else _box_descriptors(key, value, kv, before[1], block_k, config, ordered)
    intervals = mask.intervals if mask else (False,) * 3
    weights = (mask and mask.weights) or (0.0, 0.0, 0.0)
    state = linear.state if linear else None
    bias = linear.bias.contiguous() if linear and linear.bias is not None else None
    block_sparse_fwd_kernel[((n_text_tiles + n_items) * batch * heads,)](
        query, key, value, out, lse, real, plan.tiles, plan.n_full, plan.n_tiles, mask.tables if mask else None,
        k2, v2, real2, state, linear.norm if linear else None, linear.eps if linear else None,
        bias, *(boxes or (None, None)),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        0 if real is None else real.stride(0), *k2.stride()[:3], 0 if real2 is None else real2.stride(0),
        plan.tiles.stride(0) if plan.tiles.shape[0] > 1 else 0, heads, heads // kv_heads, length_q, length_k,
        k2.shape[2], *before, batch * heads, n_text_tiles, q.n_tiles, n_items, plan.tiles.shape[2],
        mask.tables.shape[2] if mask else 0, magnitude, *weights, mask.limit if mask else 0.0,
        *q.grid, *kv.grid, D=dim, BLOCK_D=_lanes(dim), BM=block_q, BN=block_k,
        QB0=q.box[0], QB1=q.box[1], QB2=q.box[2], KB0=kv.box[0], KB1=kv.box[1], KB2=kv.box[2],
        Q_PARTS=q_parts, K_PARTS=k_parts, FULL=full_mode, HAS_REAL=real is not None,
        HAS_PARTIAL=full_mode != 2 and not (full_mode == 1 and plan.all_full), HAS_TEXT_QUERIES=n_text_q > 0,
        HAS_TEXT_KEYS=n_text_k > 0, HAS_EXTRA=extra is not None, HAS_REAL2=real2 is not None,
        IN0=intervals[0], IN1=intervals[1], IN2=intervals[2], BALL0=bool(weights[0]), BALL1=bool(weights[1]),
        BALL2=bool(weights[2]), COST=_cost_mode(mask), OR0=ordered[0], OR1=ordered[1], OR2=ordered[2],
        HAS_LSE=return_lse, STATE_MODE=0 if state is None else 1 + (state.shape[1] > 1),
        HAS_BIAS=bias is not None, FEATURE_MAP=linear.feature_map if linear else "relu",
        NEGATE=scale < 0, PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        BOXES=0 if boxes is None else 1 + (boxes[0].shape[0] != batch * kv_heads),
        num_warps=config.num_warps, num_stages=config.num_stages, **register_limit(query, config.max_registers),
    )  # fmt: skip
    return out, lse


@cache
def _hopper(device: torch.device) -> Any:
    """The module with the kernel for this GPU, or None if it is another GPU or Triton is too old to build it."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        return None
    from . import block_sparse_hopper

    return block_sparse_hopper


def _lanes(n: int) -> int:
    """The least power of two that holds n and that a matrix product takes."""
    return max(16, triton.next_power_of_2(n))


def _cost_mode(mask: WindowMask | None) -> int:
    """How the kernel compares distances with a ball; see `_in_ball`."""
    if mask is None or mask.weights is None or (mask.exact and set(mask.weights) <= {0.0, 1.0}):
        return 0
    return 1 if mask.exact else 2


def _full_mode(plan: BlockPlan, real: Tensor | None) -> int:
    """How the kernel knows which tiles of a list need no mask: 0 none, 1 the plan counts, 2 all, 3 all but the last."""
    if real is not None:
        return 0
    if plan.n_full is not None:
        return 1
    if plan.kv.is_whole:
        return 2
    return 3 if plan.kv.grid[:2] == (1, 1) else 0


def check_inputs(query: Tensor) -> None:
    """Raises: ValueError: a dtype, head dim or device that the kernels do not take."""
    if query.dtype not in DTYPES:
        raise ValueError(f"Triton kernels take float16, bfloat16 and float32, got {query.dtype}: use backend='torch'")
    if query.shape[-1] > 256:
        raise ValueError(f"Triton kernels take head dims up to 256, got {query.shape[-1]}: use backend='torch'")
    if query.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"Triton kernels run on CUDA and ROCm GPUs, got a tensor on {query.device}")


@dataclass(frozen=True)
class Config:
    """How the kernel is built: rows of a tile at most, warps, stages of the pipeline, boxes by tensor descriptor,
    registers a thread at most (so that two programs share a processor)."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    boxes: bool = False
    max_registers: int | None = None


# The fastest of seven each on an H100 (16-bit, D = 128), by how a plan tells what is seen. With 128 registers a thread
# two programs share a processor, and one's softmax overlaps the other's matrix products.
TABLE = {
    "list": Config(128, 64, 8, 3, True, 128),
    "interval": Config(128, 64, 8, 2, True, 128),
    "ball": Config(128, 64, 8, 2, True, 128),
}


def tile_volumes(query: Tensor, kind: str) -> tuple[tuple[int, int], ...]:
    """Tokens of the boxes of queries and keys that suit a head dim, a dtype and a kind of plan; see `TABLE`."""
    if (hopper := _hopper(query.device)) and hopper.suits(query):
        return hopper.VOLUMES
    config = choose_config(query, kind)
    return ((config.block_q, config.block_k),)


def choose_config(query: Tensor, kind: str) -> Config:
    """The configuration for a head dim, a dtype and a kind of plan."""
    if query.dtype == torch.float32:
        return Config(32, 32, 4, 1) if query.shape[-1] > 64 else Config(64, 32, 4, 1)
    if query.shape[-1] > 128:
        return Config(64, 32, 8, 1)
    return TABLE[kind] if _has_descriptors(query) else Config(64, 64, 4, 2)  # fits Ada's 99 KiB of shared memory


def _kind(plan: BlockPlan) -> str:
    if plan.mask is None:
        return "list"
    return "interval" if plan.mask.weights is None else "ball"


def _has_descriptors(x: Tensor) -> bool:
    """Whether the GPU fetches boxes by itself: NVIDIA's from Hopper on."""
    if x.device.type != "cuda":
        return True  # Triton's interpreter, or building for another machine
    return torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] >= 9


def _box_descriptors(
    key: Tensor, value: Tensor, kv: Any, before: int, block_k: int, config: Config, ordered: tuple[bool, ...]
) -> tuple[Any, Any] | None:
    """Tensor descriptors of the grid's keys and values, or None where boxes are fetched by pointers: a descriptor has
    five axes at most, and strides in multiples of 16 bytes. (It cannot leave out hidden rows, where NaN may stand.)"""
    if (
        not config.boxes
        or not _has_descriptors(key)
        or any(ordered)
        or kv.volume != block_k
        or key.shape[-1] != _lanes(key.shape[-1])
    ):
        return None
    batch, heads, _, dim = key.shape
    found = []
    for x in (key, value):
        sb, sh, sr, _ = x.stride()
        g0, g1, g2 = kv.grid
        rows = (g1 * g2 * sr, g2 * sr, sr, 1)
        if batch == 1 or sb == heads * sh:
            shape, strides, box = (batch * heads, *kv.grid, dim), (sh, *rows), (1, *kv.box, dim)
        elif g0 == 1:
            shape, strides, box = (batch, heads, g1, g2, dim), (sb, sh, *rows[1:]), (1, 1, *kv.box[1:], dim)
        else:
            return None
        base = x[:, :, before:]
        if any(s * x.element_size() % 16 for s in strides[:-1]) or base.data_ptr() % 16:
            return None
        found.append(TensorDescriptor(base, list(shape), list(strides), list(box)))
    return found[0], found[1]
