# mypy: allow-untyped-defs, allow-incomplete-defs
"""The kernel of ``block_sparse_hopper.py``, in Gluon.

One warp copies boxes of queries, keys and values into rings in shared memory by tensor descriptor. Two groups of four
warps take 64 queries each through the same keys: the products of the next keys run while a group works out the weights
of these, and so do the products of the last weights with their values. Programs stay, one on each multiprocessor, and
take one tile of queries after the other in the order that they are given.
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = ["Static", "block_sparse_hopper_kernel"]

# three names have changed since Triton 3.6
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
synchronize = getattr(gl, "barrier", None) or gl.thread_barrier


@dataclass(frozen=True)
class Static:
    """What is compiled in. Boxes of queries and keys, along which axes the last box of keys is short; FULL, IN, BALL,
    STATE_MODE as in ``block_sparse_triton.py``; ROUND: the ball's weights are one."""

    QB: tuple[int, int, int]
    KB: tuple[int, int, int]
    SHORT: tuple[bool, bool, bool]
    FULL: int
    HAS_PARTIAL: bool
    HAS_TEXT: bool
    HAS_EXTRA: bool
    STATE_MODE: int
    HAS_BIAS: bool
    HAS_LSE: bool
    FEATURE_MAP: str
    IN: tuple[bool, bool, bool]
    BALL: tuple[bool, bool, bool]
    ROUND: bool


