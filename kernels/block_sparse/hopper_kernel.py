# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernel of ``block_sparse/hopper.py``, in Gluon.

A producer warp copies tiles of queries, keys and values to rings in shared memory by tensor descriptor. Two groups of
four warps process 64 queries each with the same keys: the products of the previous weights with their values run while
a group computes the weights of the next keys. Programs are persistent, one per multiprocessor, and process their query
tiles in the scheduled order. The pipeline continues across tiles: the first step of a tile multiplies the last weights
of the previous tile with their values, and then the previous tile is finished. There is therefore a single loop with
one copy of the code of a step, because the instructions must fit their cache (with separate code for first steps, last
steps and ends of lists, most of the time outside the products was spent fetching instructions).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_fetch import fetch
from .hopper_walk import (
    corner,
    counts,
    first_global_row,
    item_of,
    key_intervals,
    list_of,
    listed,
    serpentine_step,
    tile_of,
)

__all__ = ["block_sparse_hopper_kernel"]

LOG2E = gl.constexpr(1.4426950408889634)
# the name has changed since Triton 3.6
synchronize = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def _softmax(s, m, l, scale):
    """Weights of logits (without their scale, in units of log2), and the updated state of the online softmax."""
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    shift = gl.where(m_new == float("-inf"), 0.0, m_new)  # a row without a visible key so far
    p = gl.exp2(s * scale - shift[:, None])
    alpha = gl.exp2(m - shift)
    own = _own_sum(p)
    return p, m_new, l * gl.convert_layout(alpha, gl.SliceLayout(1, own.type.layout))[:, None] + own, alpha


@gluon.jit
def _own_sum(p):
    """Partial sums per thread, (rows, 4). The threads' sums are added once, at the end."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _part(lane, a, b, SPLIT: gl.constexpr):
    """a for the keys of a step's first tile, b for those of its second."""
    if SPLIT == 1:
        return a + lane * 0
    return gl.where(lane < 64, a, b)


@gluon.jit
def _away(lane, inner, x, z, y, SPLIT: gl.constexpr):
    """Distance (queries, keys) of the keys of a step from y along an axis; x, z: origins of its tiles."""
    origin = (x.to(gl.float32) - y)[:, None]
    if SPLIT == 2:
        origin = gl.where((lane < 64)[None, :], origin, (z.to(gl.float32) - y)[:, None])
    return inner.to(gl.float32)[None, :] + origin


@gluon.jit
def _square(x, weight, S: gl.constexpr):
    if S.ROUND:
        return x * x
    return x * x * weight


