"""LLSA: log-linear sparse attention through a tree of pooled tokens (arXiv 2512.16615)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.block_linear.reference import gather_rows
from dit_accel.kernels.block_sparse.reference import TileRows, Tiles, tile_attention
from dit_accel.layout import TokenLayout

from ._common import (
    check_positive_int,
    global_index,
    global_logits,
    global_tiles,
    mask_bias,
    softmax_rows,
    zero_masked,
)
from ._controls import Control
from ._inputs import AttentionInputs
from ._llsa_triton import llsa_attention_triton, llsa_attention_triton_backward
from ._search import SearchSpace
from ._tree import Level, default_levels, level_grids, make_tree, tile_shapes
from ._workloads import Workload
from .processor import AcceleratedAttnProcessor
from .registry import attention_function, reference_function, register_processor

__all__ = ["LLSAAttnProcessor", "llsa_attention", "reference"]


@register_processor
@dataclass(frozen=True, kw_only=True)
class LLSAAttnProcessor(AcceleratedAttnProcessor):
    """Log-linear hierarchical sparse attention. [LLSA, arXiv 2512.16615]

    Tokens are pooled block by block to a tree; from its top down each query block keeps the ``topk`` pooled keys with
    the highest dot product. A token attends to the tokens of the blocks that its block kept and, with ``enrich``, to
    the pooled tokens considered on the way, with log(number of tokens that they cover) added to their logits.

    Args:
        block_size: tokens in a block, and pooled tokens in a block of the next level.
        topk: blocks that a query block keeps at each level; all if there are fewer.
        levels: levels of pooled tokens; None = the fewest that leave at most 64·topk tokens at the top.
        enrich: whether to attend to pooled tokens.
    """

    block_size: int = 16
    topk: int = 8
    levels: int | None = None
    enrich: bool = True

    name: ClassVar[str] = "llsa"
    label: ClassVar[str] = "LLSA"
    summary: ClassVar[str] = "top-k blocks, selected from coarse to fine"
    paper: ClassVar[str] = "arXiv 2512.16615"
    backends: ClassVar[tuple[str, ...]] = ("torch", "triton")
    backward_backends: ClassVar[tuple[str, ...]] = ("triton",)

    workloads: ClassVar[tuple[Workload, ...]] = (
        Workload(
            "llsa-256", "LLSA, 256×256 pixels", 12, 64, TokenLayout((256, 256)),
            {"block_size": 16, "topk": 8, "levels": 2}, {"forward": 30.0, "backward": 20.0},
        ),
        Workload(
            "llsa-256-wide", "LLSA, 256×256 pixels", 24, 128, TokenLayout((256, 256)),
            {"block_size": 16, "topk": 8, "levels": 2}, {"forward": 30.0, "backward": None},
        ),
        *(  # number of levels: default for each size
            Workload(
                f"llsa-{side}x{side}", f"LLSA, {side}×{side}", 8, 64, TokenLayout((side, side)),
                {"block_size": 16, "topk": 8}, {"scaling": None},
            )
            for side in (64, 96, 128, 192, 256, 384, 512, 768, 1024)
        ),
    )  # fmt: skip
    comparison_grid: ClassVar[tuple[int, ...]] = (64, 64)

    def check(self) -> None:
        check_positive_int("block_size", self.block_size, least=2)
        check_positive_int("topk", self.topk)
        if self.levels is not None:
            check_positive_int("levels", self.levels)
        if not isinstance(self.enrich, bool):
            raise TypeError(f"enrich must be True or False, got {self.enrich!r}")

    def fit(self, layout: TokenLayout) -> LLSAAttnProcessor:
        """Cap the levels to those that lead to a single token at the top."""
        if self.levels is None:
            return self
        grids = level_grids(layout.grid, tile_shapes(layout.grid, self.block_size, self.levels))
        levels = next((i for i, grid in enumerate(grids[1:], 1) if math.prod(grid) == 1), self.levels)
        return replace(self, levels=levels)

    def count_logits(self, layout: TokenLayout) -> float:
        """Return the logits per batch element and head, global and pooled tokens included. The kept blocks depend on
        the data: a short block counts as an average one."""
        levels = self._n_levels(layout)
        grids = level_grids(layout.grid, tile_shapes(layout.grid, self.block_size, levels))
        sizes = [math.prod(grid) for grid in grids]
        keys = 0.0
        for level in range(levels):  # kept at level + 1, in tokens of this level
            kept = min(self.topk, sizes[level + 1]) / sizes[level + 1] * sizes[level]
            keys += kept if level == 0 or self.enrich else 0
        keys += sizes[levels] if self.enrich else 0
        return keys * layout.grid_len + global_logits(layout)

    def compute(self, backend: str, inputs: AttentionInputs) -> Any:
        if backend == "triton":
            return llsa_attention_triton(inputs, self)
        return _compute_torch(inputs, self)

    def backward(self, grad: Tensor, out: Tensor, lse: Tensor, inputs: AttentionInputs) -> Sequence[Tensor]:
        return llsa_attention_triton_backward(grad, out, lse, inputs, self)

    def dense_reference(self, inputs: AttentionInputs) -> Tensor:
        query, key, value, key_mask, _, layout, scale = inputs
        levels = self._n_levels(layout)
        acc = torch.promote_types(query.dtype, torch.float32)
        q, k, v = (x.to(acc) for x in (query, zero_masked(key, key_mask), zero_masked(value, key_mask)))
        valid = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
        valid = valid if key_mask is None else key_mask
        covered = _covered(layout, tile_shapes(layout.grid, self.block_size, levels))
        out = []
        for b in range(len(q)):
            inside = [[[t for t in node if valid[b, t]] for node in level] for level in covered]  # the valid tokens
            columns = [(l, i) for l in range(1, levels + 1) for i in range(len(covered[l]))]  # of the pooled tokens
            average = torch.zeros(len(columns), q.shape[2], dtype=acc, device=q.device)
            for row, (l, i) in enumerate(columns):
                average[row, inside[l][i]] = 1 / max(1, len(inside[l][i]))
            counts = torch.tensor([len(inside[l][i]) for l, i in columns], dtype=acc, device=q.device)
            for h in range(q.shape[1]):
                visible = torch.zeros(q.shape[2], q.shape[2] + len(columns), dtype=torch.bool)
                visible[:, : q.shape[2]] = True
                for block, fine, pooled in _choices(
                    average @ q[b, h], average @ k[b, h], columns, inside, covered, self.topk
                ):
                    keys = torch.zeros(visible.shape[1], dtype=torch.bool)
                    keys[: layout.before] = keys[layout.grid_slice.stop : layout.seq_len] = True
                    keys[fine + ([q.shape[2] + i for i in pooled] if self.enrich else [])] = True
                    visible[block] = keys
                visible[:, : q.shape[2]] &= valid[b].cpu()
                pool_k, pool_v = (torch.cat([x[b, h], average @ x[b, h]]) for x in (k, v))
                logits = q[b, h] @ pool_k.mT * scale
                logits = logits + torch.cat([logits.new_zeros(q.shape[2]), counts.clamp(min=1).log()])
                out.append(softmax_rows(logits, visible.to(q.device)) @ pool_v)
        return torch.stack(out).view(q.shape).to(query.dtype)

    def without_pooled_tokens(self) -> LLSAAttnProcessor:
        return replace(self, enrich=False)

    def block_tables(self, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        tree = make_tree(layout.grid, self.block_size, self._n_levels(layout), torch.device("cpu"))
        return tree[0].children, tree[0].children

    @classmethod
    def suggest(cls, grid: Sequence[int], share: float = 0.1) -> dict[str, Any]:
        """The defaults, which compute about a tenth on 64×64. They do not depend on ``share``, because the number of
        keys per query hardly grows with the grid."""
        return {}

    @classmethod
    def tiny_options(cls, options: Mapping[str, Any], grid: Sequence[int]) -> dict[str, Any]:
        return {**options, "block_size": 4, "topk": 2}

    @classmethod
    def search_space(cls, grid: Sequence[int]) -> SearchSpace:
        kept = (2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64, 76)
        return SearchSpace(
            "topk",
            (kept, ((8, 2), (16, 1), (32, 1))),
            lambda topk, tree: {"block_size": tree[0], "levels": tree[1], "topk": topk},
            lambda own: [own.topk, (own.block_size, own.levels)],
        )

    @classmethod
    def controls(cls, grid: Sequence[int]) -> tuple[Control, ...]:
        text = "Number of blocks of 16 tokens that are kept at each level."
        return (Control("topk", "Blocks kept (topk)", 1, 64, cls.topk, 1, text),)

    def _n_levels(self, layout: TokenLayout) -> int:
        return default_levels(layout.grid, self.block_size, self.topk) if self.levels is None else self.levels


llsa_attention = attention_function(LLSAAttnProcessor)
reference = reference_function(LLSAAttnProcessor)


class _Pooled(NamedTuple):
    """Sums (B, H, n, D) over the valid tokens that each token of a level covers, and their number (1|B, n)."""

    total: Tensor
    number: Tensor

    def mean(self) -> Tensor:
        return self.total / self.number.clamp(min=1)[:, None, :, None]


def _pool(x: Tensor, tree: tuple[Level, ...], valid: Tensor) -> list[_Pooled]:
    """Pool x (B, H, N, D) on the grid to levels 1 … L; valid: (1|B, N)."""
    acc = torch.promote_types(x.dtype, torch.float32)
    total, count = torch.where(valid[:, None, :, None], x, 0).to(acc), valid.to(acc)
    pooled = []
    for level in tree:
        inside = level.children >= 0
        index = level.children.clamp(min=0)
        blocks = gather_rows(total.flatten(0, 1), index[None]).unflatten(0, x.shape[:2])
        total = (blocks if level.full else torch.where(inside[:, :, None], blocks, 0)).sum(3)
        count = torch.where(inside, count[:, index], 0).sum(-1)
        pooled.append(_Pooled(total, count))
    return pooled


def _select(
    query: list[_Pooled], key: list[_Pooled], tree: tuple[Level, ...], topk: int
) -> tuple[Tensor, list[Tensor]]:
    """Level-1 blocks kept by each level-1 block (B*H, n_1, k), -1 = none, and for l = L-1 … 1 the candidates at level
    l, (B*H, n_{l+1}, k·block): the children of the tokens kept by the ancestor at level l + 1."""
    heads = query[0].total.shape[1]
    q, k = ([level.mean().flatten(0, 1) for level in side] for side in (query, key))
    empty = [(level.number == 0).expand(len(query[0].total), -1).repeat_interleave(heads, 0) for level in key]
    scores = (q[-1] @ k[-1].mT).masked_fill(empty[-1][:, None], -torch.inf)
    best = scores.topk(min(topk, scores.shape[-1]))
    kept = torch.where(best.values > -torch.inf, best.indices, -1)
    candidates = []
    for level in reversed(range(len(tree) - 1)):
        above = tree[level + 1]
        found = torch.where(kept[..., None] < 0, -1, above.children[kept.clamp(min=0)]).flatten(2)
        children = gather_rows(q[level], above.children[None].clamp(min=0))  # (B*H, n_above, block, D)
        index = found.clamp(min=0)
        scores = children @ gather_rows(k[level], index).mT  # (B*H, n_above, block, k·block)
        masked = (found < 0) | empty[level].gather(1, index.flatten(1)).view(index.shape)
        scores = scores.masked_fill(masked[:, :, None], -torch.inf)
        best = scores.topk(min(topk, scores.shape[-1]))
        chosen = found[:, :, None].expand(scores.shape).gather(-1, best.indices)
        kept = torch.where(best.values > -torch.inf, chosen, -1).flatten(1, 2)[:, above.place]
        candidates.append(found)
    return kept, candidates


def _compute_torch(inputs: AttentionInputs, options: LLSAAttnProcessor) -> Tensor:
    query, key, value, key_mask, _, layout, scale = inputs
    key, value = zero_masked(key, key_mask), zero_masked(value, key_mask)
    levels = options._n_levels(layout)
    tree = make_tree(layout.grid, options.block_size, levels, query.device)
    valid = torch.ones(1, layout.grid_len, dtype=torch.bool, device=query.device)
    if key_mask is not None:
        valid = key_mask[:, layout.grid_slice]
    q, k, v = (x[:, :, layout.grid_slice] for x in (query, key, value))
    with torch.no_grad():
        kept, candidates = _select(_pool(q.detach(), tree, valid), _pool(k.detach(), tree, valid), tree, options.topk)
    bias = mask_bias(key_mask)
    if options.enrich:
        pooled_k, pooled_v = (_pool(x, tree, valid) for x in (k, v))
        key = torch.cat([key, *(level.mean().to(key.dtype) for level in pooled_k)], 2)
        value = torch.cat([value, *(level.mean().to(value.dtype) for level in pooled_v)], 2)
        counts = torch.cat([level.number for level in pooled_k], 1).log()
        bias = torch.zeros(1, layout.seq_len, device=query.device) if bias is None else bias
        bias = torch.cat([bias, counts], 1)
    whole = key_mask is None and all(level.full for level in tree)
    plan = (_tiles(layout, tree, kept, candidates, options.enrich, whole), *global_tiles(layout, query.device))
    return tile_attention(
        query, key, value, plan, scale=scale, key_bias=bias, may_have_empty_rows=key_mask is not None, per_head=True
    )


def _tiles(
    layout: TokenLayout, tree: tuple[Level, ...], kept: Tensor, candidates: list[Tensor], enrich: bool, whole: bool
) -> Tiles:
    """Tiles of one level-1 block each: the tokens of its kept blocks, its visible pooled tokens (rows after the
    sequence, level by level), and the global tokens. ``whole``: no list has a gap."""
    blocks, global_tokens = tree[0].children, global_index(layout, kept.device)
    groups, n_blocks, _ = kept.shape
    queries = torch.where(blocks < 0, layout.seq_len, blocks + layout.before)[None]
    sizes = [len(level.children) for level in tree]
    firsts = [layout.seq_len + sum(sizes[:i]) for i in range(len(sizes))]  # row of each level's first pooled token
    ancestor = torch.arange(n_blocks, device=kept.device)
    pooled_lists: list[
        tuple[int, Tensor, Tensor]
    ] = []  # first row of level l, candidates at l, ancestor of each block at l + 1
    for i, above in enumerate(tree[1:]):
        ancestor = above.place[ancestor] // above.children.shape[1]
        pooled_lists.append((firsts[i], candidates[len(tree) - 2 - i], ancestor))
    top = torch.arange(firsts[-1], firsts[-1] + sizes[-1], device=kept.device)
    everywhere = torch.cat([global_tokens, top]) if enrich else global_tokens

    def rows(start: int, stop: int) -> TileRows:
        own = kept[:, start:stop]
        tokens = blocks[own] if whole else torch.where(own[..., None] < 0, -1, blocks[own.clamp(min=0)])
        lists = [(layout.before, tokens.flatten(2))]
        lists += [(first, found[:, parent[start:stop]]) for first, found, parent in pooled_lists] if enrich else []
        places = [x + first if whole else torch.where(x < 0, -1, x + first) for first, x in lists]
        keys = torch.cat([*places, everywhere.expand(groups, stop - start, -1)], -1)
        if whole:
            return TileRows(queries[:, start:stop], keys, None)
        return TileRows(queries[:, start:stop], keys.clamp(min=0), (keys >= 0)[:, :, None])

    block = blocks.shape[1]
    n_keys = kept.shape[2] * block + len(everywhere)
    n_keys += sum(found.shape[2] for _, found, _ in pooled_lists) if enrich else 0
    return Tiles(count=n_blocks, n_queries=block, n_keys=n_keys, rows=rows)


def _covered(layout: TokenLayout, shapes: Sequence[tuple[int, ...]]) -> list[list[list[int]]]:
    """Tokens covered by each token of each level, level 0 first."""
    size = (1,) * len(layout.grid)
    levels = [[[t] for t in range(layout.before, layout.before + layout.grid_len)]]
    for shape in shapes:
        size = tuple(a * b for a, b in zip(size, shape, strict=True))
        boxes: dict[tuple[int, ...], list[int]] = {}
        for token in range(layout.before, layout.before + layout.grid_len):
            place = layout.coordinates(token) or ()
            boxes.setdefault(tuple(x // side for x, side in zip(place, size, strict=True)), []).append(token)
        levels.append([boxes[box] for box in sorted(boxes)])
    return levels


def _choices(
    pooled_q: Tensor,
    pooled_k: Tensor,
    columns: list[tuple[int, int]],
    inside: list[list[list[int]]],
    covered: list[list[list[int]]],
    topk: int,
) -> list[tuple[list[int], list[int], list[int]]]:
    """For each level-1 block: its tokens, those of the blocks it keeps, the columns of its visible pooled tokens."""
    column = {name: i for i, name in enumerate(columns)}
    levels = len(covered) - 1
    parents: list[dict[int, int]] = [{}]
    for level in range(1, levels):
        owner = {t: i for i, node in enumerate(covered[level + 1]) for t in node}
        parents.append({i: owner[node[0]] for i, node in enumerate(covered[level])})
    found = []
    for block in range(len(covered[1])):
        lineage = [block]  # the block itself, and its ancestors at levels 2 … L
        for level in range(1, levels):
            lineage.append(parents[level][lineage[-1]])
        candidates = list(range(len(covered[levels])))
        pooled: list[int] = []
        for level in range(levels, 0, -1):
            candidates = [i for i in candidates if inside[level][i]]
            pooled += [column[level, i] for i in candidates]
            q = pooled_q[column[level, lineage[level - 1]]]
            score = {i: (q @ pooled_k[column[level, i]]).item() for i in candidates}
            kept = set(sorted(candidates, key=score.__getitem__, reverse=True)[:topk])
            if level > 1:
                candidates = [i for i in range(len(covered[level - 1])) if parents[level - 1][i] in kept]
        fine = [t for i in sorted(kept) for t in inside[1][i]]
        found.append((covered[1][block], fine, pooled))
    return found
