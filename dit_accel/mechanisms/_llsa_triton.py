"""LLSA with the Triton kernels: pool the levels, select from the top down, attend to coarse and fine tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ._inputs import AttentionInputs
from ._tree import Level, default_levels, make_tree

if TYPE_CHECKING:
    from dit_accel.kernels.llsa.forward import Pooled
    from dit_accel.kernels.llsa.tree import PooledTree

    from .llsa import LLSAAttnProcessor

__all__ = ["llsa_attention_triton", "llsa_attention_triton_backward"]


def llsa_attention_triton(inputs: AttentionInputs, options: LLSAAttnProcessor) -> tuple[Tensor, Tensor]:
    """``llsa_attention`` on a GPU, and its log-sum-exp (B, H, S) float32, -inf for a row without a visible key."""
    from dit_accel.kernels.llsa.forward import llsa_blocks_attention

    query, key, value, key_mask, _, layout, scale = inputs
    chosen = _make_selection(inputs, options)
    return llsa_blocks_attention(
        query,
        key,
        value,
        chosen.kept[0],
        [level.children for level in chosen.tree],
        scale=scale,
        before=layout.before,
        n_grid=layout.grid_len,
        pooled=chosen.pooled,
        key_mask=key_mask,
        whole=chosen.whole,
        return_lse=True,
    )  # type: ignore[return-value]


def llsa_attention_triton_backward(
    grad: Tensor, out: Tensor, lse: Tensor, inputs: AttentionInputs, options: LLSAAttnProcessor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. Pooling and selection are cheap and are recomputed, bitwise equal to the
    forward pass."""
    from dit_accel.kernels.llsa.backward import llsa_blocks_attention_backward

    query, key, value, key_mask, _, layout, scale = inputs
    chosen = _make_selection(inputs, options)
    return llsa_blocks_attention_backward(
        grad,
        out,
        lse,
        query,
        key,
        value,
        chosen.kept,
        [level.children for level in chosen.tree],
        [level.place for level in chosen.tree],
        scale=scale,
        before=layout.before,
        n_grid=layout.grid_len,
        pooled=chosen.pooled,
        number=chosen.pool.number,
        rows=chosen.pool.rows,
        key_mask=key_mask,
        whole=chosen.whole,
    )


class _Selection(NamedTuple):
    """The tree, its pooled tokens, the tokens kept at each level, and the pooled tokens to attend to."""

    tree: tuple[Level, ...]
    pool: PooledTree
    kept: list[Tensor]
    pooled: Pooled | None

    @property
    def whole(self) -> bool:
        """Whether every pooled token is full, so that no list has gaps."""
        return not self.pool.masked and all(level.full for level in self.tree)


def _make_selection(inputs: AttentionInputs, options: LLSAAttnProcessor) -> _Selection:
    from dit_accel.kernels.block_sparse.forward import check_inputs
    from dit_accel.kernels.llsa.forward import Pooled
    from dit_accel.kernels.llsa.select import select_tree
    from dit_accel.kernels.llsa.tree import pool_tree

    query, key, value, key_mask, _, layout, _ = inputs
    check_inputs(query)
    levels = default_levels(layout.grid, options.block_size, options.topk) if options.levels is None else options.levels
    tree = make_tree(layout.grid, options.block_size, levels, query.device)
    children, places = [level.children for level in tree], [level.place for level in tree]
    pool = pool_tree(query, key, value if options.enrich else None, children, layout.before, key_mask)
    kept, indices = select_tree(pool, children, places, options.topk, options.enrich)
    pooled = None
    if pool.all_keys is not None and pool.all_values is not None:
        pooled = Pooled(pool.all_keys, pool.all_values, pool.weight, indices, pool.rows[-1])
    return _Selection(tree, pool, kept, pooled)
