"""Softmax attention of query tiles, each over its own list of keys, in plain torch.

All mechanisms share this softmax and differ only in the lists. Keys and values are gathered tile by tile: memory and
arithmetic grow with the number of computed logits, and no (S, S) tensor exists, forward or backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["TileRows", "Tiles", "every_key", "tile_attention"]

CHUNK_BYTES = 32 * 2**20  # working set of one step


class TileRows(NamedTuple):
    """Row indices of n consecutive tiles. The leading axis is 1, or B (B*H if each head has its own lists).

    queries: (1|G, n, nq) int64; an index equal to the number of query rows is padding.
    keys: (1|G, n, nk) int64; None = the first ``n_keys`` rows.
    visible: (1|G, 1|n, 1|nq, nk) bool; None = each query of a tile attends to each key of its list.
    """

    queries: Tensor
    keys: Tensor | None
    visible: Tensor | None


@dataclass(frozen=True)
class Tiles:
    """``count`` tiles of one shape; ``rows(start, stop)`` returns the row indices of a range of them."""

    count: int
    n_queries: int
    n_keys: int
    rows: Callable[[int, int], TileRows]
    gathers: bool = True


def every_key(queries: Tensor, n_keys: int) -> Tiles:
    """Tiles of queries (n,) that attend to the first ``n_keys`` keys."""
    return Tiles(
        count=queries.numel(),
        n_queries=1,
        n_keys=n_keys,
        rows=lambda start, stop: TileRows(queries[None, None, start:stop], None, None),
        gathers=False,
    )


def tile_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Sequence[Tiles],
    *,
    scale: float,
    key_bias: Tensor | None = None,
    may_have_empty_rows: bool = False,
    per_head: bool = False,
) -> Tensor:
    """Softmax attention over the key list of each query tile; the tiles of ``plan`` contain each query once.

    Args:
        query: (B, H, Sq, D), any strides.
        key, value: (B, H, Sk, D).
        plan: tiles of queries with their keys.
        scale: factor on the logits.
        key_bias: (1 or B, Sk) float32, added to the logits of a key; -inf masks it. None = no bias.
        may_have_empty_rows: whether all keys of a query may be masked.
        per_head: whether each head has its own lists.
    Returns: (B, H, Sq, D) in query.dtype; a row without a visible key is 0.
    """
    if scale < 0:  # flash attention on a GPU takes the maximum of the logits before it scales them
        query, scale = -query, -scale
    batch, heads = query.shape[:2]
    if key_bias is not None and key_bias.shape[0] > 1 and per_head:
        key_bias = key_bias.repeat_interleave(heads, 0)
    q, k, v = (_to_rows(x, per_head) for x in (query, key, value))
    out = _TileAttention.apply(q, k, v, key_bias, plan, scale, may_have_empty_rows)
    return out.view(batch, heads, *out.shape[1::2]) if per_head else out.transpose(1, 2)


def _to_rows(x: Tensor, per_head: bool) -> Tensor:
    """Reshape (B, H, S, D) to contiguous (G, S, W, D): (B, S, H, D), or (B*H, S, 1, D) with lists per head."""
    return x.reshape(-1, x.shape[2], 1, x.shape[3]).contiguous() if per_head else x.transpose(1, 2).contiguous()


class _TileAttention(torch.autograd.Function):
    """Attention over tensors (G, S, W, D): W heads side by side in a row, G groups with a list each."""

    @staticmethod
    def forward(query, key, value, key_bias, plan, scale, may_have_empty_rows):
        # one row more than there are queries, as the target of padding entries
        groups, n_rows, heads, dim = query.shape
        out = query.new_empty(groups, n_rows + 1, heads, dim)
        scratch = _Scratch(query)
        for tiles, rows in _chunks(plan, query, backward=False):
            q, k, v = _read(rows, tiles, query, key, value, scratch)
            mask, nonempty = _mask(rows, tiles, key_bias, query, may_have_empty_rows)
            if mask is not None and mask.dtype != q.dtype and q.device.type != "cpu":
                q, k, v = q.to(mask.dtype), k.to(mask.dtype), v.to(mask.dtype)  # only the CPU accepts mixed dtypes
            o = _softmax_attention(q, k, v, mask, scale)
            if nonempty is not None:
                o = o.masked_fill(~nonempty, 0)
            flat = _flat_index(rows.queries, groups, n_rows + 1)
            out.view(-1, heads * dim).index_copy_(0, flat, o.transpose(1, 2).reshape(-1, heads * dim).to(out.dtype))
        return out[:, :n_rows]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        query, key, value, key_bias, ctx.plan, ctx.scale, ctx.may_have_empty_rows = inputs
        ctx.save_for_backward(query, key, value, key_bias)

    @staticmethod
    def backward(ctx, grad):
        query, key, value, key_bias = ctx.saved_tensors
        acc = torch.promote_types(query.dtype, torch.float32)
        grad = grad.contiguous()
        sums = [torch.zeros(x.shape, dtype=acc, device=x.device) for x in (query, key, value)]
        scratch = _Scratch(query)
        for tiles, rows in _chunks(ctx.plan, query, backward=True):
            q, k, v = (x.to(acc) for x in _read(rows, tiles, query, key, value, scratch))
            g = _gather(grad, rows.queries, scratch, 3).to(acc)
            valid = (rows.queries < grad.shape[1]).expand(len(grad), -1, -1)
            g = g * valid.flatten(0, 1)[:, None, :, None]
            mask, nonempty = _mask(rows, tiles, key_bias, query, ctx.may_have_empty_rows)
            d_q, d_k, d_v = _softmax_backward(q, k, v, g, mask, nonempty, ctx.scale)
            _add(sums[0], rows.queries, d_q)
            _add(sums[1], rows.keys, d_k)
            _add(sums[2], rows.keys, d_v)
        d_qkv = (total.to(x.dtype) for total, x in zip(sums, (query, key, value), strict=True))
        return (*d_qkv, None, None, None, None)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention softmax(q kᵀ scale + mask) v."""
    if mask is None or q.device.type == "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    # torch 2.11 on an H200: with a mask that is broadcast over the queries, half-precision rows came out as NaN
    acc = torch.promote_types(q.dtype, torch.float32)
    return (torch.softmax((q.to(acc) @ k.to(acc).mT) * scale + mask, -1) @ v.to(acc)).to(q.dtype)