@gluon.jit
def apply_mask(s, x, z, grid, y, far, window, LOGITS: gl.constexpr, S: gl.constexpr):
    """Mask logits with -inf. Terms that depend on one axis only are computed once per position of a tile; per key, only
    a comparison and a select remain.

    x, z: origins of the step's tiles, along each axis. y: position of a query, or the centre of its interval; far: half
    the length of the interval.
    """
    N: gl.constexpr = s.shape[1]
    VOLUME: gl.constexpr = S.KB[0] * S.KB[1] * S.KB[2]
    SPLIT: gl.constexpr = N // VOLUME
    lane = gl.arange(0, N, gl.SliceLayout(0, LOGITS))
    i0 = lane % VOLUME // (S.KB[1] * S.KB[2])
    i1 = lane % VOLUME // S.KB[2] % S.KB[1]
    i2 = lane % VOLUME % S.KB[2]
    on0 = (_part(lane, x[0], z[0], SPLIT) + i0 < grid.g0)[None, :]
    on1 = (_part(lane, x[1], z[1], SPLIT) + i1 < grid.g1)[None, :]
    on2 = (_part(lane, x[2], z[2], SPLIT) + i2 < grid.g2)[None, :]
    LEAST: gl.constexpr = float("-inf")
    MOST: gl.constexpr = float("inf")
    zero = gl.full([1, N], 0.0, gl.float32, LOGITS)
    if S.BALL[0] or S.BALL[1] or S.BALL[2]:  # budget left by axes 0 and 1, and cost of axis 2
        left = zero + window.limit
        if S.SHORT[0] or SPLIT == 2:
            left = gl.where(on0, left, LEAST)
        if S.SHORT[1]:
            left = gl.where(on1, left, LEAST)
        if S.BALL[0]:
            left = left - _square(_away(lane, i0, x[0], z[0], y[0], SPLIT), window.w0, S)
        if S.BALL[1]:
            left = left - _square(_away(lane, i1, x[1], z[1], y[1], SPLIT), window.w1, S)
        cost = zero
        if S.SHORT[2]:
            cost = gl.where(on2, cost, MOST)
        if S.BALL[2]:
            cost = cost + _square(_away(lane, i2, x[2], z[2], y[2], SPLIT), window.w2, S)
        return gl.where(cost < left, s, LEAST)
    # minimum of the logit and, for each axis, of ±inf
    if S.IN[0]:
        inside = gl.abs(_away(lane, i0, x[0], z[0], y[0], SPLIT)) <= far[0][:, None]
        s = gl.minimum(s, gl.where(inside & on0, MOST, LEAST))
    elif S.SHORT[0] or SPLIT == 2:
        s = gl.minimum(s, gl.where(on0, MOST, LEAST))
    if S.IN[1]:
        inside = gl.abs(_away(lane, i1, x[1], z[1], y[1], SPLIT)) <= far[1][:, None]
        s = gl.minimum(s, gl.where(inside & on1, MOST, LEAST))
    elif S.SHORT[1]:
        s = gl.minimum(s, gl.where(on1, MOST, LEAST))
    if S.IN[2]:
        inside = gl.abs(_away(lane, i2, x[2], z[2], y[2], SPLIT)) <= far[2][:, None]
        s = gl.minimum(s, gl.where(inside & on2, MOST, LEAST))
    elif S.SHORT[2]:
        s = gl.minimum(s, gl.where(on2, MOST, LEAST))
    return s


@gluon.jit
def _mask_interval(s, i, end0, end1, end2, n0, n1, LOGITS: gl.constexpr):
    """Mask logits past the end of an interval of rows with -inf."""
    N: gl.constexpr = s.shape[1]
    left = end0 - i * N
    if i >= n0:
        left = end1 - (i - n0) * N
    if i >= n1:
        left = end2 - (i - n1) * N
    if left < N:
        s = gl.where((gl.arange(0, N, gl.SliceLayout(0, LOGITS)) < left)[None, :], s, float("-inf"))
    return s


@gluon.jit
def _interval_of(window, AXIS: gl.constexpr, place, length):
    """Centre and half length of the interval of positions visible to queries along an axis (halves are exact)."""
    p_first = window.tables + (3 * AXIS + 1) * window.longest + place
    first = gl.load(p_first, mask=place < length, other=0).to(gl.float32)
    last = gl.load(p_first + window.longest, mask=place < length, other=0).to(gl.float32)
    return (first + last) * 0.5, (last - first) * 0.5


@gluon.jit
def _places(tile, lane, n1, n2, FLAT: gl.constexpr, B0: gl.constexpr, B1: gl.constexpr, B2: gl.constexpr):
    x0, x1, x2 = corner(tile, n1, n2, FLAT, B0, B1, B2)
    return x0 + lane // (B1 * B2), x1 + lane // B2 % B1, x2 + lane % B2


@gluon.jit
def _feature(x, S: gl.constexpr):
    """φ of the rows of x up to a factor per row, and that factor: it cancels in the quotient of two sums of φ."""
    if S.FEATURE_MAP == "softmax":
        most = gl.max(x, 1) * LOG2E
        powers = gl.exp2(x * LOG2E - most[:, None])
        return powers, gl.sum(powers, 1)
    elif S.FEATURE_MAP == "elu":
        return gl.where(x > 0, x + 1, gl.exp(x)), gl.sum(x * 0.0, 1) + 1.0
    else:
        gl.static_assert(S.FEATURE_MAP == "relu", "FEATURE_MAP must be softmax, elu or relu")
        return gl.where(x < 0, 0.0, x), gl.sum(x * 0.0, 1) + 1.0


