"""CLEAR: circular local windows, with pooled tokens for the keys outside (arXiv 2412.16112)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_accel.common.choices import Recipe
from dit_accel.kernels.windows.geometry import BallAxis
from dit_accel.layout import TokenLayout

from ._common import (
    as_tuple,
    check_number,
    check_positive_int,
    global_logits,
    per_axis,
    repeated,
    softmax_rows,
    zero_masked,
)
from ._controls import Control, join_axes
from ._inputs import AttentionInputs
from ._operator import autograd_inside_op
from ._search import SearchSpace, axis_sizes
from ._windows import window_attention, window_attention_backward
from ._workloads import FLUX_4096, Workload
from .backend import BACKENDS
from .processor import AcceleratedAttnProcessor
from .registry import attention_function, reference_function, register_processor

__all__ = ["CLEARAttnProcessor", "clear_attention", "reference"]

Radius = float | Sequence[float]
UNBOUNDED = 2.0**32  # an axis with a larger radius is visible as a whole, so that no square overflows
EXACT_LIMIT = 2**51  # integer costs up to about this limit are exact in float64
BORDER = 1e-15  # costs closer to a limit of 1 than this count as on it: float64 may be off by half as much


@register_processor
@dataclass(frozen=True, kw_only=True)
class CLEARAttnProcessor(AcceleratedAttnProcessor):
    """Attention within a circle (ball, ellipsoid) of grid tokens. [CLEAR, arXiv 2412.16112]

    A query attends to a key iff Σ (Δ_a / radius_a)² < 1 over the axes a, or if either is a global token. With
    ``down_factor`` f > 1 grid queries also attend to keys and values pooled over f×f tiles, in the same softmax.

    Args:
        radius: one for all axes (the authors' window_size: 8, 16, 32), or one per axis; inf = the whole axis. A key
            exactly on the border is outside, also with a radius such as 2.6.
        down_factor: side f of the pooled tiles on the last two axes; 1 = no pooled tokens.
        train_tokens: sequence length that the model was trained with (Flux: 64² + 512). Sets the paper's
            high-resolution scale, ``sqrt(log(S, train_tokens) / D)``, with 10·S instead of S if ``down_factor > 1``.
    """

    radius: float | Sequence[float]
    down_factor: int = 1
    train_tokens: int | None = None

    name: ClassVar[str] = "clear"
    label: ClassVar[str] = "CLEAR"
    summary: ClassVar[str] = "circular window around each token"
    paper: ClassVar[str] = "arXiv 2412.16112"
    backends: ClassVar[tuple[str, ...]] = BACKENDS
    backward_backends: ClassVar[tuple[str, ...]] = ("triton",)
    learned: ClassVar[Mapping[str, str]] = {"pool_weight": "(f, f) learned weights of a tile; None = 1 / f²."}
    recipe: ClassVar[Recipe] = "clear"
    needs_layout: ClassVar[bool] = True

    workloads: ClassVar[tuple[Workload, ...]] = tuple(
        Workload(
            f"clear-flux-4096-r{radius}", f"CLEAR radius {radius}, Flux 4096²", 24, 128, FLUX_4096,
            {"radius": radius}, goals,
        )
        for radius, goals in ((8, {"forward": 25.0}), (16, {"forward": 16.0, "backward": 10.0}), (32, {"forward": 8.0}))
    )  # fmt: skip
    comparison_grid: ClassVar[tuple[int, ...]] = (64, 64)

    def check(self) -> None:
        radii = as_tuple(self.radius)
        if not 1 <= len(radii) <= 3:
            raise ValueError(f"radius must be a number or one per axis, got {self.radius!r}")
        for r in radii:
            if not check_number("radius", r) > 0:
                raise ValueError(f"radius must be greater than 0, got {r}")
        check_positive_int("down_factor", self.down_factor)
        if self.train_tokens is not None:
            check_positive_int("train_tokens", self.train_tokens, least=2)

    def check_scale(self, scale: float | None) -> None:
        if self.train_tokens is not None and scale is not None:
            raise ValueError("expected scale or train_tokens, got both: train_tokens sets the scale, leave one out")

    def fit(self, layout: TokenLayout) -> CLEARAttnProcessor:
        """Give one radius per axis. Nothing shrinks: a circle may be larger than the grid, and a tile over the edge is
        cut off. A 1-D grid is not pooled.

        Raises: ValueError: another number of radii than axes.
        """
        down_factor = self.down_factor if len(layout.grid) > 1 else 1
        return replace(self, radius=per_axis("radius", self.radius, layout), down_factor=down_factor)

    def count_logits(self, layout: TokenLayout) -> float:
        axes, limit = _axes(layout, self.radius)
        cost = torch.zeros(1, dtype=torch.float64, device="cpu")
        pairs = torch.ones(1, dtype=torch.float64, device="cpu")
        for axis in axes:
            distance = torch.arange(min(axis.reach, axis.length - 1) + 1, dtype=torch.float64, device="cpu")
            both_ways = (axis.length - distance) * torch.where(distance > 0, 2.0, 1.0)
            cost = (cost[:, None] + axis.weight * distance.square()).flatten()
            pairs = (pairs[:, None] * both_ways).flatten()
        near = float(pairs[cost < limit].sum())
        return near + global_logits(layout) + float(layout.grid_len * _n_pooled(layout, self.down_factor))

    def compute(self, backend: str, inputs: AttentionInputs) -> Any:
        axes, limit = _axes(inputs.layout, self.radius)
        pooled = _pooled_tokens(inputs, self.down_factor)
        return window_attention(backend, self._scaled(inputs), axes, limit, pooled)

    def backward(self, grad: Tensor, out: Tensor, lse: Tensor, inputs: AttentionInputs) -> Sequence[Tensor]:
        axes, limit = _axes(inputs.layout, self.radius)
        (pool_weight,) = inputs.learned
        leaves = [x.detach().requires_grad_() for x in (inputs.key, inputs.value, pool_weight) if x is not None]
        with autograd_inside_op():
            learned = (None if pool_weight is None else leaves[2],)
            given = inputs._replace(key=leaves[0], value=leaves[1], learned=learned)
            pooled = _pooled_tokens(given, self.down_factor)
        detached = None if pooled is None else (pooled[0].detach(), pooled[1].detach(), pooled[2])
        found = window_attention_backward(grad, out, lse, self._scaled(inputs), axes, limit, detached)
        if pooled is None:
            return [*found[:3], *(torch.zeros_like(x) for x in leaves[2:])]
        more = torch.autograd.grad(pooled[:2], leaves, found[3:], allow_unused=True, materialize_grads=True)
        return [found.query, found.key + more[0], found.value + more[1], *more[2:]]

    def dense_reference(self, inputs: AttentionInputs) -> Tensor:
        query, key, value, key_mask, (pool_weight,), layout, scale = inputs
        acc = torch.promote_types(query.dtype, torch.float32)
        q, k, v = (x.to(acc) for x in (query, zero_masked(key, key_mask), zero_masked(value, key_mask)))
        places = [layout.coordinates(token) for token in range(layout.seq_len)]
        costs = _whole_costs(tuple(_radii(layout, self.radius)))
        visible = torch.tensor([[_is_visible(a, b, *costs) for b in places] for a in places], device=query.device)
        visible = visible.expand(len(q), 1, -1, -1)
        valid = torch.ones(q.shape[0], layout.seq_len, dtype=torch.bool, device=q.device)
        valid = valid if key_mask is None else key_mask
        visible = visible & valid[:, None, None, :]
        if self.down_factor > 1:
            pool, nonempty = _pool_matrix(layout, self.down_factor, pool_weight, valid, acc)
            k, v = (torch.cat([x, pool[:, None] @ x], 2) for x in (k, v))
            on_grid = torch.tensor([place is not None for place in places], device=q.device)
            visible = torch.cat([visible, on_grid[:, None] & nonempty[:, None, None, :]], -1)
        return (softmax_rows(q @ k.mT * scale, visible) @ v).to(query.dtype)

    def learned_shapes(self, head_dim: int) -> dict[str, tuple[int, ...]]:
        return {"pool_weight": (self.down_factor, self.down_factor)}

    def initial_parameters(self, head_dim: int) -> dict[str, Tensor]:
        f = self.down_factor
        return {"pool_weight": torch.full((f, f), 1.0 / f**2)} if f > 1 else {}

    def image_axis_options(self, axes: int, images: int) -> dict[str, Any]:
        return {"radius": (math.inf, *repeated(self.radius, axes))}

    def without_pooled_tokens(self) -> CLEARAttnProcessor:
        return replace(self, down_factor=1, train_tokens=None)

    @classmethod
    def suggest(cls, grid: Sequence[int], share: float = 0.1) -> dict[str, Any]:
        """The radius of an ellipse or ellipsoid that covers this share of the grid; one per axis if sides differ."""
        ball = {1: 2.0, 2: math.pi, 3: 4 / 3 * math.pi}[len(grid)]
        side = (share / ball) ** (1 / len(grid))
        radii = tuple(max(1.5, round(n * side, 1)) for n in grid)
        return {"radius": radii[0] if len(set(radii)) == 1 else radii}

    @classmethod
    def tiny_options(cls, options: Mapping[str, Any], grid: Sequence[int]) -> dict[str, Any]:
        return {**options, "radius": options["radius"] / 4}

    @classmethod
    def search_space(cls, grid: Sequence[int]) -> SearchSpace:
        """Half of a window of each size; four times an axis that it covers, so that it does not narrow the others."""
        axes = axis_sizes(grid)

        def to_options(*sizes: int) -> dict[str, Any]:
            radii = (4 * n if n == axis[-1] else (n + 1) / 2 for n, axis in zip(sizes, axes, strict=True))
            return {"radius": tuple(map(float, radii))}

        return SearchSpace(
            "radius", axes, to_options, lambda own: [2 * radius - 1 for radius in repeated(own.radius, len(axes))]
        )

    @classmethod
    def controls(cls, grid: Sequence[int]) -> tuple[Control, ...]:
        radii = [round(2 * r) / 2 for r in repeated(cls.suggest(grid)["radius"], len(grid))]
        text = "Each token attends to the tokens within this distance."
        space = Control("radius", "Radius, in tokens", 1, max(grid[-2:]), radii[-1], 0.5, text)
        if len(grid) < 3:
            return (space,)
        text = "The same along the time axis."
        return space, Control("radius_time", "Radius in time, in tokens", 0.5, max(grid[0], 1), radii[0], 0.5, text)

    @classmethod
    def from_controls(cls, values: Mapping[str, Any], axes: int) -> dict[str, Any]:
        return {"radius": join_axes(values, "radius", axes)}

    def _scaled(self, inputs: AttentionInputs) -> AttentionInputs:
        """The inputs with the high-resolution scale, if ``train_tokens`` asks for it."""
        if self.train_tokens is None:
            return inputs
        pooled = _n_pooled(inputs.layout, self.down_factor) > 0
        scale = _resolution_scale(inputs.layout, self.train_tokens, pooled, inputs.query.shape[-1])
        return inputs._replace(scale=scale)


clear_attention = attention_function(CLEARAttnProcessor)
reference = reference_function(CLEARAttnProcessor)


def _radii(layout: TokenLayout, radius: Radius) -> list[float]:
    """One radius per axis, at least 1: below 1 only a distance of 0 is inside, as with 1, but the square of a tiny
    radius would underflow."""
    return [max(1.0, float(r)) for r in per_axis("radius", radius, layout)]


def _axes(layout: TokenLayout, radius: Radius) -> tuple[tuple[BallAxis, ...], float]:
    """Costs along the axes, and the limit of their sum (exclusive).

    Raises: ValueError: another number of radii than axes.
    """
    radii = _radii(layout, radius)
    whole, most = _whole_costs(tuple(radii))
    if most <= EXACT_LIMIT:
        weights, limit = [float(w) for w in whole], float(most)
    else:
        weights, limit = [w / most for w in whole], 1 - BORDER
    reaches = [n - 1 if r >= n else math.ceil(r) for n, r in zip(layout.grid, radii, strict=True)]
    return tuple(BallAxis(*x) for x in zip(layout.grid, reaches, weights, strict=True)), limit


@lru_cache(maxsize=256)
def _whole_costs(radii: tuple[float, ...]) -> tuple[list[int], int]:
    """Integers w and m with Σ w Δ² < m iff Σ (Δ / r)² < 1, for integer distances Δ. A radius counts as the decimal
    number that it is written as: 2.6 is 13/5."""
    squares = [Fraction(repr(r)) ** 2 if r < UNBOUNDED else None for r in radii]
    most = math.lcm(*(s.numerator for s in squares if s))
    weights = [most * s.denominator // s.numerator if s else 0 for s in squares]
    shared = math.gcd(*weights) or 1
    return [w // shared for w in weights], -(-most // shared)


def _n_pooled(layout: TokenLayout, down_factor: int) -> int:
    """Number of pooled tokens. Raises: ValueError: pooling on a 1-D grid."""
    if down_factor == 1:
        return 0
    if len(layout.grid) == 1:
        raise ValueError(
            f"down_factor {down_factor} pools tiles of two axes but grid {layout.grid} has one: use 1 there"
        )
    *frames, height, width = layout.grid
    return math.prod(frames) * -(-height // down_factor) * -(-width // down_factor)


def _resolution_scale(layout: TokenLayout, train_tokens: int, pooled: bool, dim: int) -> float:
    """High-resolution scale sqrt(log(S, S_train) / D), with ten times S if there are pooled tokens."""
    return math.sqrt(math.log(layout.seq_len * (10 if pooled else 1), train_tokens) / dim)


def _split_tiles(x: Tensor, layout: TokenLayout, f: int) -> Tensor:
    """Split (..., N) on the grid into tiles (..., frames * tiles, f * f), zero (False) off the grid."""
    height, width = layout.grid[-2:]
    x = x.unflatten(-1, (-1, height, width))
    x = torch.nn.functional.pad(x, (0, -width % f, 0, -height % f))
    x = x.unflatten(-1, (-1, f)).unflatten(-3, (-1, f))  # (..., frames, h, f, w, f)
    return x.transpose(-3, -2).flatten(-2).flatten(-4, -2)


def _tile_weights(
    layout: TokenLayout, f: int, pool_weight: Tensor | None, key_mask: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights of the tokens of each tile, (B or 1, P, f²): 0 off the grid and on padding, the rest scaled to the same
    sum; and the tiles with a valid token, (B or 1, P)."""
    acc = torch.promote_types(like.dtype, torch.float32)
    if pool_weight is None:
        pool_weight = torch.full((f, f), 1 / f**2, dtype=acc, device=like.device)
    weight = pool_weight.to(acc).flatten()
    if key_mask is None:
        valid = torch.ones(1, layout.grid_len, dtype=torch.bool, device=like.device)
    else:
        valid = key_mask[:, layout.grid_slice]
    valid = _split_tiles(valid, layout, f)
    kept = weight * valid
    left = kept.sum(-1, keepdim=True)
    scaled = kept * (weight.sum() / torch.where(left == 0, 1, left))
    # a full tile keeps its weights as they are, whatever their sum
    return torch.where(valid.all(-1, keepdim=True), kept, scaled), valid.any(-1)


def _pool(x: Tensor, weights: Tensor, layout: TokenLayout) -> Tensor:
    """Pool (B, H, S, D) → (B, H, P, D): weighted sums over tiles."""
    f = math.isqrt(weights.shape[-1])
    tiles = _split_tiles(x[:, :, layout.grid_slice].transpose(-1, -2), layout, f)  # (B, H, D, P, f²)
    return (tiles.to(weights.dtype) * weights[:, None, None]).sum(-1).transpose(-1, -2).to(x.dtype)


def _pooled_tokens(inputs: AttentionInputs, down_factor: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Pooled keys and values, and the mask of those with a valid token (None: all)."""
    _, key, value, key_mask, (pool_weight,), layout, _ = inputs
    if not _n_pooled(layout, down_factor):
        return None
    key, value = zero_masked(key, key_mask), zero_masked(value, key_mask)
    weights, nonempty = _tile_weights(layout, down_factor, pool_weight, key_mask, key)
    pooled_mask = None if key_mask is None else nonempty.expand(len(key), -1)
    return _pool(key, weights, layout), _pool(value, weights, layout), pooled_mask


def _is_visible(a: tuple[int, ...] | None, b: tuple[int, ...] | None, weights: list[int], limit: int) -> bool:
    if a is None or b is None:
        return True
    return sum(w * (x - y) ** 2 for x, y, w in zip(a, b, weights, strict=True)) < limit


def _pool_matrix(
    layout: TokenLayout, f: int, pool_weight: Tensor | None, valid: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weights of the tokens in the pooled tokens, (B, P, S), and the pooled tokens with a valid token, (B, P)."""
    if pool_weight is None:
        pool_weight = torch.full((f, f), 1 / f**2, dtype=dtype, device=valid.device)
    tiles: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    for token in range(layout.before, layout.before + layout.grid_len):
        *frame, y, x = layout.coordinates(token)  # type: ignore[misc]
        tiles.setdefault((*frame, y // f, x // f), []).append((token, y % f, x % f))
    rows, nonempty = [], []
    for b in range(len(valid)):
        for members in tiles.values():
            inside = [m for m in members if valid[b, m[0]]]
            row = torch.zeros(layout.seq_len, dtype=dtype, device=valid.device)
            if inside:
                tokens, ys, xs = (list(i) for i in zip(*inside, strict=True))
                w = pool_weight.to(dtype)[ys, xs]
                factor = 1 if len(inside) == f * f else pool_weight.to(dtype).sum() / w.sum()
                row = row.index_add(0, torch.tensor(tokens, device=valid.device), w * factor)
            rows.append(row)
            nonempty.append(bool(inside))
    shape = (len(valid), len(tiles))
    return torch.stack(rows).unflatten(0, shape), torch.tensor(nonempty, device=valid.device).view(shape)