def _softmax_backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor | None, nonempty: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of softmax(q kᵀ scale + mask) v."""
    if nonempty is not None:
        grad = grad.masked_fill(~nonempty, 0)
    logits = (q @ k.mT) * scale
    p = torch.softmax(logits if mask is None else logits + mask, -1)
    d_p = grad @ v.mT
    d_logits = p * (d_p - (p * d_p).sum(-1, keepdim=True)) * scale
    return d_logits @ k, d_logits.mT @ q, p.mT @ grad


def _chunks(plan: Sequence[Tiles], query: Tensor, *, backward: bool) -> Iterator[tuple[Tiles, TileRows]]:
    """Split the tiles into chunks with a working set of about CHUNK_BYTES."""
    groups, _, heads, dim = query.shape
    for tiles in plan:
        per_tile = tiles.n_queries * dim * 2
        if tiles.gathers:
            per_tile += tiles.n_keys * dim * 2
        if backward:
            per_tile = 2 * per_tile + tiles.n_queries * tiles.n_keys * 4
        per_tile = groups * (heads * per_tile + tiles.n_queries * tiles.n_keys // 4)
        step = max(1, CHUNK_BYTES // (per_tile * max(query.element_size(), 4)))
        for start in range(0, tiles.count, step):
            yield tiles, tiles.rows(start, min(start + step, tiles.count))


def _flat_index(index: Tensor, groups: int, length: int) -> Tensor:
    """Flatten (1|G, n, m) rows of each group to rows of (G*length, ...)."""
    if groups > 1:
        index = index + torch.arange(groups, device=index.device).view(-1, 1, 1) * length
    return index.reshape(-1)


class _Scratch:
    """Buffers reused between steps: fresh pages cost more than the data copied into them."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[int, Tensor] = {}

    def get(self, slot: int, rows: int, width: int) -> Tensor:
        size = rows * width
        if slot not in self.buffers or self.buffers[slot].numel() < size:
            self.buffers[slot] = self.like.new_empty(size)
        return self.buffers[slot][:size].view(rows, width)


