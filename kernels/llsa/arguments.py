"""Groups of arguments of LLSA's kernels; see ``kernels/arguments.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import next_pow2_min16

__all__ = [
    "Above",
    "Bias",
    "Inherited",
    "Interval",
    "KeyTiles",
    "Level",
    "Numbers",
    "Parents",
    "PoolStatic",
    "PooledKeys",
    "Queries",
    "QueryLists",
    "SelectStatic",
    "Splits",
    "Static",
    "bias_of",
    "queries_of",
    "static_of",
]


class Level(NamedTuple):
    """Level of ``length`` pooled tokens: index of the first of them among the ``total`` of all levels, the last of
    which is empty."""

    length: int
    first: int
    total: int


class Numbers(NamedTuple):
    """(1|B, P + 1) float32: number of valid tokens that each pooled token covers, and its log2; stride of the first
    axis, 0 = the same for all batch elements."""

    number: Any
    weight: Any
    batch: int


class Parents(NamedTuple):
    """Tokens of the level above: those that each kept (B*H, length, n_kept), and their children (length, block), -1 =
    none. None = there is no level above."""

    kept: Any
    children: Any
    length: int


class Inherited(NamedTuple):
    """Indices (B*H, tokens, length) visible to ``tokens`` tokens two levels above, and ``place``, the position of each
    token of the level above among their children. None = there are none."""

    indices: Any
    place: Any
    tokens: int
    length: int


class Queries(NamedTuple):
    """Queries on the grid in the order of the tree. Tables, -1 = none: ``blocks`` (n_1, block), tokens of each block;
    ``nodes`` (n_2, block), blocks of each level-2 token. A tile of queries lies within the n_slots slots of one of
    n_nodes level-2 tokens; without ``nodes``, anywhere in the n_slots slots of all blocks."""

    blocks: Any
    nodes: Any
    n_nodes: int
    n_slots: int


class Bias(NamedTuple):
    """(1|B, n) float32 added to the logits of keys, and its first stride, 0 = the same for all batch elements."""

    data: Any
    batch: int


class PooledKeys(NamedTuple):
    """Pooled keys and values (B*H, length, D) of all levels, the last one empty, and the bias of each as in
    :class:`Bias`, -inf for that one. All grid queries attend to those from ``top`` on, and those of each level-2 token
    to the n_indices at ``indices`` (B*H, n_2, n_indices). indices_bias, top_bias: bias common to them; None = as in
    ``bias``. key None = there are none."""

    key: Any
    value: Any
    bias: Any
    bias_batch: int
    length: int
    top: int
    indices: Any
    n_indices: int
    indices_bias: float | None
    top_bias: float | None


class Interval(NamedTuple):
    """``length`` rows of a tensor, without the ``skip`` rows from ``cut`` on. length None = there are none."""

    length: Any
    cut: int
    skip: int


class KeyTiles(NamedTuple):
    """Keys of n_tiles tiles. Of each: the rows from ``first`` on at the entries of a row of ``table`` (n_tiles, block),
    -1 = none; with None, consecutive rows of an :class:`Interval`."""

    table: Any
    first: int
    n_tiles: int
    length: Any
    cut: int
    skip: int


class QueryLists(NamedTuple):
    """Queries of the blocks, or with ``nodes`` of the level-2 tokens, in the list of each tile of keys: concatenated
    lists (B*H, stride), ``ends`` (B*H, tiles + 1), where each begins and the last ends, and tables as in
    :class:`Queries`. data None = there are no lists."""

    data: Any
    ends: Any
    stride: int
    blocks: Any
    nodes: Any


class Splits(NamedTuple):
    """:class:`Interval` of queries split between programs, ``rows`` for each, and the stride between their
    gradients."""

    length: Any
    cut: int
    skip: int
    rows: int
    stride: int


class Above(NamedTuple):
    """Gradients (B*H, tiles, D) float32 of each key and value of a tile through the pooled tokens above. None = 0."""

    key: Any
    value: Any


class Static(NamedTuple):
    """Compile-time parameters of the attention kernels.

    D, BLOCK_D: head dim, and rounded up to a power of two. BM, BN: rows of queries and keys of a tile. BLOCK: tokens of
    a block. PRECISION: of products. N_KEPT: blocks kept by a block. GLOBAL: some tokens are off the grid. ALL_SLOTS:
    tiles of queries have no invalid row. WHOLE, INDICES_WHOLE, TOP_WHOLE: steps over kept blocks, over pooled tokens
    in lists, and over those of the top level have no invalid key. ADD: gradients are added to the content of their
    tensor.
    """

    D: int
    BLOCK_D: int
    BM: int
    BN: int
    BLOCK: int
    PRECISION: str
    N_KEPT: int = 0
    GLOBAL: bool = False
    ALL_SLOTS: bool = False
    WHOLE: bool = False
    INDICES_WHOLE: bool = False
    TOP_WHOLE: bool = False
    ADD: bool = False


class PoolStatic(NamedTuple):
    """Compile-time parameters of the pooling kernel.

    D, BLOCK_D: head dim, and rounded up to a power of two. BLOCK: children of a token. UNROLL: children loaded at once.
    NODES: tokens of a program. HEADS_LAST: heads are adjacent in memory. SHARED: all batch elements have the same
    numbers of valid tokens.
    """

    D: int
    BLOCK_D: int
    BLOCK: int
    UNROLL: int
    NODES: int
    HEADS_LAST: bool
    SHARED: bool


class SelectStatic(NamedTuple):
    """Compile-time parameters of the selection kernel.

    D, BLOCK_D: head dim, and dimensions per step. TOPK, BLOCK_K: tokens to select, and rounded up to a power of two.
    N_KEPT: tokens kept by a token of the level above. BLOCK: their children, 0 = there is no level above. ROWS: tokens
    of a program. LANES: candidates, rounded up to a power of two. PRECISION: of scores.
    """

    D: int
    BLOCK_D: int
    TOPK: int
    BLOCK_K: int
    N_KEPT: int
    BLOCK: int
    ROWS: int
    LANES: int
    PRECISION: str


def bias_of(x: Tensor | None) -> Bias:
    """Group of a (1|B, n) bias; None = 0."""
    return Bias(x, 0 if x is None or len(x) == 1 else x.stride(0))


def queries_of(children: Sequence[Tensor], indices: Tensor | None) -> Queries:
    """Group of the grid's queries. children: of each level; indices (B*H, n_2, m): of pooled tokens visible from level
    2, None = only one level."""
    n_blocks, block = children[0].shape
    if indices is None:
        return Queries(children[0], None, 1, n_blocks * block)
    return Queries(children[0], children[1], indices.shape[1], block * block)


def static_of(query: Tensor, block: int, block_q: int, block_k: int) -> Static:
    """Compile-time parameters of an attention kernel; block_q, block_k: rows of queries and keys of a tile."""
    dim = query.shape[-1]
    precision = "ieee" if query.dtype == torch.float32 else "tf32"
    return Static(dim, next_pow2_min16(dim), block_q, block_k, block, precision)
