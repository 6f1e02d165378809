"""Random calls of the public functions, against the oracle in float64: output and gradients.

A case is what :func:`draw` makes of a seed. :func:`check` runs one and returns how often it had to draw its tensors.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracle
import torch
import torch.nn.functional as F

from dit_accel import TokenLayout, functional
from dit_accel.mechanisms._boxes import box_shape
from dit_accel.mechanisms._tree import default_levels, tile_shapes

BACKENDS = {
    "gna": ("torch", "triton", "flex"),
    "clear": ("torch", "triton", "flex"),
    "sla": ("torch", "triton", "flex"),
    "llsa": ("torch", "triton"),
    "linfusion": ("torch",),
}
# relative to the norm of the whole tensor, as in test_triton_kernels.py and test_triton_gradients.py
OUTPUT = {torch.float64: 1e-11, torch.float32: 2e-6, torch.float16: 2e-3}
GRADIENT = {torch.float64: 1e-10, torch.float32: 4e-6, torch.float16: 3e-3}
STEP = 1e-5  # of finite differences
MARGIN = 3e-6  # of a choice, relative to the largest possible score: below it float32 may choose otherwise
STRIDES = ("contiguous", "heads last", "dims first", "every other row", "one head", "one element", "fused")
MASKS = ("none", "none", "random", "random", "all real", "empty element", "no grid", "end")
MOST_TOKENS = 32
inf = math.inf  # as a radius is printed


@dataclass(frozen=True)
class Case:
    """A call. ``repr`` is a Python expression that makes it again."""

    name: str
    grid: tuple[int, ...]
    before: int
    after: int
    batch: int
    heads: int
    dim: int
    dtype: str
    backend: str
    strides: tuple[str, str, str]
    mask: str
    size: float
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    learned: tuple[str, ...] = ()

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.grid, self.before, self.after)


def draw(seed: int) -> Case:
    """The case of a seed."""
    r = random.Random(seed)
    name = r.choice(("gna",) * 2 + ("clear",) * 4 + ("sla",) * 2 + ("llsa",) * 3 + ("linfusion",))
    backend = r.choice(("triton",) * 4 + BACKENDS[name]) if "triton" in BACKENDS[name] else "torch"
    dtypes = {"triton": ("float32", "float32", "float16"), "flex": ("float32", "float64")}
    grid = _draw_grid(r)
    texts = (0, 0) if name == "linfusion" else (r.choice((0, 0, 1, 5)), r.choice((0, 0, 2, 7)))
    options, learned = OPTIONS[name](r, grid)
    batch, heads = r.choice(((1, 1), (1, 1), (1, 2), (2, 1), (2, 2), (1, 3)))
    if name != "linfusion" and r.random() < 0.3:
        options["scale"] = r.choice((0.3, 1.0, -0.4, -2.0, 0.0, 0.01))
    return Case(
        name, grid, *texts, batch=batch, heads=heads, dim=_draw_dim(r),
        dtype=r.choice(dtypes.get(backend, ("float32", "float64", "float16"))), backend=backend,
        strides=tuple(r.choice(STRIDES) for _ in range(3)), mask=r.choice(MASKS), size=r.choice((1.0, 1.0, 0.05, 2.0)),
        seed=seed, options=options, learned=learned,
    )  # fmt: skip


def _draw_grid(r: random.Random) -> tuple[int, ...]:
    axes = r.choice((1, 2, 2, 2, 3, 3))
    if axes == 2 and r.random() < 0.5:  # narrow: more of its tokens are on a border
        narrow = r.randint(2, 4)
        grid = [narrow, r.randint(narrow, MOST_TOKENS // narrow)]
        r.shuffle(grid)
        return tuple(grid)
    while True:
        grid = tuple(r.randint(1, {1: MOST_TOKENS, 2: 14, 3: 7}[axes]) for _ in range(axes))
        if math.prod(grid) <= MOST_TOKENS:
            return grid


def _draw_dim(r: random.Random) -> int:
    return r.choice((1, 2, 3, 5, 8, 16, 17, 24, 40, r.randint(1, 40)))


def _per_axis(r: random.Random, values: list) -> Any:
    """As a tuple, or as one value where all are the same."""
    return values[0] if len(set(values)) == 1 and r.random() < 0.5 else tuple(values)


def _draw_gna(r: random.Random, grid: tuple[int, ...]) -> tuple[dict[str, Any], tuple[str, ...]]:
    windows = [r.randint(1, n) for n in grid]
    options = {
        "window": windows,
        "stride": [r.randint(1, w) for w in windows],
        "dilation": [r.randint(1, n // w) for n, w in zip(grid, windows, strict=True)],
        "is_causal": [r.random() < 0.3 for _ in grid],
    }
    return {key: _per_axis(r, x) for key, x in options.items()}, ()


def _draw_clear(r: random.Random, grid: tuple[int, ...]) -> tuple[dict[str, Any], tuple[str, ...]]:
    kind = r.choice(("whole", "whole", "one", "tenths", "any", "inf"))
    draw_one = {
        "whole": lambda n: min(r.choice((1, 2, 3, 4, 5, 7, n - 1)), n) or 1,  # mostly with a border on the grid
        "one": lambda n: r.randint(1, 8),
        "tenths": lambda n: r.randint(5, 10 * n) / 10,
        "any": lambda n: r.uniform(0.5, n),
        "inf": lambda n: r.choice((math.inf, r.randint(1, n))),
    }[kind]
    radii = [draw_one(n) for n in grid]
    options: dict[str, Any] = {"radius": radii[0] if kind == "one" else tuple(radii)}
    if len(grid) > 1 and r.random() < 0.4:
        options["down_factor"] = r.randint(2, 4)
        return options, r.choice(((), ("pool_weight",)))
    return options, ()


def _draw_sla(r: random.Random, grid: tuple[int, ...]) -> tuple[dict[str, Any], tuple[str, ...]]:
    critical = r.choice((0.05, 0.2, 0.3, 0.5, 1.0, r.uniform(0.05, 1)))
    options = {
        "critical": critical,
        "negligible": r.choice((0.0, 0.1, r.uniform(0, 1))) * (1 - critical),
        "block_q": r.choice((3, 4, 5, 7, 8, 9, 16, 20)),
        "block_kv": r.choice((2, 3, 4, 5, 6, 8, 16, 19)),
        "feature_map": r.choice(("softmax", "elu", "relu")),
        "linear_over": r.choice(("marginal", "all")),
        "smooth_key": r.random() < 0.5,
        "tile_order": r.random() < 0.5,
    }
    return options, r.choice((("weight", "bias"), ("weight", "bias"), ("weight",), ("bias",), ()))


def _draw_llsa(r: random.Random, grid: tuple[int, ...]) -> tuple[dict[str, Any], tuple[str, ...]]:
    return {
        "block_size": r.choice((2, 3, 4, 5, 6, 7, 8, 9, 10, 16)),
        "topk": r.choice((1, 2, 3, 8)),
        "levels": r.choice((1, 2, 2, 3, None)),
        "enrich": r.random() < 0.75,
    }, ()


OPTIONS = {
    "gna": _draw_gna,
    "clear": _draw_clear,
    "sla": _draw_sla,
    "llsa": _draw_llsa,
    "linfusion": lambda r, grid: ({}, ()),
}


def make(case: Case, attempt: int) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, torch.Tensor]:
    """Inputs by name, the mask, and the gradient of the output; in the case's dtype, before strides and poison."""
    g = torch.Generator().manual_seed(case.seed * 1000 + attempt)
    shape, dim, dtype = (case.batch, case.heads, case.layout.seq_len, case.dim), case.dim, getattr(torch, case.dtype)

    def randn(*sizes: int, size: float = 1.0) -> torch.Tensor:
        return (torch.randn(*sizes, generator=g, dtype=torch.float64) * size).to(dtype)

    tensors = {"query": randn(*shape, size=case.size), "key": randn(*shape, size=case.size), "value": randn(*shape)}
    for x, kind in zip(tensors.values(), case.strides, strict=True):
        if kind in ("one head", "one element"):  # in all places the same
            axis = 1 if kind == "one head" else 0
            x.copy_(x.narrow(axis, 0, 1).expand(shape).clone())
    f = case.options.get("down_factor", 1)
    makers = {
        "weight": lambda: randn(dim, dim, size=dim**-0.5),
        "bias": lambda: randn(dim),
        "pool_weight": lambda: ((torch.rand(f, f, generator=g, dtype=torch.float64) + 0.5) / f**2).to(dtype),
    }
    tensors |= {key: makers[key]() for key in case.learned}
    mask = _make_mask(case, g)
    grad = randn(*shape)
    if mask is not None and case.name in ("sla", "llsa"):  # what blocks of padding alone choose is not defined
        grad = grad * mask[:, None, :, None]
    return tensors, mask, grad


