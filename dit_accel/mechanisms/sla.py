"""SLA: sparse attention over the critical blocks, linear attention over the marginal ones (arXiv 2509.24006)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.block_linear.reference import FEATURE_MAPS, block_linear_sums, feature, gather_blocks
from dit_accel.kernels.block_sparse.reference import TileRows, Tiles, tile_attention
from dit_accel.layout import TokenLayout

from ._boxes import box_blocks, box_shape
from ._common import (
    check_number,
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
from ._search import SearchSpace
from ._sla_flex import critical_by_flex
from ._sla_triton import sla_attention_triton, sla_attention_triton_backward
from ._workloads import HUNYUAN_720P, WAN_480P, WAN_720P, Workload
from .backend import BACKENDS
from .processor import AcceleratedAttnProcessor
from .registry import attention_function, reference_function, register_processor

__all__ = ["SLAAttnProcessor", "reference", "sla_attention"]

LINEAR_OVER = ("marginal", "all")
EPSILON = 1e-5


def _workloads(
    name: str,
    title: str,
    heads: int,
    layout: TokenLayout,
    benchmark: str,
    goals: tuple[float, float],
    critical: float = 0.05,
) -> tuple[Workload, ...]:
    """Blocks of 128×64: the linear branch over all keys with smooth keys, as in the authors' later release, and over
    the marginal blocks."""
    common: dict[str, Any] = {"critical": critical, "negligible": 0.10, "block_q": 128, "block_kv": 64}
    forms: tuple[tuple[str, dict[str, Any]], ...] = (
        ("all", {"linear_over": "all", "smooth_key": True}),
        ("marginal", {"linear_over": "marginal"}),
    )
    return tuple(
        Workload(
            f"{name}-{form}", f"SLA {100 * critical:g} %, {form}, {title}", heads, 128, layout, common | options,
            {benchmark: goal},
        )
        for (form, options), goal in zip(forms, goals, strict=True)
    )  # fmt: skip


@register_processor
@dataclass(frozen=True, kw_only=True)
class SLAAttnProcessor(AcceleratedAttnProcessor):
    """Sparse-linear attention. [SLA, arXiv 2509.24006]

    softmax(q kᵀ scale) v over the critical key blocks of each query block, plus
    ``Linear(φ(q) Σ φ(k)ᵀ v / (φ(q) Σ φ(k) + 1e-5))`` over its marginal blocks.

    Args:
        critical: share of key blocks in the softmax, at least one block; in (0, 1].
        negligible: share of key blocks that are left out; critical + negligible <= 1.
        block_q: tokens in a block of queries.
        block_kv: tokens in a block of keys.
        feature_map: φ: "softmax" (over the head dim), "elu" (elu + 1) or "relu".
        linear_over: "marginal" (the paper), or "all" key blocks (the authors' later release).
        smooth_key: subtract the mean key before pooling.
        tile_order: blocks are compact tiles of the grid instead of consecutive tokens in raster order.
    """

    critical: float = 0.05
    negligible: float = 0.10
    block_q: int = 64
    block_kv: int = 64
    feature_map: str = "softmax"
    linear_over: str = "marginal"
    smooth_key: bool = False
    tile_order: bool = False

    name: ClassVar[str] = "sla"
    label: ClassVar[str] = "SLA"
    summary: ClassVar[str] = "critical blocks, linear attention for the rest"
    paper: ClassVar[str] = "arXiv 2509.24006"
    backends: ClassVar[tuple[str, ...]] = BACKENDS
    backward_backends: ClassVar[tuple[str, ...]] = ("triton",)
    learned: ClassVar[Mapping[str, str]] = {
        "weight": "(D, D), the learned projection of the linear part; None = 0.",
        "bias": "(D,), its bias; None = 0.",
    }

    workloads: ClassVar[tuple[Workload, ...]] = (
        *_workloads("sla-wan1.3b-480p", "Wan2.1-1.3B 480p", 12, WAN_480P, "forward", (12.0, 9.0)),
        *_workloads("sla-wan14b-720p", "Wan-14B 720p", 40, WAN_720P, "forward", (15.0, 12.0)),
        *_workloads("sla-hunyuan-720p", "Hunyuan 720p", 24, HUNYUAN_720P, "forward", (15.5, 12.5)),
        *_workloads("sla-wan1.3b-480p-10", "Wan2.1-1.3B 480p", 12, WAN_480P, "backward", (5.0, 5.0), critical=0.10),
    )
    comparison_grid: ClassVar[tuple[int, ...]] = (6, 16, 16)

    def check(self) -> None:
        if not 0 < check_number("critical", self.critical) <= 1:
            raise ValueError(f"critical must be in (0, 1], got {self.critical}")
        if check_number("negligible", self.negligible) < 0:
            raise ValueError(f"negligible must not be negative, got {self.negligible}")
        if self.critical + self.negligible > 1:
            raise ValueError(
                f"critical + negligible must be at most 1, got {self.critical} + {self.negligible}: lower one of them"
            )
        check_positive_int("block_q", self.block_q, least=2)
        check_positive_int("block_kv", self.block_kv, least=2)
        for name, known in (("feature_map", FEATURE_MAPS), ("linear_over", LINEAR_OVER)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}")
        for name in ("smooth_key", "tile_order"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def count_logits(self, layout: TokenLayout) -> float:
        """Return the softmax logits per batch element and head, global tokens included, without the linear part. The
        critical blocks depend on the data: a short block counts as an average one."""
        n_blocks = len(_blocks(layout, self.block_kv, self.tile_order, torch.device("cpu"))[0])
        share = _n_critical(self.critical, n_blocks) / n_blocks
        return share * layout.grid_len**2 + global_logits(layout)

    def compute(self, backend: str, inputs: AttentionInputs) -> Any:
        if backend == "triton":
            return sla_attention_triton(inputs, self)
        critical_part = critical_by_flex if backend == "flex" else _critical_by_tiles
        return _compute(critical_part, inputs, self)

    def backward(self, grad: Tensor, out: Tensor, lse: Tensor, inputs: AttentionInputs) -> Sequence[Tensor]:
        return sla_attention_triton_backward(grad, out, lse, inputs, self)

    def dense_reference(self, inputs: AttentionInputs) -> Tensor:
        query, key, value, key_mask, (weight, bias), layout, scale = inputs
        acc = _acc(query)
        q, k, v = (x.to(acc) for x in (query, zero_masked(key, key_mask), zero_masked(value, key_mask)))
        q_blocks, k_blocks = (_block_lists(layout, size, self.tile_order) for size in (self.block_q, self.block_kv))
        valid = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
        valid = valid if key_mask is None else key_mask
        out = []
        for b in range(len(q)):
            visible = valid[b].expand(q.shape[1], q.shape[2], -1).clone()  # (H, S, S): keys in the softmax
            linear = torch.zeros_like(visible)  # keys in the linear part
            k_valid = [[t for t in block if valid[b, t]] for block in k_blocks]
            k_valid = [block for block in k_valid if block]
            every = [t for block in k_valid for t in block]
            n_critical, n_negligible = _n_critical(self.critical, len(k_valid)), int(self.negligible * len(k_valid))
            for h in range(q.shape[1]):
                mean = k[b, h, every].mean(0) if self.smooth_key else 0
                pooled = [k[b, h, block].mean(0) - mean for block in k_valid]
                for block in q_blocks:
                    q_valid = [t for t in block if valid[b, t]]
                    pooled_q = q[b, h, q_valid].mean(0) if q_valid else torch.zeros_like(q[b, h, 0])
                    ranked = sorted(range(len(pooled)), key=lambda i: -(pooled_q @ pooled[i]).item())
                    kinds = {
                        "critical": ranked[:n_critical],
                        "marginal": ranked[n_critical : len(ranked) - n_negligible],
                    }
                    tokens = {kind: [t for i in blocks for t in k_valid[i]] for kind, blocks in kinds.items()}
                    row = torch.zeros(q.shape[2], dtype=torch.bool)
                    row[tokens["critical"]] = True
                    row[: layout.before] = row[layout.grid_slice.stop :] = True
                    visible[h, block] = row.to(q.device) & valid[b]
                    row = torch.zeros(q.shape[2], dtype=torch.bool)
                    row[tokens["marginal"] if self.linear_over == "marginal" else every] = True
                    linear[h, block] = row.to(q.device)
            sparse = softmax_rows(q[b] @ k[b].mT * scale, visible) @ v[b]
            products = feature(q[b], self.feature_map) @ feature(k[b], self.feature_map).mT * linear
            part = products @ v[b] / (products.sum(-1, keepdim=True) + EPSILON)
            part = torch.zeros_like(part) if weight is None else part @ weight.to(acc).mT
            part = part if bias is None else part + bias.to(acc)
            on_grid = torch.zeros(q.shape[2], 1, dtype=torch.bool, device=q.device)
            on_grid[layout.grid_slice] = bool(valid[b].any())
            out.append(sparse + torch.where(on_grid, part, 0))
        return torch.stack(out).to(query.dtype)

    def learned_shapes(self, head_dim: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (head_dim, head_dim), "bias": (head_dim,)}

    def initial_parameters(self, head_dim: int) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in self.learned_shapes(head_dim).items()}

    def identity_parameters(self, head_dim: int) -> dict[str, Tensor]:
        return {"weight": torch.eye(head_dim)}

    def block_tables(self, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        cpu = torch.device("cpu")
        query_blocks, key_blocks = (_blocks(layout, n, self.tile_order, cpu)[0] for n in (self.block_q, self.block_kv))
        return query_blocks, key_blocks

    @classmethod
    def suggest(cls, grid: Sequence[int], share: float = 0.1) -> dict[str, Any]:
        """This share of the blocks, as tiles instead of raster order, which gives better results without training."""
        return {"critical": share, "tile_order": True}

    @classmethod
    def tiny_options(cls, options: Mapping[str, Any], grid: Sequence[int]) -> dict[str, Any]:
        return {**options, "block_q": 32, "block_kv": 16, "critical": 0.25}

    @classmethod
    def search_space(cls, grid: Sequence[int]) -> SearchSpace:
        shares = (0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.18, 0.22, 0.26, 0.3, 0.36, 0.44)
        blocks = {"block_q": 8, "block_kv": 8, "tile_order": True}
        return SearchSpace(
            "critical", (shares,), lambda share: {"critical": share, **blocks}, lambda own: [own.critical]
        )

    @classmethod
    def controls(cls, grid: Sequence[int]) -> tuple[Control, ...]:
        text = "Share of key blocks that each query block attends to exactly."
        return (Control("critical", "Critical fraction", 0.01, 0.9, cls.suggest(grid)["critical"], 0.01, text),)

    @classmethod
    def from_controls(cls, values: Mapping[str, Any], axes: int) -> dict[str, Any]:
        return {"critical": values["critical"], "tile_order": True}


sla_attention = attention_function(SLAAttnProcessor)
reference = reference_function(SLAAttnProcessor)


def _n_critical(critical: float, n_blocks: int) -> int:
    return max(1, int(critical * n_blocks))


def _blocks(layout: TokenLayout, block: int, tile_order: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Grid tokens of each block, (M, block), -1 where a block is short; and the flat position of each grid token
    there."""
    if tile_order:
        return box_blocks(layout.grid, box_shape(block, layout.grid), device)
    return box_blocks((layout.grid_len,), (block,), device)


def _compute(critical_part: Callable[..., Tensor], inputs: AttentionInputs, options: SLAAttnProcessor) -> Tensor:
    """SLA with selection and linear branch in plain torch; ``critical_part`` computes the softmax over the critical
    blocks."""
    query, key, value, key_mask, (weight, bias), layout, scale = inputs
    key, value = zero_masked(key, key_mask), zero_masked(value, key_mask)
    q_table, place = _blocks(layout, options.block_q, options.tile_order, query.device)
    k_table, _ = _blocks(layout, options.block_kv, options.tile_order, query.device)
    valid = torch.ones(1, layout.grid_len, dtype=torch.bool, device=query.device)
    if key_mask is not None:
        valid = key_mask[:, layout.grid_slice]
    with torch.no_grad():
        chosen, kept, marginal = _select(query.detach(), key.detach(), layout, q_table, k_table, valid, options)
    out = critical_part(query, key, value, key_mask, chosen, kept, layout=layout, scale=scale, options=options)
    if weight is None and bias is None:
        return out
    blocks = None if options.linear_over == "all" else marginal
    linear = _linear_part(
        query, key, value, layout, q_table, place, k_table, valid, blocks, options.feature_map, weight, bias
    )
    if key_mask is not None:
        linear = torch.where(key_mask.any(-1)[:, None, None, None], linear, 0)
    linear = F.pad(linear, (0, 0, layout.before, layout.after))
    return (out.to(linear.dtype) + linear).to(query.dtype)


def _critical_by_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    chosen: Tensor,
    kept: Tensor,
    *,
    layout: TokenLayout,
    scale: float,
    options: SLAAttnProcessor,
) -> Tensor:
    """Same as :func:`critical_by_flex`, by gathered tiles."""
    q_table, _ = _blocks(layout, options.block_q, options.tile_order, query.device)
    k_table, _ = _blocks(layout, options.block_kv, options.tile_order, query.device)
    whole = key_mask is None and k_table.numel() == layout.grid_len
    plan = (_critical_tiles(layout, q_table, k_table, chosen, kept, whole), *global_tiles(layout, query.device))
    key_bias = mask_bias(key_mask)
    return tile_attention(
        query, key, value, plan, scale=scale, key_bias=key_bias, may_have_empty_rows=key_bias is not None, per_head=True
    )


