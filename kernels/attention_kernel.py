# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the attention kernels share: the order of their programs, rows of a tensor, online softmax and gradients.

Names in a kernel: ``p_`` pointers, ``m_`` masks of a load or store, ``b_`` blocks, with their shape in a comment; a
group of ``kernels.arguments`` has the tensor's name; compile-time parameters are in capitals. S are an operation's: of
these, functions here read D, BLOCK_D, NEGATE (the scale is negative) and PRECISION (of products).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiling_kernel import grid_size

__all__ = [
    "add_dkv",
    "add_dq",
    "attended",
    "finish_softmax",
    "global_row_of",
    "head_of",
    "item_of",
    "load_lse_delta",
    "load_queries",
    "load_rows",
    "load_two",
    "logits",
    "softmax_step",
    "weights",
]

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def item_of(n_first, n_rest, n_groups, HAS_FIRST: tl.constexpr):
    """Item of a program: the n_first longest items of each of n_groups heads come first, then the n_rest others.

    Returns: whether it is one of the first, its head, and its index within these items of the head.
    """
    pid = tl.program_id(0)
    if HAS_FIRST:
        is_first = pid < n_first * n_groups
        local = tl.where(is_first, pid, pid - n_first * n_groups)
        per_head = tl.where(is_first, n_first, n_rest)
        return is_first, local // per_head, local % per_head
    else:
        return False, pid // n_rest, pid % n_rest


@triton.jit
def head_of(rows, b, h):
    """Pointer to the first row of a head."""
    return rows.data + b.to(tl.int64) * rows.batch + h.to(tl.int64) * rows.head


@triton.jit
def global_row_of(i, tokens):
    """Row in the sequence of the i-th token off the grid."""
    return tl.where(i < tokens.before, i, i + grid_size(tokens))


@triton.jit
def attended(mask, b, row, valid):
    """Whether rows are valid and not masked."""
    if mask.data is not None:
        p_mask = mask.data + b.to(tl.int64) * mask.batch + row.to(tl.int64) * mask.row
        valid = valid & (tl.load(p_mask, mask=valid, other=0) != 0)
    return valid


@triton.jit
def load_rows(p_x, row, valid, stride, d, D: tl.constexpr, MASKED: tl.constexpr):
    """Load rows (n, BLOCK_D) of a head; zeros if not valid and past D."""
    p_rows = p_x + row.to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED:
        return tl.load(p_rows, mask=valid[:, None] & (d < D)[None, :], other=0.0)
    if d.shape[0] != D:
        return tl.load(p_rows, mask=(d < D)[None, :], other=0.0)
    return tl.load(p_rows)


@triton.jit
def load_two(x, y, b, h, row, valid, MASKED: tl.constexpr, S: tl.constexpr):
    """Load the same rows (n, BLOCK_D) of a head of two tensors, such as keys and values, in the dtype of the first."""
    d = tl.arange(0, S.BLOCK_D)
    b_x = load_rows(head_of(x, b, h), row, valid, x.row, d, S.D, MASKED)
    return b_x, load_rows(head_of(y, b, h), row, valid, y.row, d, S.D, MASKED).to(b_x.dtype)


@triton.jit
def load_queries(query, d_out, p_lse_delta, b, h, row, valid, S: tl.constexpr):
    """Load rows (n, BLOCK_D) of a head of queries and of the output's gradient, and their log-sum-exp and Δ (n,);
    p_lse_delta: of the head."""
    b_q, b_do = load_two(query, d_out, b, h, row, valid, True, S)
    lse, delta = load_lse_delta(p_lse_delta, row, valid)
    return b_q, b_do, lse, delta


@triton.jit
def logits(b_q, b_k, S: tl.constexpr):
    """Logits without their scale."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=S.PRECISION)
    if S.NEGATE:
        b_s = -b_s
    return b_s


@triton.jit
def softmax_step(acc, m, l, b_s, b_v, scale, MASKED: tl.constexpr, S: tl.constexpr):
    """One step of the online softmax; b_s are logits without their scale, which is positive and in units of log2."""
    m_new = tl.maximum(m, tl.max(b_s, 1) * scale)
    shift = m_new
    if MASKED:  # a row without a visible key so far must not give -inf - -inf
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    b_p = tl.exp2(b_s * scale - shift[:, None])
    alpha = tl.exp2(m - shift)
    l = l * alpha + tl.sum(b_p, 1)
    acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * alpha[:, None], input_precision=S.PRECISION)
    return acc, m_new, l


@triton.jit
def finish_softmax(acc, m, l):
    """Output (n, BLOCK_D), and log-sum-exp (n,), natural log; 0 and -inf without a visible key."""
    seen = tl.where(l > 0, l, 1.0)
    return acc / seen[:, None], tl.where(l > 0, (m + tl.log2(seen)) * LN2, float("-inf"))


@triton.jit
def load_lse_delta(p_lse_delta, row, valid):
    """Log-sum-exp in units of log2 and Δ of rows. One load for both: each thread then loads one number, instead of all
    numbers that it needs later."""
    p_rows = p_lse_delta + 2 * row.to(tl.int64)[:, None] + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(p_rows, mask=valid[:, None], other=0.0))


@triton.jit
def weights(x):
    """2**x, at most 1: with logits of 1e9, where float32 has a resolution of 64, rounding may give x > 0."""
    return tl.exp2(tl.minimum(x, 0.0))


@triton.jit
def add_dq(dq, b_p, b_do, delta, b_k, b_v, S: tl.constexpr):
    """Add dS k of a tile of keys; b_p are its weights (queries, keys)."""
    b_ds = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision=S.PRECISION) - delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, dq, input_precision=S.PRECISION)


@triton.jit
def add_dkv(dk, dv, b_p, b_do, delta, b_q, b_v, S: tl.constexpr):
    """Add dSᵀ q and Pᵀ dO of a tile of queries; b_p are its weights (keys, queries). Keys are the rows of all products,
    so that the weights stay in registers from one product to the next."""
    dv = tl.dot(b_p.to(b_do.dtype), b_do, dv, input_precision=S.PRECISION)
    b_ds = b_p * (tl.dot(b_v, tl.trans(b_do), input_precision=S.PRECISION) - delta[None, :])
    return tl.dot(b_ds.to(b_q.dtype), b_q, dk, input_precision=S.PRECISION), dv