@gluon.jit
def _view(x, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    if RENAMED:
        return x.reinterpret(x.dtype, SHAPE, LAYOUT)
    else:
        return x._reinterpret(x.dtype, SHAPE, LAYOUT)


@gluon.jit
def _copy(DESC, h, x0, x1, x2, bar, slot, FIRST: gl.constexpr, BOX: gl.constexpr):
    """A box of a grid (or, three long, rows) to the rows from FIRST on of a slot (rows, D), 64 columns at a time."""
    N: gl.constexpr = slot.shape[0]
    PARTS: gl.constexpr = slot.shape[1] // 64
    TWO: gl.constexpr = slot.layout
    LAYOUT: gl.constexpr = DESC.layout
    ROWS: gl.constexpr = BOX[1] * BOX[2] * BOX[3] if len(BOX) == 5 else BOX[1]
    parts = _view(slot, [PARTS, N, 64], TWO)
    for part in gl.static_range(PARTS):
        box = _view(parts.index(part).slice(FIRST, ROWS), BOX, LAYOUT)
        if len(BOX) == 5:
            load_box(DESC, [h, x0, x1, x2, part * 64], bar, box)
        else:
            load_box(DESC, [h, x0, part * 64], bar, box)


@gluon.jit
def _copy_step(DESC, h, x0, x1, x2, z0, z1, z2, bar, slot, BOX: gl.constexpr):
    """One box or two fill a slot."""
    VOLUME: gl.constexpr = BOX[1] * BOX[2] * BOX[3]
    _copy(DESC, h, x0, x1, x2, bar, slot, 0, BOX)
    if slot.shape[0] > VOLUME:
        _copy(DESC, h, z0, z1, z2, bar, slot, VOLUME, BOX)


@gluon.jit
def _corner(tile, n1, n2, B0: gl.constexpr, B1: gl.constexpr, B2: gl.constexpr):
    """The first place of a box along each axis."""
    return tile // (n1 * n2) * B0, tile // n2 % n1 * B1, tile % n2 * B2


@gluon.jit
def _listed(TILES, place, n_tiles, n1, n2, B0: gl.constexpr, B1: gl.constexpr, B2: gl.constexpr):
    """Corner of the box at a place of a list; past the list's end the last box stands in."""
    return _corner(gl.load(TILES + gl.minimum(place, n_tiles - 1)), n1, n2, B0, B1, B2)


@gluon.jit
def _work(
    ORDER, TILES, N_FULL, N_TILES, turn, turns, list_stride, n_list, n_text_tiles, n_text_before, n_heads, q_before,
    n_grid_q, n_q_tiles, last_tile, S: gl.constexpr,
):  # fmt: skip
    """The tile of a turn: head, whether queries off the grid, number, first row if so, its list, key tiles listed and
    those without a mask. Loaded a turn ahead, for a load takes about as long as half a step."""
    item = gl.load(ORDER + gl.minimum(turn, turns - 1) * gl.num_programs(0) + gl.program_id(0))
    n_text_items = n_text_tiles * n_heads
    is_text = item < n_text_items
    local = gl.where(is_text, item, item - n_text_items)
    per_head = gl.where(is_text, n_text_tiles, n_q_tiles)
    h = local // per_head
    tile = local % per_head
    row = gl.where(tile < n_text_before, tile, tile - n_text_before) * 128
    row = gl.where(tile < n_text_before, row, row + q_before + n_grid_q)
    lists = TILES + h.to(gl.int64) * list_stride + tile.to(gl.int64) * n_list
    g = gl.where(list_stride > 0, h, 0) * n_q_tiles + tile
    n_tiles = gl.load(N_TILES + g, mask=is_text == 0, other=0)
    n_full = n_tiles
    if S.FULL == 0:
        n_full = n_tiles * 0
    elif S.FULL == 1:
        n_full = gl.load(N_FULL + g, mask=is_text == 0, other=0)
    elif S.FULL == 3:  # all but the very last tile of the grid, which can only stand last
        last = gl.load(lists + gl.maximum(n_tiles - 1, 0), mask=n_tiles > 0, other=-1)
        n_full = n_tiles - (last == last_tile).to(gl.int32)
    return h, is_text, tile, row, lists, n_tiles, n_full


@gluon.jit
def _runs(is_text, length_k, k_before, n_grid_k, length_2, N: gl.constexpr):
    """Keys that are seen in the order in which they lie: ends of the runs before the grid (all of the sequence, for
    queries off the grid), after it, and of the pooled tokens; steps through the first, the first two, and all."""
    end0 = gl.where(is_text, length_k, k_before)
    end1 = gl.where(is_text, 0, length_k - k_before - n_grid_k)
    end2 = gl.where(is_text, 0, length_2)
    n0 = (end0 + N - 1) // N
    n1 = n0 + (end1 + N - 1) // N
    return end0, end1, end2, n0, n1, n1 + (end2 + N - 1) // N


@gluon.jit
def _claim(count, full, free, SLOTS: gl.constexpr, BYTES: gl.constexpr):
    """The next slot of a ring, once it is free, and its barrier, which waits for so many bytes."""
    slot = count % SLOTS
    mbarrier.wait(free.index(slot), (count // SLOTS & 1) ^ 1)
    mbarrier.expect(full.index(slot), BYTES)
    return slot, full.index(slot)


@gluon.jit
def _fetch(
    Q_BOXES, Q_ROWS, K_BOXES, K_ROWS, V_BOXES, V_ROWS, K2_ROWS, V2_ROWS, STATE,
    ORDER, TURNS, TILES, N_FULL, N_TILES, list_stride, n_list, q_ring, k_ring, v_ring, q_full, q_free, k_full, k_free,
    v_full, v_free, n_text_tiles, n_text_before, n_heads, group, q_before, k_before, length_k, length_2, n_q_tiles,
    Q0, Q1, Q2, K0, K1, K2, S: gl.constexpr,
):  # fmt: skip
    """What the fetching warp does."""
    D: gl.constexpr = k_ring.shape[2]
    N: gl.constexpr = k_ring.shape[1]
    SLOTS: gl.constexpr = k_ring.shape[0]
    BOX: gl.constexpr = [1, S.KB[0], S.KB[1], S.KB[2], 64]
    PER_STEP: gl.constexpr = N // (S.KB[0] * S.KB[1] * S.KB[2])
    BYTES: gl.constexpr = N * D * 2
    # half of a box of queries, along its first axis that is longer than one
    H0: gl.constexpr = S.QB[0] // 2 if S.QB[0] > 1 else 1
    H1: gl.constexpr = S.QB[1] if S.QB[0] > 1 else (S.QB[1] // 2 if S.QB[1] > 1 else 1)
    H2: gl.constexpr = S.QB[2] if S.QB[0] * S.QB[1] > 1 else S.QB[2] // 2
    D0: gl.constexpr = H0 if S.QB[0] > 1 else 0
    D1: gl.constexpr = H1 if S.QB[0] == 1 and S.QB[1] > 1 else 0
    D2: gl.constexpr = H2 if S.QB[0] * S.QB[1] == 1 else 0
    qn1, qn2 = gl.cdiv(Q1, S.QB[1]), gl.cdiv(Q2, S.QB[2])
    kn1, kn2 = gl.cdiv(K1, S.KB[1]), gl.cdiv(K2, S.KB[2])
    last_tile = gl.cdiv(K0, S.KB[0]) * kn1 * kn2 - 1
    n_grid_q, n_grid_k = Q0 * Q1 * Q2, K0 * K1 * K2
    kc = 0
    vc = 0
    turns = gl.load(TURNS + gl.program_id(0))
    for turn in range(turns):
        h, is_text, tile, q_row, lists, n_tiles, _n_full = _work(
            ORDER, TILES, N_FULL, N_TILES, turn, turns, list_stride, n_list, n_text_tiles, n_text_before, n_heads,
            q_before, n_grid_q, n_q_tiles, last_tile, S,
        )  # fmt: skip
        hk = h // group
        slot, bar = _claim(turn, q_full, q_free, 2, 128 * D * 2)
        if S.HAS_TEXT and is_text:
            for half in gl.static_range(2):
                q = q_ring.index(slot * 2 + half)
                _copy(Q_ROWS, h, q_row + half * 64, 0, 0, bar, q, 0, [1, 64, 64])
        else:
            x0, x1, x2 = _corner(tile, qn1, qn2, S.QB[0], S.QB[1], S.QB[2])
            for half in gl.static_range(2):
                q = q_ring.index(slot * 2 + half)
                y0, y1, y2 = x0 + half * D0, x1 + half * D1, x2 + half * D2
                _copy(Q_BOXES, h, y0, y1, y2, bar, q, 0, [1, H0, H1, H2, 64])
        for i in range((n_tiles + PER_STEP - 1) // PER_STEP):
            x0, x1, x2 = _listed(lists, i * PER_STEP, n_tiles, kn1, kn2, S.KB[0], S.KB[1], S.KB[2])
            z0, z1, z2 = x0, x1, x2
            if PER_STEP == 2:
                z0, z1, z2 = _listed(lists, i * 2 + 1, n_tiles, kn1, kn2, S.KB[0], S.KB[1], S.KB[2])
            slot, bar = _claim(kc, k_full, k_free, SLOTS, BYTES)
            _copy_step(K_BOXES, hk, x0, x1, x2, z0, z1, z2, bar, k_ring.index(slot), BOX)
            kc += 1
            slot, bar = _claim(vc, v_full, v_free, SLOTS, BYTES)
            _copy_step(V_BOXES, hk, x0, x1, x2, z0, z1, z2, bar, v_ring.index(slot), BOX)
            vc += 1
        if S.HAS_TEXT or S.HAS_EXTRA:
            _end0, _end1, _end2, n0, n1, n_runs = _runs(is_text, length_k, k_before, n_grid_k, length_2, N)
            for i in range(n_runs):
                row = i * N
                if i >= n0:
                    row = k_before + n_grid_k + (i - n0) * N
                slot, bar = _claim(kc, k_full, k_free, SLOTS, BYTES)
                if S.HAS_EXTRA and i >= n1:
                    _copy(K2_ROWS, hk, (i - n1) * N, 0, 0, bar, k_ring.index(slot), 0, [1, N, 64])
                else:
                    _copy(K_ROWS, hk, row, 0, 0, bar, k_ring.index(slot), 0, [1, N, 64])
                kc += 1
                slot, bar = _claim(vc, v_full, v_free, SLOTS, BYTES)
                if S.HAS_EXTRA and i >= n1:
                    _copy(V2_ROWS, hk, (i - n1) * N, 0, 0, bar, v_ring.index(slot), 0, [1, N, 64])
                else:
                    _copy(V_ROWS, hk, row, 0, 0, bar, v_ring.index(slot), 0, [1, N, 64])
                vc += 1
        if S.STATE_MODE > 0:  # noqa: SIM102 - the linear branch's matrix comes as one more step of keys
            if is_text == 0:
                which = h
                if S.STATE_MODE == 2:
                    which = h * n_q_tiles + tile
                slot, bar = _claim(kc, k_full, k_free, SLOTS, BYTES)
                _copy(STATE, which, 0, 0, 0, bar, k_ring.index(slot), 0, [1, D, 64])
                kc += 1


@gluon.jit
def _softmax(s, m, l, scale):
    """Weights of logits (without their scale, in units of log2), and what the online softmax keeps."""
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    shift = gl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key yet
    p = gl.exp2(s * scale - shift[:, None])
    alpha = gl.exp2(m - shift)
    return p, m_new, l * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _begin(q, p, acc, kc, vc, k_ring, v_ring, k_full, k_free, v_full, LOGITS: gl.constexpr):
    """Start the products of the next keys and, behind them, of the last weights with their values; wait for the
    logits."""
    SLOTS: gl.constexpr = k_ring.shape[0]
    N: gl.constexpr = k_ring.shape[1]
    slot = kc % SLOTS
    mbarrier.wait(k_full.index(slot), kc // SLOTS & 1)
    none = gl.zeros([64, N], gl.float32, LOGITS)
    s = warpgroup_mma(q, k_ring.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
    last = vc % SLOTS
    mbarrier.wait(v_full.index(last), vc // SLOTS & 1)
    acc = warpgroup_mma(p, v_ring.index(last), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_free.index(slot), count=1)
    return s, acc


@gluon.jit
def _end(s, acc, m, l, p, vc, scale, v_free, SLOTS: gl.constexpr, OUTPUT: gl.constexpr, WEIGHTS: gl.constexpr):
    """The weights of these keys, while the last values are added up; the sum is scaled as the greatest logit moves."""
    weights, m, l, alpha = _softmax(s, m, l, scale)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_free.index(vc % SLOTS), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUTPUT))[:, None]
    return acc, m, l, gl.convert_layout(weights.to(p.dtype), WEIGHTS)


@gluon.jit
def _part(lane, a, b, SPLIT: gl.constexpr):
    """a for the keys of a step's first box, b for those of its second."""
    if SPLIT == 1:
        return a + lane * 0
    return gl.where(lane < 64, a, b)


@gluon.jit
def _away(lane, inner, x, z, y, SPLIT: gl.constexpr):
    """(queries, keys) how far the keys of a step are from y along an axis; x, z: where its boxes begin."""
    corner = (x.to(gl.float32) - y)[:, None]
    if SPLIT == 2:
        corner = gl.where((lane < 64)[None, :], corner, (z.to(gl.float32) - y)[:, None])
    return inner.to(gl.float32)[None, :] + corner


@gluon.jit
def _square(x, weight, S: gl.constexpr):
    if S.ROUND:
        return x * x
    return x * x * weight


@gluon.jit
def _hide(
    s, i, lists, n_tiles, kn1, kn2, K0, K1, K2, y0, y1, y2, far0, far1, far2, w0, w1, w2, limit,
    LOGITS: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """Logits, -inf where a key is not seen. All that depends on one axis alone is worked out once for its few places
    in a box; what is left to do for a key is to compare, and to choose.

    y: a query's place, or the middle of its run; far: half of the run's length.
    """
    N: gl.constexpr = s.shape[1]
    VOLUME: gl.constexpr = S.KB[0] * S.KB[1] * S.KB[2]
    SPLIT: gl.constexpr = N // VOLUME
    lane = gl.arange(0, N, gl.SliceLayout(0, LOGITS))
    x0, x1, x2 = _listed(lists, i * SPLIT, n_tiles, kn1, kn2, S.KB[0], S.KB[1], S.KB[2])
    z0, z1, z2 = x0, x1, x2
    if SPLIT == 2:
        z0, z1, z2 = _listed(lists, i * 2 + 1, n_tiles, kn1, kn2, S.KB[0], S.KB[1], S.KB[2])
        z0 = gl.where(i * 2 + 1 < n_tiles, z0, K0)  # past the list's end: off the grid
    i0 = lane % VOLUME // (S.KB[1] * S.KB[2])
    i1 = lane % VOLUME // S.KB[2] % S.KB[1]
    i2 = lane % VOLUME % S.KB[2]
    on0 = (_part(lane, x0, z0, SPLIT) + i0 < K0)[None, :]
    on1 = (_part(lane, x1, z1, SPLIT) + i1 < K1)[None, :]
    on2 = (_part(lane, x2, z2, SPLIT) + i2 < K2)[None, :]
    LEAST: gl.constexpr = float("-inf")
    MOST: gl.constexpr = float("inf")
    zero = gl.full([1, N], 0.0, gl.float32, LOGITS)
    if S.BALL[0] or S.BALL[1] or S.BALL[2]:  # what axes 0 and 1 leave of the limit, and what axis 2 costs
        left = zero + limit
        if S.SHORT[0] or SPLIT == 2:
            left = gl.where(on0, left, LEAST)
        if S.SHORT[1]:
            left = gl.where(on1, left, LEAST)
        if S.BALL[0]:
            left = left - _square(_away(lane, i0, x0, z0, y0, SPLIT), w0, S)
        if S.BALL[1]:
            left = left - _square(_away(lane, i1, x1, z1, y1, SPLIT), w1, S)
        cost = zero
        if S.SHORT[2]:
            cost = gl.where(on2, cost, MOST)
        if S.BALL[2]:
            cost = cost + _square(_away(lane, i2, x2, z2, y2, SPLIT), w2, S)
        return gl.where(cost < left, s, LEAST)
    # the least of the logit and, for each axis, of ±inf
    if S.IN[0]:
        seen = gl.abs(_away(lane, i0, x0, z0, y0, SPLIT)) <= far0[:, None]
        s = gl.minimum(s, gl.where(seen & on0, MOST, LEAST))
    elif S.SHORT[0] or SPLIT == 2:
        s = gl.minimum(s, gl.where(on0, MOST, LEAST))
    if S.IN[1]:
        seen = gl.abs(_away(lane, i1, x1, z1, y1, SPLIT)) <= far1[:, None]
        s = gl.minimum(s, gl.where(seen & on1, MOST, LEAST))
    elif S.SHORT[1]:
        s = gl.minimum(s, gl.where(on1, MOST, LEAST))
    if S.IN[2]:
        seen = gl.abs(_away(lane, i2, x2, z2, y2, SPLIT)) <= far2[:, None]
        s = gl.minimum(s, gl.where(seen & on2, MOST, LEAST))
    elif S.SHORT[2]:
        s = gl.minimum(s, gl.where(on2, MOST, LEAST))
    return s


@gluon.jit
def _hide_run(s, i, end0, end1, end2, n0, n1, LOGITS: gl.constexpr):
    """Logits, -inf past the end of a run of rows."""
    N: gl.constexpr = s.shape[1]
    left = end0 - i * N
    if i >= n0:
        left = end1 - (i - n0) * N
    if i >= n1:
        left = end2 - (i - n1) * N
    return gl.where((gl.arange(0, N, gl.SliceLayout(0, LOGITS)) < left)[None, :], s, float("-inf"))


@gluon.jit
def _run_of(TABLES, AXIS: gl.constexpr, place, length, longest):
    """Middle and half length of the run of places that queries see along an axis (halves are exact)."""
    first = gl.load(TABLES + (3 * AXIS + 1) * longest + place, mask=place < length, other=0).to(gl.float32)
    last = gl.load(TABLES + (3 * AXIS + 2) * longest + place, mask=place < length, other=0).to(gl.float32)
    return (first + last) * 0.5, (last - first) * 0.5


@gluon.jit
def _places(tile, lane, n1, n2, B0: gl.constexpr, B1: gl.constexpr, B2: gl.constexpr):
    x0, x1, x2 = _corner(tile, n1, n2, B0, B1, B2)
    return x0 + lane // (B1 * B2), x1 + lane // B2 % B1, x2 + lane % B2


@gluon.jit
def _feature(x, S: gl.constexpr):
    if S.FEATURE_MAP == "softmax":
        powers = gl.exp(x - gl.max(x, 1)[:, None])
        return powers / gl.sum(powers, 1)[:, None]
    elif S.FEATURE_MAP == "elu":
        return gl.where(x > 0, x + 1, gl.exp(x))
    else:
        gl.static_assert(S.FEATURE_MAP == "relu", "FEATURE_MAP must be softmax, elu or relu")
        return gl.where(x < 0, 0.0, x)


@gluon.jit
def _attend(
    OUT, LSE, NORM, EPS, BIAS, TABLES, soh, sor, longest,
    ORDER, TURNS, TILES, N_FULL, N_TILES, list_stride, n_list, q_ring, k_ring, v_ring, q_full, q_free, k_full, k_free,
    v_full, v_free, n_text_tiles, n_text_before, n_heads, group, q_before, k_before, length_q, length_k, length_2,
    n_q_tiles, Q0, Q1, Q2, K0, K1, K2, scale, w0, w1, w2, limit, S: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """What a group of four warps does: one half of the queries of each tile."""
    D: gl.constexpr = k_ring.shape[2]
    N: gl.constexpr = k_ring.shape[1]
    SLOTS: gl.constexpr = k_ring.shape[0]
    PER_STEP: gl.constexpr = N // (S.KB[0] * S.KB[1] * S.KB[2])
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    qn1, qn2 = gl.cdiv(Q1, S.QB[1]), gl.cdiv(Q2, S.QB[2])
    kn1, kn2 = gl.cdiv(K1, S.KB[1]), gl.cdiv(K2, S.KB[2])
    last_tile = gl.cdiv(K0, S.KB[0]) * kn1 * kn2 - 1
    n_grid_q, n_grid_k = Q0 * Q1 * Q2, K0 * K1 * K2
    d = gl.arange(0, D, gl.SliceLayout(0, OUTPUT))
    kc = 0
    vc = 0
    turns = gl.load(TURNS + gl.program_id(0))
    h, is_text, tile, q_row, lists, n_tiles, n_full = _work(
        ORDER, TILES, N_FULL, N_TILES, 0, turns, list_stride, n_list, n_text_tiles, n_text_before, n_heads, q_before,
        n_grid_q, n_q_tiles, last_tile, S,
    )  # fmt: skip
    for turn in range(turns):
        next_h, next_is_text, next_tile, next_q_row, next_lists, next_n_tiles, next_n_full = _work(
            ORDER, TILES, N_FULL, N_TILES, turn + 1, turns, list_stride, n_list, n_text_tiles, n_text_before, n_heads,
            q_before, n_grid_q, n_q_tiles, last_tile, S,
        )  # fmt: skip
        n_clean = n_full // PER_STEP
        n_steps = (n_tiles + PER_STEP - 1) // PER_STEP
        end0, end1, end2, n0, n1, n_runs = _runs(is_text, length_k, k_before, n_grid_k, length_2, N)
        p0, p1, p2 = _places(tile, HALF * 64 + gl.arange(0, 64, ROW), qn1, qn2, S.QB[0], S.QB[1], S.QB[2])
        y0, y1, y2 = p0.to(gl.float32), p1.to(gl.float32), p2.to(gl.float32)
        far0, far1, far2 = y0, y1, y2
        if S.IN[0]:
            y0, far0 = _run_of(TABLES, 0, p0, Q0, longest)
        if S.IN[1]:
            y1, far1 = _run_of(TABLES, 1, p1, Q1, longest)
        if S.IN[2]:
            y2, far2 = _run_of(TABLES, 2, p2, Q2, longest)

        # the first keys
        mbarrier.wait(q_full.index(turn % 2), turn // 2 & 1)
        q = q_ring.index(turn % 2 * 2 + HALF)
        slot = kc % SLOTS
        mbarrier.wait(k_full.index(slot), kc // SLOTS & 1)
        none = gl.zeros([64, N], gl.float32, LOGITS)
        s = warpgroup_mma(q, k_ring.index(slot).permute((1, 0)), none, use_acc=False)
        mbarrier.arrive(k_free.index(slot), count=1)
        kc += 1
        if n_clean == 0:
            if n_steps > 0:
                if S.HAS_PARTIAL:
                    s = _hide(
                        s, 0, lists, n_tiles, kn1, kn2, K0, K1, K2, y0, y1, y2, far0, far1, far2, w0, w1, w2, limit,
                        LOGITS, S,
                    )  # fmt: skip
            elif S.HAS_TEXT or S.HAS_EXTRA:
                s = _hide_run(s, 0, end0, end1, end2, n0, n1, LOGITS)
        m = gl.full([64], float("-inf"), gl.float32, ROW)
        weights, m, l, _alpha = _softmax(s, m, gl.zeros([64], gl.float32, ROW), scale)
        p = gl.convert_layout(weights.to(k_ring.dtype), WEIGHTS)
        acc = gl.zeros([64, D], gl.float32, OUTPUT)

        for _ in range(1, n_clean):
            s, acc = _begin(q, p, acc, kc, vc, k_ring, v_ring, k_full, k_free, v_full, LOGITS)
            acc, m, l, p = _end(s, acc, m, l, p, vc, scale, v_free, SLOTS, OUTPUT, WEIGHTS)
            kc += 1
            vc += 1
        if S.HAS_PARTIAL:
            for i in range(gl.maximum(n_clean, 1), n_steps):
                s, acc = _begin(q, p, acc, kc, vc, k_ring, v_ring, k_full, k_free, v_full, LOGITS)
                s = _hide(
                    s, i, lists, n_tiles, kn1, kn2, K0, K1, K2, y0, y1, y2, far0, far1, far2, w0, w1, w2, limit, LOGITS,
                    S,
                )  # fmt: skip
                acc, m, l, p = _end(s, acc, m, l, p, vc, scale, v_free, SLOTS, OUTPUT, WEIGHTS)
                kc += 1
                vc += 1
        if S.HAS_TEXT or S.HAS_EXTRA:
            for i in range((n_steps == 0).to(gl.int32), n_runs):
                s, acc = _begin(q, p, acc, kc, vc, k_ring, v_ring, k_full, k_free, v_full, LOGITS)
                s = _hide_run(s, i, end0, end1, end2, n0, n1, LOGITS)
                acc, m, l, p = _end(s, acc, m, l, p, vc, scale, v_free, SLOTS, OUTPUT, WEIGHTS)
                kc += 1
                vc += 1
        # the last values
        slot = vc % SLOTS
        mbarrier.wait(v_full.index(slot), vc // SLOTS & 1)
        acc = warpgroup_mma(p, v_ring.index(slot), acc)
        mbarrier.arrive(v_free.index(slot), count=1)
        vc += 1
        total = gl.convert_layout(l, OUT_ROW)
        acc = acc / gl.where(total > 0, total, 1.0)[:, None]

        if S.STATE_MODE > 0:  # noqa: SIM102
            if is_text == 0:
                which = h
                if S.STATE_MODE == 2:
                    which = h * n_q_tiles + tile
                norm = gl.load(NORM + which.to(gl.int64) * D + d)
                phi = _feature(q.load(OUTPUT).to(gl.float32), S)
                share = gl.sum(phi * norm[None, :], 1) + gl.load(EPS + h)
                slot = kc % SLOTS
                mbarrier.wait(k_full.index(slot), kc // SLOTS & 1)
                phi = gl.convert_layout(phi.to(k_ring.dtype), WEIGHTS)
                none = gl.zeros([64, D], gl.float32, OUTPUT)
                linear = warpgroup_mma(phi, k_ring.index(slot), none, use_acc=False)
                mbarrier.arrive(k_free.index(slot), count=1)
                kc += 1
                acc += linear / gl.where(share == 0, 1.0, share)[:, None]
        mbarrier.arrive(q_free.index(turn % 2), count=1)
        if S.HAS_BIAS:  # noqa: SIM102
            if is_text == 0:
                acc += gl.load(BIAS + d).to(gl.float32)[None, :]
        lane = HALF * 64 + gl.arange(0, 64, OUT_ROW)
        p0, p1, p2 = _places(tile, lane, qn1, qn2, S.QB[0], S.QB[1], S.QB[2])
        valid = (p0 < Q0) & (p1 < Q1) & (p2 < Q2)
        row = q_before + (p0 * Q1 + p1) * Q2 + p2
        if S.HAS_TEXT:
            end = gl.where(tile < n_text_before, q_before, length_q)
            row = gl.where(is_text, q_row + lane, row)
            valid = gl.where(is_text, q_row + lane < end, valid)
        p_o = OUT + h.to(gl.int64) * soh + row.to(gl.int64)[:, None] * sor + d[None, :]
        gl.store(p_o, acc.to(OUT.dtype.element_ty), mask=valid[:, None])
        if S.HAS_LSE:
            value = (gl.convert_layout(m, OUT_ROW) + gl.log2(total)) * 0.6931471805599453
            gl.store(LSE + h.to(gl.int64) * length_q + row, value, mask=valid)
        h, is_text, tile, q_row = next_h, next_is_text, next_tile, next_q_row
        lists, n_tiles, n_full = next_lists, next_n_tiles, next_n_full


@gluon.jit(do_not_specialize=["n_text_tiles", "n_text_before", "length_2"])
def block_sparse_hopper_kernel(
    Q_BOXES, Q_ROWS, K_BOXES, K_ROWS, V_BOXES, V_ROWS, K2_ROWS, V2_ROWS, STATE, OUT, LSE, NORM, EPS, BIAS, TABLES, soh,
    sor, longest, ORDER, TURNS, TILES, N_FULL, N_TILES, list_stride, n_list, n_text_tiles, n_text_before, n_heads,
    group, q_before, k_before, length_q, length_k, length_2, n_q_tiles, Q0, Q1, Q2, K0, K1, K2, scale, w0, w1, w2,
    limit, D: gl.constexpr, N: gl.constexpr, SLOTS: gl.constexpr, S: gl.constexpr, DTYPE: gl.constexpr,
    LAYOUT: gl.constexpr, REGISTERS: gl.constexpr, FETCHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_ring = gl.allocate_shared_memory(DTYPE, [4, 64, D], LAYOUT)  # two tiles of queries in halves
    k_ring = gl.allocate_shared_memory(DTYPE, [SLOTS, N, D], LAYOUT)
    v_ring = gl.allocate_shared_memory(DTYPE, [SLOTS, N, D], LAYOUT)
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
                OUT, LSE, NORM, EPS, BIAS, TABLES, soh, sor, longest,
                ORDER, TURNS, TILES, N_FULL, N_TILES, list_stride, n_list, q_ring, k_ring, v_ring, q_full, q_free,
                k_full, k_free, v_full, v_free, n_text_tiles, n_text_before, n_heads, group, q_before, k_before,
                length_q, length_k, length_2, n_q_tiles, Q0, Q1, Q2, K0, K1, K2, scale, w0, w1, w2, limit, S, 0,
            )),
            (_attend, (
                OUT, LSE, NORM, EPS, BIAS, TABLES, soh, sor, longest,
                ORDER, TURNS, TILES, N_FULL, N_TILES, list_stride, n_list, q_ring, k_ring, v_ring, q_full, q_free,
                k_full, k_free, v_full, v_free, n_text_tiles, n_text_before, n_heads, group, q_before, k_before,
                length_q, length_k, length_2, n_q_tiles, Q0, Q1, Q2, K0, K1, K2, scale, w0, w1, w2, limit, S, 1,
            )),
            (_fetch, (
                Q_BOXES, Q_ROWS, K_BOXES, K_ROWS, V_BOXES, V_ROWS, K2_ROWS, V2_ROWS, STATE,
                ORDER, TURNS, TILES, N_FULL, N_TILES, list_stride, n_list, q_ring, k_ring, v_ring, q_full, q_free,
                k_full, k_free, v_full, v_free, n_text_tiles, n_text_before, n_heads, group, q_before, k_before,
                length_k, length_2, n_q_tiles, Q0, Q1, Q2, K0, K1, K2, S,
            )),
        ],
        [4, 1],
        [REGISTERS, FETCHER_REGISTERS],
    )  # fmt: skip