@gluon.jit
def rematerialize(x):
    """Opaque copy of x: stops the compiler from hoisting values derived from it out of the loop and holding them in
    registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _finish(
    acc, m, l, q, output, linear, kc, k_ring, k_full, k_free, q_free, item, sizes, n_heads, n_q_tiles, queries,
    S: gl.constexpr, HALF: gl.constexpr, OUTPUT: gl.constexpr,
):  # fmt: skip
    """Add the linear branch to the accumulator of half a tile and store it. Returns the accumulator, whose content is
    no longer needed, and the count of key slots consumed.

    The linear branch is accumulated in the same registers: the accumulator is multiplied by linear_norm / total before,
    and by 1 / linear_norm after.
    """
    D: gl.constexpr = S.D
    SLOTS: gl.constexpr = S.SLOTS
    Q0, Q1, Q2 = queries.g0, queries.g1, queries.g2
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    h, tile, is_global = tile_of(rematerialize(item), sizes.n_global_tiles, n_heads, n_q_tiles)
    FEATURES: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    d = gl.arange(0, D, gl.SliceLayout(0, OUTPUT))
    total = gl.convert_layout(gl.sum(l, 1), OUT_ROW)
    factor = 1.0 / gl.where(total > 0, total, 1.0)
    if S.STATE != "none":  # noqa: SIM102
        if is_global == 0:
            which = h
            if S.STATE == "of each tile":
                which = h * n_q_tiles + tile
            norm = gl.load(linear.norm + which.to(gl.int64) * D + d)
            phi, times = _feature(q.load(OUTPUT).to(gl.float32), S)
            linear_norm = gl.sum(phi * norm[None, :], 1) + gl.load(linear.eps + h) * times
            linear_norm = gl.where(linear_norm == 0, 1.0, linear_norm)
            acc = acc * (factor * linear_norm)[:, None]
            factor = 1.0 / linear_norm
            phi = gl.convert_layout(phi.to(k_ring.dtype), FEATURES)
            slot = kc % SLOTS
            mbarrier.wait(k_full.index(slot), kc // SLOTS & 1)
            acc = warpgroup_mma(phi, k_ring.index(slot).slice(0, D), acc)
            mbarrier.arrive(k_free.index(slot), count=1)
            kc += 1
    mbarrier.arrive(q_free, count=1)
    acc = acc * factor[:, None]
    if S.HAS_BIAS:  # noqa: SIM102
        if is_global == 0:
            acc += gl.load(linear.bias + d).to(gl.float32)[None, :]
    lane = HALF * 64 + gl.arange(0, 64, OUT_ROW)
    qn1, qn2 = gl.cdiv(Q1, S.QB[1]), gl.cdiv(Q2, S.QB[2])
    p0, p1, p2 = _places(tile, lane, qn1, qn2, S.FLAT, S.QB[0], S.QB[1], S.QB[2])
    valid = (p0 < Q0) & (p1 < Q1) & (p2 < Q2)
    row = queries.before + (p0 * Q1 + p1) * Q2 + p2
    if S.HAS_GLOBAL:
        end = gl.where(tile < sizes.n_global_before, queries.before, queries.length)
        off_row = first_global_row(tile, sizes.n_global_before, queries) + lane
        row = gl.where(is_global, off_row, row)
        valid = gl.where(is_global, off_row < end, valid)
    p_o = output.out + h.to(gl.int64) * output.head + row.to(gl.int64)[:, None] * output.row + d[None, :]
    gl.store(p_o, acc.to(output.out.dtype.element_ty), mask=valid[:, None])
    if S.HAS_LSE:
        value = (gl.convert_layout(m, OUT_ROW) + gl.log2(total)) * 0.6931471805599453
        gl.store(output.lse + h.to(gl.int64) * queries.length + row, value, mask=valid)
    return acc, kc


@gluon.jit
def _attend(
    output, linear, schedule, lists, window, q_ring, k_ring, v_ring, q_full, q_free, k_full, k_free, v_full, v_free,
    sizes, n_heads, n_q_tiles, queries, keys, scale, S: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Main loop of a consumer group of four warps: one half of the queries of each tile."""
    D: gl.constexpr = S.D
    N: gl.constexpr = S.N
    SLOTS: gl.constexpr = S.SLOTS
    PER_STEP: gl.constexpr = N // (S.KB[0] * S.KB[1] * S.KB[2])
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    Q0, Q1, Q2 = queries.g0, queries.g1, queries.g2
    K0, K1, K2 = keys.g0, keys.g1, keys.g2
    qn1, qn2 = gl.cdiv(Q1, S.QB[1]), gl.cdiv(Q2, S.QB[2])
    kn1, kn2 = gl.cdiv(K1, S.KB[1]), gl.cdiv(K2, S.KB[2])
    n_global_tiles = sizes.n_global_tiles
    kc = 0
    vc = 0
    turns = gl.load(schedule.turns + gl.program_id(0))
    # prefetched one turn ahead and not used until then: a load takes as long as half a step
    # (Loop variables must not start as one object, or Gluon would alias them. Hence turns * 0 and i * 0 for 0.)
    last_item, item, next_item = turns * 0, item_of(schedule, 0, turns), item_of(schedule, 1, turns)
    n_tiles, n_full = counts(lists, item, n_global_tiles, n_heads, n_q_tiles, S)
    acc = gl.zeros([64, D], gl.float32, OUTPUT)
    p = gl.zeros([64, N], k_ring.dtype, WEIGHTS)
    m = gl.full([64], float("-inf"), gl.float32, ROW)
    l = _own_sum(gl.zeros([64, N], gl.float32, LOGITS))
    goes_on = turns < 0  # whether the next product accumulates: the first of a tile does not
    for turn in range(turns + 1):  # the last turn only finishes the previous tile
        _h, tile, is_global = tile_of(item, n_global_tiles, n_heads, n_q_tiles)
        next_n_tiles, next_n_full = counts(lists, next_item, n_global_tiles, n_heads, n_q_tiles, S)
        after_next = item_of(schedule, turn + 2, turns)
        p_list = list_of(lists, item, n_global_tiles, n_heads, n_q_tiles)
        n_clean = n_full // PER_STEP
        n_steps = (n_tiles + PER_STEP - 1) // PER_STEP
        end0, end1, end2, n0, n1, n_interval_steps = key_intervals(is_global, keys, sizes.n_pooled, N)
        n_all = n_steps
        if S.HAS_GLOBAL or S.HAS_POOLED:
            n_all = n_steps + n_interval_steps
        n_all = gl.where(turn < turns, n_all, 1)
        p0, p1, p2 = _places(tile, HALF * 64 + gl.arange(0, 64, ROW), qn1, qn2, S.FLAT, S.QB[0], S.QB[1], S.QB[2])
        y0, y1, y2 = p0.to(gl.float32), p1.to(gl.float32), p2.to(gl.float32)
        far0, far1, far2 = y0, y1, y2
        if S.IN[0]:
            y0, far0 = _interval_of(window, 0, p0, Q0)
        if S.IN[1]:
            y1, far1 = _interval_of(window, 1, p1, Q1)
        if S.IN[2]:
            y2, far2 = _interval_of(window, 2, p2, Q2)
        q = q_ring.index(turn % 2 * 2 + HALF)
        mbarrier.wait(q_full.index(turn % 2), turn // 2 & 1, pred=turn < turns)
        for i in range(n_all):
            x0, x1, x2 = i * 0, i * 0, i * 0
            z0, z1, z2 = i * 0, i * 0, i * 0
            at = serpentine_step(i, n_steps, turn)
            partial = (at >= n_clean) & (i < n_steps)
            if S.HAS_PARTIAL:  # noqa: SIM102 - loaded before waiting for the logits
                if partial:
                    box = listed(p_list, at * PER_STEP, n_tiles)
                    x0, x1, x2 = corner(box, kn1, kn2, S.FLAT, S.KB[0], S.KB[1], S.KB[2])
                    z0, z1, z2 = x0, x1, x2
                    if PER_STEP == 2:
                        box = listed(p_list, at * 2 + 1, n_tiles)
                        z0, z1, z2 = corner(box, kn1, kn2, S.FLAT, S.KB[0], S.KB[1], S.KB[2])
                        z0 = gl.where(at * 2 + 1 < n_tiles, z0, K0)  # past the end of the list: off the grid
            # the products of these keys and, queued behind them, of the previous weights with their values
            slot, last = kc % SLOTS, vc % SLOTS
            mbarrier.wait(k_full.index(slot), kc // SLOTS & 1)
            mbarrier.wait(v_full.index(last), vc // SLOTS & 1)
            none = gl.zeros([64, N], gl.float32, LOGITS)
            s = warpgroup_mma(q, k_ring.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
            acc = warpgroup_mma(p, v_ring.index(last), acc, use_acc=goes_on, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            mbarrier.arrive(k_free.index(slot), count=1)
            kc += 1
            if S.HAS_PARTIAL:  # noqa: SIM102
                if partial:
                    x, z, y, far = (x0, x1, x2), (z0, z1, z2), (y0, y1, y2), (far0, far1, far2)
                    s = apply_mask(s, x, z, keys, y, far, window, LOGITS, S)
            if S.HAS_GLOBAL or S.HAS_POOLED:  # noqa: SIM102
                if i >= n_steps:
                    s = _mask_interval(s, i - n_steps, end0, end1, end2, n0, n1, LOGITS)
            first = i == 0
            weights, m_new, l_new, alpha = _softmax(
                s, gl.where(first, float("-inf"), m), gl.where(first, l * 0.0, l), scale
            )
            p_new = gl.convert_layout(weights.to(k_ring.dtype), WEIGHTS)
            # passes at once; but for the branch in it, all since the logits came would be done after the products
            mbarrier.wait(v_full.index(last), vc // SLOTS & 1)
            acc, p = warpgroup_mma_wait(0, deps=[acc, p])
            mbarrier.arrive(v_free.index(last), count=1)
            vc += 1
            p = p_new
            goes_on = i > 0
            if first:
                if turn > 0:
                    acc, kc = _finish(
                        acc, m, l, q_ring.index((turn + 1) % 2 * 2 + HALF), output, linear, kc, k_ring, k_full, k_free,
                        q_free.index((turn + 1) % 2), last_item, sizes, n_heads, n_q_tiles, queries, S, HALF, OUTPUT,
                    )  # fmt: skip
            else:
                acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUTPUT))[:, None]
            m, l = m_new, l_new
        last_item, item, next_item = item, next_item, after_next
        n_tiles, n_full = next_n_tiles, next_n_full


@gluon.jit(do_not_specialize=["sizes"])
def block_sparse_hopper_kernel(
    q_boxes, q_rows, k_boxes, k_rows, v_boxes, v_rows, pooled_k_rows, pooled_v_rows, states, output, linear, schedule,
    lists, window, sizes, n_heads, group, n_q_tiles, queries, keys, scale, S: gl.constexpr, DTYPE: gl.constexpr,
    LAYOUT: gl.constexpr, REGISTERS: gl.constexpr, FETCHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attention of the items that the schedule gives to a program."""
    SLOTS: gl.constexpr = S.SLOTS
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_ring = gl.allocate_shared_memory(DTYPE, [4, 64, S.D], LAYOUT)  # two query tiles in halves
    k_ring = gl.allocate_shared_memory(DTYPE, [SLOTS, S.N, S.D], LAYOUT)
    v_ring = gl.allocate_shared_memory(DTYPE, [SLOTS, S.N, S.D], LAYOUT)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    v_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=2)
    for i in gl.static_range(SLOTS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    synchronize()
    gl.warp_specialize(
        [
            (_attend, (
                output, linear, schedule, lists, window, q_ring, k_ring, v_ring, q_full, q_free, k_full, k_free, v_full,
                v_free, sizes, n_heads, n_q_tiles, queries, keys, scale, S, 0,
            )),
            (_attend, (
                output, linear, schedule, lists, window, q_ring, k_ring, v_ring, q_full, q_free, k_full, k_free, v_full,
                v_free, sizes, n_heads, n_q_tiles, queries, keys, scale, S, 1,
            )),
            (fetch, (
                q_boxes, q_rows, k_boxes, k_rows, v_boxes, v_rows, pooled_k_rows, pooled_v_rows, states, schedule,
                lists, q_ring, k_ring, v_ring, q_full, q_free, k_full, k_free, v_full, v_free, sizes, n_heads, group,
                n_q_tiles, queries, keys, S,
            )),
        ],
        [4, 1],
        [REGISTERS, FETCHER_REGISTERS],
    )  # fmt: skip
