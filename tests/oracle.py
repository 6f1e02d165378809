"""Token-by-token implementation of the mechanisms in float64 NumPy, written from the papers.

Shares no code with the library: tiles, pooling and windows are implemented separately.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from functools import cache

import numpy as np

MARGINS: list[float] = []  # score of the last selected block minus that of the first rejected one, per selection


def coordinates(grid):
    """Return the coordinates of the grid tokens in raster order."""
    return list(itertools.product(*(range(n) for n in grid)))


def _array(x):
    return None if x is None else x.detach().double().numpy()


def _softmax_over(q, keys, values, bias):
    """Attend one query to some keys; ``bias`` is added to the logits."""
    if len(keys) == 0:
        return np.zeros(values.shape[-1])
    logits = keys @ q + bias
    weights = np.exp(logits - logits.max())
    return weights @ values / weights.sum()


def _ranked(score, *cuts):
    """Return positions in descending order of score. Record the margin at each cut between two of them."""
    order = np.argsort(-np.asarray(score), kind="stable")
    MARGINS.extend(score[order[n - 1]] - score[order[n]] for n in cuts if 0 < n < len(order))
    return list(order)


def attend(query, key, value, key_mask, scale, select):
    """Attend each query to the keys that ``select`` returns, without masked ones.

    ``select(b, h, token)`` → (indices of keys, pooled keys, pooled values, bias of the pooled keys).
    """
    q, k, v = map(_array, (query, key, value))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = np.zeros_like(q)
    for b, h, t in itertools.product(*map(range, q.shape[:3])):
        tokens, pooled_key, pooled_value, bias = select(b, h, t)
        tokens = [i for i in tokens if key_mask is None or key_mask[b, i]]
        keys = np.concatenate([k[b, h, tokens], pooled_key]) if len(pooled_key) else k[b, h, tokens]
        values = np.concatenate([v[b, h, tokens], pooled_value]) if len(pooled_value) else v[b, h, tokens]
        out[b, h, t] = _softmax_over(q[b, h, t] * scale, keys, values, np.concatenate([np.zeros(len(tokens)), bias]))
    return out


def _expand(x, n):
    return tuple(x) if isinstance(x, (tuple, list)) else (x,) * n


def gna(query, key, value, layout, *, window, stride=1, dilation=1, is_causal=False, key_mask=None, scale=None):
    grid_tokens = coordinates(layout.grid)
    columns = [_expand(x, len(layout.grid)) for x in (window, stride, dilation, is_causal)]

    def along(x, length, w, s, d, causal):
        own = [y for y in range(length) if y % d == x % d]  # the dilation group
        i, size = own.index(x), len(own)
        if causal:
            leader = min((i // s) * s + s - 1, size - 1)
            return {own[j] for j in range(size) if j <= i and leader - j < w}
        leader = min((i // s) * s + s // 2, size - 1)
        left, right = w // 2, w // 2 + (w % 2 - 1)
        centre = min(max(leader, left), size - 1 - right)
        return {own[j] for j in range(centre - left, centre + right + 1)}

    def select(b, h, t):
        if not layout.before <= t < layout.before + len(grid_tokens):
            return range(layout.seq_len), [], [], []
        sets = [along(*args) for args in zip(grid_tokens[t - layout.before], layout.grid, *columns, strict=True)]
        near = [
            i + layout.before
            for i, token in enumerate(grid_tokens)
            if all(x in s for x, s in zip(token, sets, strict=True))
        ]
        return _global_tokens(layout) + near, [], [], []

    return attend(query, key, value, key_mask, scale, select)


def _global_tokens(layout):
    return [*range(layout.before), *range(layout.before + math.prod(layout.grid), layout.seq_len)]


def clear(query, key, value, layout, *, radius, down_factor=1, pool_weight=None, key_mask=None, scale=None):
    grid_tokens, first = coordinates(layout.grid), layout.before
    radii = _expand(radius, len(layout.grid))
    k, v, weight, f = _array(key), _array(value), _array(pool_weight), down_factor
    weight = np.full((f, f), 1 / f**2) if weight is None else weight
    exact = [Fraction(str(r)) if math.isfinite(r) else None for r in radii]  # 2.6 is 13/5

    @cache
    def within(*distances):
        return sum((x / r) ** 2 for x, r in zip(distances, exact, strict=True) if r) < 1

    def inside(a, b):
        return within(*(abs(x - y) for x, y in zip(a, b, strict=True)))

    def pooled(b):
        """Yield, for each pooling tile, its tokens and their weights."""
        tiles = {}
        for i, token in enumerate(grid_tokens):
            tiles.setdefault((*token[:-2], token[-2] // f, token[-1] // f), []).append(i)
        for members in tiles.values():
            members = [i for i in members if key_mask is None or key_mask[b, first + i]]
            w = np.array([weight[grid_tokens[i][-2] % f, grid_tokens[i][-1] % f] for i in members])
            if len(members):
                yield [first + i for i in members], w if len(w) == f * f else w * weight.sum() / w.sum()

    def select(b, h, t):
        if not first <= t < first + len(grid_tokens):
            return range(layout.seq_len), [], [], []
        near = [first + i for i, token in enumerate(grid_tokens) if inside(token, grid_tokens[t - first])]
        if f == 1:
            return _global_tokens(layout) + near, [], [], []
        tiles = list(pooled(b))
        pooled_key_value = [np.array([w @ x[b, h, tokens] for tokens, w in tiles]) for x in (k, v)]
        return _global_tokens(layout) + near, *pooled_key_value, np.zeros(len(tiles))

    return attend(query, key, value, key_mask, scale, select)


def cut(grid, tile):
    """Return the raster indices of the tokens in each tile of these sides, tiles in raster order."""
    found = {}
    for i, token in enumerate(coordinates(grid)):
        found.setdefault(tuple(x // side for x, side in zip(token, tile, strict=True)), []).append(i)
    return [found[name] for name in sorted(found)]


def sla(
    query,
    key,
    value,
    layout,
    *,
    critical=0.05,
    negligible=0.10,
    block_q=64,
    block_kv=64,
    feature_map="softmax",
    linear_over="marginal",
    smooth_key=False,
    boxes=None,
    weight=None,
    bias=None,
    key_mask=None,
    scale=None,
):
    """Compute SLA; ``boxes``: sides of the query tiles and the key tiles if blocks are tiles of the grid."""
    q, k, v, weight, bias = map(_array, (query, key, value, weight, bias))
    n, first = math.prod(layout.grid), layout.before
    q_blocks, k_blocks = (
        [list(range(i, min(i + size, n))) for i in range(0, n, size)]
        if boxes is None
        else cut(layout.grid, boxes[side])
        for side, size in enumerate((block_q, block_kv))
    )

    def phi(x):
        if feature_map == "softmax":
            e = np.exp(x - x.max())
            return e / e.sum()
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) if feature_map == "elu" else np.maximum(x, 0)

    def valid(b, block):
        return [first + i for i in block if key_mask is None or key_mask[b, first + i]]

    critical_of, marginal_of = {}, {}
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        blocks = [tokens for tokens in (valid(b, block) for block in k_blocks) if tokens]
        everything = [t for tokens in blocks for t in tokens]
        mean = k[b, h, everything].mean(0) if smooth_key and everything else 0
        m = len(blocks)
        for block in q_blocks:
            tokens_q = valid(b, block)
            score = [
                q[b, h, tokens_q].mean(0) @ (k[b, h, tokens].mean(0) - mean) if tokens_q else 0.0 for tokens in blocks
            ]
            n_high, n_rest = max(1, int(critical * m)), m - int(negligible * m)
            order = _ranked(score, *((n_high, n_rest) if tokens_q else ()))
            high, low = order[:n_high], order[n_rest:]
            middle = [i for i in range(m) if i not in high and i not in low]
            for i in block:
                critical_of[b, h, first + i] = [t for j in high for t in blocks[j]]
                marginal_of[b, h, first + i] = (
                    everything if linear_over == "all" else [t for j in middle for t in blocks[j]]
                )

    def select(b, h, t):
        if (b, h, t) not in critical_of:
            return range(layout.seq_len), [], [], []
        return _global_tokens(layout) + critical_of[b, h, t], [], [], []

    out = attend(query, key, value, key_mask, scale, select)
    for (b, h, t), tokens in marginal_of.items():
        if key_mask is not None and not key_mask[b].any():
            continue
        linear = np.zeros(q.shape[-1])
        if weight is not None and tokens:
            weights = np.array([phi(q[b, h, t]) @ phi(k[b, h, i]) for i in tokens])
            linear = weight @ (weights @ v[b, h, tokens] / (weights.sum() + 1e-5))
        out[b, h, t] += linear + (0 if bias is None else bias)
    return out


def llsa(query, key, value, layout, *, boxes, topk=8, enrich=True, key_mask=None, scale=None, **_):
    """Compute LLSA; ``boxes``: sides of the tile of a pooled token of level 1, 2, …, in tokens."""
    q, k, v = map(_array, (query, key, value))
    first = layout.before
    levels = [[[i] for i in range(math.prod(layout.grid))]] + [cut(layout.grid, box) for box in boxes]
    top = len(boxes)
    names = [{i: n for n, tokens in enumerate(level) for i in tokens} for level in levels]

    def valid(b, tokens):
        return [first + i for i in tokens if key_mask is None or key_mask[b, first + i]]

    def mean(x, b, h, tokens):
        tokens = valid(b, tokens)
        return x[b, h, tokens].mean(0) if tokens else np.zeros(x.shape[-1])

    selection = {}

    def select_blocks(b, h, block):
        """Return the tokens that a level-1 block attends to, and its pooled tokens as (level, number)."""
        if (b, h, block) not in selection:
            token, pooled = levels[1][block][0], []
            candidates = range(len(levels[top]))
            for level in range(top, 0, -1):
                candidates = [n for n in candidates if valid(b, levels[level][n])]
                pooled += [(level, n) for n in candidates]
                pooled_q = mean(q, b, h, levels[level][names[level][token]])
                score = [pooled_q @ mean(k, b, h, levels[level][n]) for n in candidates]
                tokens_q = valid(b, levels[1][block])
                kept = [candidates[i] for i in _ranked(score, *((topk,) if tokens_q else ()))[:topk]]
                below = level - 1
                candidates = [n for n, tokens in enumerate(levels[below]) if names[level][tokens[0]] in kept]
            selection[b, h, block] = candidates, pooled
        return selection[b, h, block]

    def select(b, h, t):
        if not first <= t < first + math.prod(layout.grid):
            return range(layout.seq_len), [], [], []
        fine, pooled = select_blocks(b, h, names[1][t - first])
        tokens = _global_tokens(layout) + [first + i for i in fine]
        if not enrich:
            return tokens, [], [], []
        groups = [levels[level][n] for level, n in pooled]
        pooled_key_value = [np.array([mean(x, b, h, tokens) for tokens in groups]) for x in (k, v)]
        return tokens, *pooled_key_value, np.log([len(valid(b, tokens)) for tokens in groups])

    return attend(query, key, value, key_mask, scale, select)


def dense(query, key, value, key_mask=None, scale=None):
    length = query.shape[2]
    return attend(query, key, value, key_mask, scale, lambda b, h, t: (range(length), [], [], []))