def _gather(x: Tensor, index: Tensor, scratch: _Scratch, slot: int) -> Tensor:
    """Gather x (G, S, W, D) at index (1|G, n, m) → (G*n, W, m, D); an index past the end reads the last row."""
    groups, length, heads, dim = x.shape
    flat = _flat_index(index.clamp(max=length - 1), groups, length)
    rows = torch.index_select(x.view(-1, heads * dim), 0, flat, out=scratch.get(slot, len(flat), heads * dim))
    return rows.view(-1, index.shape[2], heads, dim).transpose(1, 2)


def _read(
    rows: TileRows, tiles: Tiles, query: Tensor, key: Tensor, value: Tensor, scratch: _Scratch
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value rows of the tiles, (G*n, W, nq or nk, D) each."""
    q = _gather(query, rows.queries, scratch, 0)
    if rows.keys is None:
        return q, key[:, : tiles.n_keys].transpose(1, 2), value[:, : tiles.n_keys].transpose(1, 2)
    return q, _gather(key, rows.keys, scratch, 1), _gather(value, rows.keys, scratch, 2)


def _mask(
    rows: TileRows, tiles: Tiles, key_bias: Tensor | None, query: Tensor, may_have_empty_rows: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Additive mask of the logits, (1|G*n, 1, 1|nq, nk), and the queries with a visible key (None: all)."""
    if key_bias is None and rows.visible is None:
        return None, None
    mask = torch.zeros((), dtype=query.dtype, device=query.device)
    if key_bias is not None:
        found = key_bias[:, None, : tiles.n_keys] if rows.keys is None else _bias_of(key_bias, rows.keys)
        # SDPA needs a float32 mask with 16-bit queries, and a float64 mask with float64 queries
        mask = found[:, :, None].to(torch.promote_types(query.dtype, torch.float32))
    if rows.visible is not None:
        mask = torch.where(rows.visible, mask, -torch.inf)
    nonempty = None
    if may_have_empty_rows:
        nonempty = (mask > -torch.inf).any(-1, keepdim=True)
        mask = mask.masked_fill(~nonempty, 0)
        nonempty = _batched(nonempty, query, rows)
    return _batched(mask, query, rows), nonempty


def _bias_of(key_bias: Tensor, keys: Tensor) -> Tensor:
    """Gather key_bias (1|G, Sk) at keys (1|G, n, nk) → (1|G, n, nk)."""
    if len(key_bias) == 1 or len(keys) == 1:
        return key_bias[:, keys[0]] if len(keys) == 1 else key_bias[0][keys]
    return key_bias.gather(1, keys.flatten(1)).view(keys.shape)


def _batched(mask: Tensor, query: Tensor, rows: TileRows) -> Tensor:
    """Reshape (1|G, 1|n, nq, nk) → (1|G*n, 1, nq, nk)."""
    if mask.shape[:2].numel() > 1:
        mask = mask.expand(len(query), rows.queries.shape[1], -1, -1)
    return mask.flatten(0, 1)[:, None]


def _add(out: Tensor, index: Tensor | None, x: Tensor) -> None:
    """Add x (G*n, W, m, D) to rows ``index`` of out (G, S, W, D), or to the first m rows."""
    groups, length, heads, dim = out.shape
    if index is None:
        out[:, : x.shape[2]] += x.transpose(1, 2)
        return
    flat = _flat_index(index.clamp(max=length - 1), groups, length)
    rows = x.transpose(1, 2).reshape(-1, heads * dim)
    out.view(-1, heads * dim).scatter_add_(0, flat[:, None].expand(rows.shape), rows)