def _pool(x: Tensor, table: Tensor, valid: Tensor) -> Tensor:
    """Means of (B, H, N, D) over the valid tokens of each block, (B, H, M, D), at least float32."""
    inside = (table >= 0) & valid[:, table]  # (1|B, M, block)
    blocks = gather_blocks(x, table)
    total = torch.where(inside[:, None, :, :, None], blocks, 0).to(_acc(x)).sum(3)
    return total / inside.sum(-1).clamp(min=1)[:, None, :, None]


def _acc(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _select(
    query: Tensor,
    key: Tensor,
    layout: TokenLayout,
    q_table: Tensor,
    k_table: Tensor,
    valid: Tensor,
    options: SLAAttnProcessor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Critical blocks (B*H, Mq, n), the mask of their valid entries (1|B, n), the 0/1 map of marginal blocks (B*H, Mq,
    Mk)."""
    grid_key = key[:, :, layout.grid_slice]
    pooled_key = _pool(grid_key, k_table, valid)
    if options.smooth_key:
        count = valid.sum(-1).clamp(min=1)[:, None, None, None]
        pooled_key -= (
            torch.where(valid[:, None, :, None], grid_key, 0).to(pooled_key.dtype).sum(2, keepdim=True) / count
        )
    scores = _pool(query[:, :, layout.grid_slice], q_table, valid) @ pooled_key.mT  # (B, H, Mq, Mk)
    valid_blocks = ((k_table >= 0) & valid[:, k_table]).any(-1)  # (1|B, Mk)
    n_blocks, most = valid_blocks.sum(-1).double(), len(k_table)
    n_critical = (options.critical * n_blocks).long().clamp(min=1)
    n_negligible = (options.negligible * n_blocks).long()
    valid_blocks = valid_blocks[:, None, None]
    chosen = (
        scores.masked_fill(~valid_blocks, -torch.inf).topk(_n_critical(options.critical, most), sorted=True).indices
    )
    kept = torch.arange(chosen.shape[-1], device=key.device) < n_critical[:, None]
    rest = valid_blocks & ~_marked(
        chosen, kept, most
    )  # with equal scores, no block may be both critical and negligible
    lowest = (
        scores.masked_fill(~rest, torch.inf).topk(int(options.negligible * most), largest=False, sorted=True).indices
    )
    dropped = torch.arange(lowest.shape[-1], device=key.device) < n_negligible[:, None]
    marginal = rest & ~_marked(lowest, dropped, most)
    return chosen.flatten(0, 1), kept, marginal.to(scores.dtype).flatten(0, 1)


def _marked(index: Tensor, counts: Tensor, n_blocks: int) -> Tensor:
    """Mask (B, H, Mq, n_blocks) of the blocks ``index`` (B, H, Mq, n) with valid entries ``counts`` (1|B, n)."""
    marked = torch.zeros(*index.shape[:-1], n_blocks, dtype=torch.bool, device=index.device)
    return marked.scatter_(-1, index, counts[:, None, None].expand(index.shape))


def _critical_tiles(
    layout: TokenLayout, q_table: Tensor, k_table: Tensor, chosen: Tensor, kept: Tensor, whole: bool
) -> Tiles:
    """Tiles of one query block each: the tokens of its critical blocks, and the global tokens. ``whole``: all blocks
    are full, and all entries of the lists are valid."""
    global_tokens = global_index(layout, chosen.device)
    n_rows, block_kv = layout.seq_len, k_table.shape[1]
    queries = torch.where(q_table < 0, n_rows, q_table + layout.before)[None]
    n_keys = chosen.shape[-1] * block_kv
    groups = len(chosen)
    kept = kept.repeat_interleave(groups // len(kept), 0)[:, None, :, None]  # (B*H, 1, n, 1)

    def rows(start: int, stop: int) -> TileRows:
        tokens = k_table[chosen[:, start:stop]]  # (B*H, tiles, n, block)
        keys = tokens.clamp(min=0).flatten(2) + layout.before
        keys = torch.cat([keys, global_tokens.expand(groups, stop - start, -1)], -1)
        if whole:
            return TileRows(queries[:, start:stop], keys, None)
        visible = F.pad(((tokens >= 0) & kept).flatten(2), (0, len(global_tokens)), value=True)
        return TileRows(queries[:, start:stop], keys, visible[:, :, None])

    return Tiles(count=len(q_table), n_queries=q_table.shape[1], n_keys=n_keys + len(global_tokens), rows=rows)


def _linear_part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout,
    q_table: Tensor,
    place: Tensor,
    k_table: Tensor,
    valid: Tensor,
    marginal: Tensor | None,
    feature_map: str,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Projected linear attention of the grid tokens, (B, H, N, D); ``marginal`` None = over all keys."""
    q, k, v = (x[:, :, layout.grid_slice].to(_acc(query)) for x in (query, key, value))
    out = torch.zeros_like(q)
    if weight is not None:
        phi_k = torch.where(valid[:, None, :, None], feature(k, feature_map), 0)
        v_and_one = F.pad(v, (0, 1), value=1.0)  # the last column sums the features themselves
        phi_q = feature(q, feature_map)
        if marginal is None:
            total = phi_q @ (phi_k.mT @ v_and_one)
        else:
            total = block_linear_sums(phi_q, phi_k, v_and_one, q_table, place, k_table, marginal)
        out = total[..., :-1] / (total[..., -1:] + EPSILON)
    project = None if weight is None else weight.to(out.dtype)
    return (out if project is None else out @ project.mT) + (0 if bias is None else bias.to(out.dtype))


def _block_lists(layout: TokenLayout, block: int, tile_order: bool) -> list[list[int]]:
    """Tokens of each block."""
    first = layout.before
    if not tile_order:
        return [
            [first + t for t in range(i, min(i + block, layout.grid_len))] for i in range(0, layout.grid_len, block)
        ]
    box = box_shape(block, layout.grid)
    boxes: dict[tuple[int, ...], list[int]] = {}
    for token in range(first, first + layout.grid_len):
        place = layout.coordinates(token) or ()
        boxes.setdefault(tuple(x // side for x, side in zip(place, box, strict=True)), []).append(token)
    return list(boxes.values())
