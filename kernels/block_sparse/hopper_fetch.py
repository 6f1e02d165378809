# mypy: allow-untyped-defs, allow-incomplete-defs
"""Producer warp of the Hopper kernel: copies tiles of queries, keys and values to rings in shared memory, by tensor
descriptor, as their slots become free."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

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

__all__ = ["fetch"]

# two names have changed since Triton 3.6
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _view(x, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    if RENAMED:
        return x.reinterpret(x.dtype, SHAPE, LAYOUT)
    else:
        return x._reinterpret(x.dtype, SHAPE, LAYOUT)


@gluon.jit
def _copy(DESC, h, x0, x1, x2, bar, slot, FIRST: gl.constexpr, BOX: gl.constexpr):
    """Copy a tile of the grid (or rows, with a BOX of length 3) to the rows from FIRST on of a slot (rows, D), 64
    columns at a time."""
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
    """Fill a slot with one tile or two."""
    VOLUME: gl.constexpr = BOX[1] * BOX[2] * BOX[3]
    _copy(DESC, h, x0, x1, x2, bar, slot, 0, BOX)
    if slot.shape[0] > VOLUME:
        _copy(DESC, h, z0, z1, z2, bar, slot, VOLUME, BOX)


@gluon.jit
def _claim(count, full, free, SLOTS: gl.constexpr, BYTES: gl.constexpr):
    """Wait until the next slot of a ring is free; return it and its barrier, set to expect BYTES."""
    slot = count % SLOTS
    mbarrier.wait(free.index(slot), (count // SLOTS & 1) ^ 1)
    mbarrier.expect(full.index(slot), BYTES)
    return slot, full.index(slot)


@gluon.jit
def _copy_interval(ROWS, ROWS_2, h, row, i_row, n1, bar, slot, S: gl.constexpr):
    """Copy global keys from a row on; intervals from n1 on are pooled keys. Absent tensors have no descriptor."""
    N: gl.constexpr = slot.shape[0]
    BOX: gl.constexpr = [1, N, 64]
    if not S.HAS_GLOBAL:
        _copy(ROWS_2, h, (i_row - n1) * N, 0, 0, bar, slot, 0, BOX)
    else:
        if not S.HAS_POOLED:
            _copy(ROWS, h, row, 0, 0, bar, slot, 0, BOX)
        else:
            if i_row >= n1:
                _copy(ROWS_2, h, (i_row - n1) * N, 0, 0, bar, slot, 0, BOX)
            else:
                _copy(ROWS, h, row, 0, 0, bar, slot, 0, BOX)


@gluon.jit
def fetch(
    q_boxes, q_rows, k_boxes, k_rows, v_boxes, v_rows, pooled_k_rows, pooled_v_rows, states, schedule, lists, q_ring,
    k_ring, v_ring, q_full, q_free, k_full, k_free, v_full, v_free, sizes, n_heads, group, n_q_tiles, queries, keys,
    S: gl.constexpr,
):  # fmt: skip
    """Main loop of the producer warp."""
    D: gl.constexpr = S.D
    N: gl.constexpr = S.N
    SLOTS: gl.constexpr = S.SLOTS
    BOX: gl.constexpr = [1, S.KB[0], S.KB[1], S.KB[2], 64]
    PER_STEP: gl.constexpr = N // (S.KB[0] * S.KB[1] * S.KB[2])
    BYTES: gl.constexpr = N * D * 2
    # half of a query tile, along its first axis longer than one
    H0: gl.constexpr = S.QB[0] // 2 if S.QB[0] > 1 else 1
    H1: gl.constexpr = S.QB[1] if S.QB[0] > 1 else (S.QB[1] // 2 if S.QB[1] > 1 else 1)
    H2: gl.constexpr = S.QB[2] if S.QB[0] * S.QB[1] > 1 else S.QB[2] // 2
    D0: gl.constexpr = H0 if S.QB[0] > 1 else 0
    D1: gl.constexpr = H1 if S.QB[0] == 1 and S.QB[1] > 1 else 0
    D2: gl.constexpr = H2 if S.QB[0] * S.QB[1] == 1 else 0
    qn1, qn2 = gl.cdiv(queries.g1, S.QB[1]), gl.cdiv(queries.g2, S.QB[2])
    kn1, kn2 = gl.cdiv(keys.g1, S.KB[1]), gl.cdiv(keys.g2, S.KB[2])
    n_grid_k = keys.g0 * keys.g1 * keys.g2
    n_global_tiles = sizes.n_global_tiles
    kc = 0
    vc = 1
    # placeholder values for the weights before the first step, which are zero
    slot, bar = _claim(0, v_full, v_free, SLOTS, BYTES)
    _copy_step(v_boxes, 0, 0, 0, 0, 0, 0, 0, bar, v_ring.index(slot), BOX)
    turns = gl.load(schedule.turns + gl.program_id(0))
    # prefetched one turn or one step ahead: a load takes as long as half a step
    item, next_item = item_of(schedule, 0, turns), item_of(schedule, 1, turns)
    n_tiles, _n_full = counts(lists, item, n_global_tiles, n_heads, n_q_tiles, S)
    p_list = list_of(lists, item, n_global_tiles, n_heads, n_q_tiles)
    box0, box1 = listed(p_list, 0, n_tiles), listed(p_list, 1, n_tiles)
    state = 0
    has_state = turns < 0
    for turn in range(turns):
        h, tile, is_global = tile_of(item, n_global_tiles, n_heads, n_q_tiles)
        next_n_tiles, _next_n_full = counts(lists, next_item, n_global_tiles, n_heads, n_q_tiles, S)
        p_next_list = list_of(lists, next_item, n_global_tiles, n_heads, n_q_tiles)
        after_next = item_of(schedule, turn + 2, turns)
        hk = h // group
        slot, bar = _claim(turn, q_full, q_free, 2, 128 * D * 2)
        if S.HAS_GLOBAL and is_global:
            row = first_global_row(tile, sizes.n_global_before, queries)
            for half in gl.static_range(2):
                q = q_ring.index(slot * 2 + half)
                _copy(q_rows, h, row + half * 64, 0, 0, bar, q, 0, [1, 64, 64])
        else:
            x0, x1, x2 = corner(tile, qn1, qn2, S.FLAT, S.QB[0], S.QB[1], S.QB[2])
            for half in gl.static_range(2):
                q = q_ring.index(slot * 2 + half)
                y0, y1, y2 = x0 + half * D0, x1 + half * D1, x2 + half * D2
                _copy(q_boxes, h, y0, y1, y2, bar, q, 0, [1, H0, H1, H2, 64])
        n_steps = (n_tiles + PER_STEP - 1) // PER_STEP
        _end0, _end1, _end2, n0, n1, n_interval_steps = key_intervals(is_global, keys, sizes.n_pooled, N)
        if not (S.HAS_GLOBAL or S.HAS_POOLED):
            n_interval_steps = 0
        for i in range(n_steps + n_interval_steps):
            x0, x1, x2 = corner(box0, kn1, kn2, S.FLAT, S.KB[0], S.KB[1], S.KB[2])
            z0, z1, z2 = corner(box1, kn1, kn2, S.FLAT, S.KB[0], S.KB[1], S.KB[2])
            inside = i + 1 < n_steps
            p_coming = gl.where(inside, p_list, p_next_list)
            n_coming = gl.where(inside, n_tiles, next_n_tiles)
            next_n_steps = (next_n_tiles + PER_STEP - 1) // PER_STEP
            place = PER_STEP * gl.where(
                inside, serpentine_step(i + 1, n_steps, turn), serpentine_step(0, next_n_steps, turn + 1)
            )
            box0 = listed(p_coming, place, n_coming)
            if PER_STEP == 2:
                box1 = listed(p_coming, place + 1, n_coming)
            k_slot, k_bar = _claim(kc, k_full, k_free, SLOTS, BYTES)
            kc += 1
            if i < n_steps:
                _copy_step(k_boxes, hk, x0, x1, x2, z0, z1, z2, k_bar, k_ring.index(k_slot), BOX)
                v_slot, v_bar = _claim(vc, v_full, v_free, SLOTS, BYTES)
                _copy_step(v_boxes, hk, x0, x1, x2, z0, z1, z2, v_bar, v_ring.index(v_slot), BOX)
            else:
                if S.HAS_GLOBAL or S.HAS_POOLED:
                    i_row = i - n_steps
                    row = i_row * N
                    if i_row >= n0:
                        row = keys.before + n_grid_k + (i_row - n0) * N
                    _copy_interval(k_rows, pooled_k_rows, hk, row, i_row, n1, k_bar, k_ring.index(k_slot), S)
                    v_slot, v_bar = _claim(vc, v_full, v_free, SLOTS, BYTES)
                    _copy_interval(v_rows, pooled_v_rows, hk, row, i_row, n1, v_bar, v_ring.index(v_slot), S)
            vc += 1
            # the linear branch's matrix is loaded as an extra step of keys, after the next tile's first step
            if S.STATE != "none":  # noqa: SIM102
                if (i == 0) & has_state:
                    slot, bar = _claim(kc, k_full, k_free, SLOTS, D * D * 2)
                    _copy(states, state, 0, 0, 0, bar, k_ring.index(slot), 0, [1, D, 64])
                    kc += 1
        has_state = is_global == 0
        state = h
        if S.STATE == "of each tile":
            state = h * n_q_tiles + tile
        item, next_item = next_item, after_next
        n_tiles, p_list = next_n_tiles, p_next_list
    # placeholder keys, so that the last tile is finished like all others
    slot, bar = _claim(kc, k_full, k_free, SLOTS, BYTES)
    _copy_step(k_boxes, 0, 0, 0, 0, 0, 0, 0, bar, k_ring.index(slot), BOX)
    kc += 1
    if S.STATE != "none":  # noqa: SIM102
        if has_state:
            slot, bar = _claim(kc, k_full, k_free, SLOTS, D * D * 2)
            _copy(states, state, 0, 0, 0, bar, k_ring.index(slot), 0, [1, D, 64])