def _make_mask(case: Case, g: torch.Generator) -> torch.Tensor | None:
    if case.mask == "none":
        return None
    layout = case.layout
    mask = torch.rand(case.batch, layout.seq_len, generator=g) > (0.3 if case.mask == "random" else -1)
    if case.mask == "empty element":
        mask[0] = False
    elif case.mask == "no grid":
        mask[:, layout.grid_slice] = False
    elif case.mask == "end":
        mask[-1, -(layout.seq_len // 3 + 1) :] = False
    return mask


def strided(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The same numbers with other strides."""
    if kind == "heads last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "dims first":
        return x.mT.contiguous().mT
    if kind == "every other row":
        return torch.stack([x, x], 3).flatten(2, 3)[:, :, ::2]
    if kind == "fused":
        return torch.stack([x, x, x], 2)[:, :, 1]
    if kind in ("one head", "one element"):
        return x.narrow(1 if kind == "one head" else 0, 0, 1).expand(x.shape)
    return x.contiguous()


def run(
    case: Case, tensors: dict[str, torch.Tensor], mask: torch.Tensor | None, grad: torch.Tensor, backend: str
) -> list[torch.Tensor]:
    """Output and gradients."""
    leaves = {key: x.detach().requires_grad_() for key, x in tensors.items()}
    named = {key: x for key, x in leaves.items() if key in case.learned}
    function = getattr(functional, f"{case.name}_attention")
    qkv = [leaves[key] for key in ("query", "key", "value")]
    out = function(*qkv, case.layout, key_mask=mask, backend=backend, **named, **case.options)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad, materialize_grads=True)]


def ask_oracle(case: Case, tensors: dict[str, torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
    """The output in float64, from the words of the papers."""
    if case.name == "linfusion":
        return _linfusion(*tensors.values(), mask)
    options, grid = dict(case.options), case.grid
    if case.name == "sla" and options.pop("tile_order"):
        options["boxes"] = tuple(box_shape(options[key], grid) for key in ("block_q", "block_kv"))
    if case.name == "llsa":
        block, levels = options.pop("block_size"), options.pop("levels")
        levels = default_levels(grid, block, options["topk"]) if levels is None else levels
        shapes = tile_shapes(grid, block, levels)
        options["boxes"] = list(itertools.accumulate(shapes, lambda a, b: tuple(map(math.prod, zip(a, b)))))  # noqa: B905
    return torch.from_numpy(getattr(oracle, case.name)(
        tensors["query"], tensors["key"], tensors["value"], case.layout, key_mask=mask,
        **{key: tensors[key] for key in case.learned}, **options,
    ))  # fmt: skip


def _linfusion(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    q, k, v = (x.double().numpy() for x in (query, key, value))
    q, k = (np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (q, k))
    real = np.ones((len(q), 1, 1, q.shape[2])) if mask is None else mask.numpy()[:, None, None].astype(float)
    weights = (q @ k.swapaxes(2, 3)) * real / np.maximum(real.sum(-1, keepdims=True), 1)
    return torch.from_numpy(weights @ v / (weights.sum(-1, keepdims=True) + 1e-4))


def check(case: Case) -> int:
    """Run a case. Returns: how often its tensors were drawn again, because a choice of blocks was too close to call.

    Raises: AssertionError: output or a gradient differs from the oracle's by more than rounding.
    """
    for attempt in range(50):
        tensors, mask, grad = make(case, attempt)
        exact = {key: x.double() for key, x in tensors.items()}
        oracle.MARGINS.clear()
        want = ask_oracle(case, exact, mask)
        score = case.dim * float(exact["query"].abs().max() * exact["key"].abs().max())
        if min(oracle.MARGINS, default=math.inf) > MARGIN * score:
            break
    else:
        raise AssertionError(f"no tensors without a tie in 50 attempts: {case!r}")
    rows = torch.ones(())
    if mask is not None and case.name in ("sla", "llsa"):
        rows = mask[:, None, :, None]
    plain = run(case, exact, mask, grad.double(), "torch")
    _check_exact(case, exact, mask, grad.double(), plain, want, rows)
    dtype = getattr(torch, case.dtype)
    kinds = dict(zip(("query", "key", "value"), case.strides, strict=True))
    views = tensors | {key: strided(tensors[key], kind) for key, kind in kinds.items()}
    if mask is not None:  # what is hidden is never read
        for key in ("key", "value"):
            hidden = ~mask[:, None, :, None].expand(views[key].shape)
            if not {"one head", "one element"} & set(case.strides):
                views[key] = strided(tensors[key].masked_fill(hidden, math.nan), kinds[key])
    found = run(case, views, mask, grad, case.backend)
    rough = run(case, tensors, mask, grad, "torch")
    dense = _dense_errors(tensors, grad, mask, case.options.get("scale")) if dtype == torch.float16 else {}
    floors = _floors(case, exact, grad)
    for key, x, y, z in zip(["output", *tensors], found, plain, rough, strict=True):
        assert x.dtype == dtype and x.shape == y.shape, (key, x.dtype, x.shape, case)
        x, y, z = (t.double() * rows if key == "output" else t.double() for t in (x, y, z))
        tolerance = (OUTPUT if key == "output" else GRADIENT)[dtype]
        size = y.norm() + floors[key]
        allowed = 2 * ((z - y).norm() + dense.get(key, 0.0) * size) + tolerance * size
        error = (x - y).norm()
        assert error <= allowed, f"{key}: error {error:.2e} of {y.norm():.2e}, allowed {allowed:.2e}: {case!r}"
    return attempt


def _check_exact(
    case: Case,
    exact: dict[str, torch.Tensor],
    mask: torch.Tensor | None,
    grad: torch.Tensor,
    plain: list[torch.Tensor],
    want: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """The torch path in float64, against the oracle: the output, and the gradients along a random direction."""
    error = ((plain[0] - want) * rows).abs().max()
    assert error <= OUTPUT[torch.float64] * (1 + want.abs().max()), f"float64 output: error {error:.2e}: {case!r}"
    g = torch.Generator().manual_seed(case.seed)
    along = {key: torch.randn(x.shape, generator=g, dtype=torch.float64) for key, x in exact.items()}
    sides = [
        (ask_oracle(case, {key: x + step * along[key] for key, x in exact.items()}, mask) * rows * grad).sum()
        for step in (STEP, -STEP)
    ]
    slope = (sides[0] - sides[1]) / (2 * STEP)
    parts = [(x * along[key]).sum() for key, x in zip(exact, plain[1:], strict=True)]
    size = grad.norm() * (1 + sum(x.norm() for x in plain[1:]))
    assert (sum(parts) - slope).abs() <= 1e-6 * size, f"float64 gradient: {sum(parts)} for {slope}: {case!r}"


def _floors(case: Case, exact: dict[str, torch.Tensor], grad: torch.Tensor) -> dict[str, float]:
    """Size of the terms that a gradient is summed up from: where they cancel, their rounding stays."""
    scale = abs(case.options.get("scale", case.dim**-0.5))
    q, k, v = (float(exact[key].abs().max()) for key in ("query", "key", "value"))
    norm = float(grad.double().norm())
    return {
        "output": 0.0, "query": norm * scale * k * v, "key": norm * scale * q * v, "value": norm,
        "weight": norm * v, "bias": norm, "pool_weight": norm * v * (1 + scale * q * k),
    }  # fmt: skip


def _dense_errors(
    tensors: dict[str, torch.Tensor], grad: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> dict[str, float]:
    """Relative errors of plain dense attention over the same tokens, every step in float16."""
    qkv = [tensors[key] for key in ("query", "key", "value")]
    found = []
    for dtype in (torch.float16, torch.float64):
        q, k, v = leaves = [x.to(dtype).requires_grad_() for x in qkv]
        logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], torch.finfo(torch.float16).min)
        out = F.softmax(logits, -1) @ v
        found.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))])
    errors = [float((x.double() - y).norm() / y.norm()) for x, y in zip(*found, strict=True)]
    return {key: min(x, 1e-2) for key, x in zip(("output", "query", "key", "value"), errors, strict=True) if x == x}
