"""Attention calls to measure, by name: shapes and options of real models, and speed-up goals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..layout import TokenLayout
from ..mechanisms.registry import PROCESSORS

__all__ = ["BACKWARD", "CASES", "SCALING", "Case", "select", "small", "smoke"]


@dataclass(frozen=True)
class Case:
    """One attention call. ``goal``: speed-up over dense attention to reach; None: no goal."""

    name: str
    work: str
    mechanism: str
    heads: int
    head_dim: int
    layout: TokenLayout
    options: Mapping[str, Any]
    goal: float | None
    learned: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # shapes of the learned tensors

    @property
    def default(self) -> bool:
        """Whether the case is measured by default; without Triton kernels, its real size takes too long."""
        return "triton" in PROCESSORS[self.mechanism].backends

    @property
    def fraction(self) -> float:
        """Computed softmax logits as a share of dense attention's."""
        return PROCESSORS[self.mechanism](**self.options).count_logits(self.layout) / self.layout.seq_len**2

    @property
    def dense_flop(self) -> float:
        """Floating point operations of dense attention's forward pass."""
        return 4.0 * self.heads * self.head_dim * self.layout.seq_len**2

    def inputs(self, device: torch.device, dtype: torch.dtype, order: str, seed: int) -> list[Tensor]:
        """Random query, key and value, (1, H, S, D).

        ``order`` "tokens-first" returns views of (1, S, H, D), the memory layout in models. The values are normal, as
        normalised queries and keys nearly are; no mechanism's time depends on them.
        """
        generator = torch.Generator(device).manual_seed(seed)
        shape = (1, self.heads, self.layout.seq_len, self.head_dim)
        if order == "tokens-first":
            shape = (1, self.layout.seq_len, self.heads, self.head_dim)
        made = [torch.randn(shape, dtype=dtype, device=device, generator=generator) for _ in range(3)]
        return [x.transpose(1, 2) for x in made] if order == "tokens-first" else made

    def parameters(self, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        """Random learned tensors; they are initialised with zeros, which an implementation could skip."""
        generator = torch.Generator(device).manual_seed(seed + 1)
        return {
            name: torch.randn(shape, dtype=dtype, device=device, generator=generator) / shape[-1] ** 0.5
            for name, shape in self.learned.items()
        }

    def call(self, tensors: Sequence[Tensor], parameters: Mapping[str, Tensor], backend: str | None) -> Tensor:
        """Call the mechanism's public function."""
        function = getattr(functional, f"{self.mechanism}_attention")
        return function(*tensors, self.layout, **self.options, **parameters, backend=backend)


_WAN_480P = TokenLayout((21, 30, 52))
_WAN_720P = TokenLayout((21, 45, 80))
_HUNYUAN = TokenLayout((30, 48, 80))
_FLUX_4096 = TokenLayout((256, 256), before=512)


def _sla(
    name: str, work: str, heads: int, layout: TokenLayout, goals: tuple[float, float], critical: float = 0.05
) -> list[Case]:
    """SLA cases with blocks of 128×64: linear branch over all keys with smooth keys, as in the authors' later release,
    and over the marginal blocks."""
    learned = {"weight": (128, 128), "bias": (128,)}
    common: dict[str, Any] = {"critical": critical, "negligible": 0.10, "block_q": 128, "block_kv": 64}
    forms: tuple[tuple[str, dict[str, Any]], ...] = (
        ("all", {"linear_over": "all", "smooth_key": True}),
        ("marginal", {"linear_over": "marginal"}),
    )
    title = f"SLA {100 * critical:g} %"
    return [
        Case(f"{name}-{form}", f"{title}, {form}, {work}", "sla", heads, 128, layout, common | options, goal, learned)
        for (form, options), goal in zip(forms, goals, strict=True)
    ]


def _llsa(name: str, heads: int, head_dim: int) -> Case:
    options = {"block_size": 16, "topk": 8, "levels": 2}
    return Case(name, "LLSA, 256×256 pixels", "llsa", heads, head_dim, TokenLayout((256, 256)), options, 30.0)


def _named(cases: Sequence[Case]) -> dict[str, Case]:
    return {case.name: case for case in cases}


CASES = _named([
    *_sla("sla-wan1.3b-480p", "Wan2.1-1.3B 480p", 12, _WAN_480P, (12.0, 9.0)),
    *_sla("sla-wan14b-720p", "Wan-14B 720p", 40, _WAN_720P, (15.0, 12.0)),
    *_sla("sla-hunyuan-720p", "Hunyuan 720p", 24, _HUNYUAN, (15.5, 12.5)),
    *(
        Case(
            f"clear-flux-4096-r{radius}", f"CLEAR radius {radius}, Flux 4096²", "clear", 24, 128, _FLUX_4096,
            {"radius": radius}, goal,
        )
        for radius, goal in ((8, 25.0), (16, 16.0), (32, 8.0))
    ),
    Case(
        "gna-hunyuan", "GNA 18×24×24, stride 16×8×8, Hunyuan", "gna", 24, 128, _HUNYUAN,
        {"window": (18, 24, 24), "stride": (16, 8, 8)}, 9.7,
    ),
    Case(
        "gna-flux-256", "GNA 80², stride 16², Flux 256×256", "gna", 24, 128, TokenLayout((256, 256)),
        {"window": 80, "stride": 16}, 9.2,
    ),
    _llsa("llsa-256", 12, 64),
    _llsa("llsa-256-wide", 24, 128),
])  # fmt: skip
BACKWARD = _named([
    *_sla("sla-wan1.3b-480p-10", "Wan2.1-1.3B 480p", 12, _WAN_480P, (5.0, 5.0), critical=0.10),
    replace(CASES["clear-flux-4096-r16"], goal=10.0),
    replace(CASES["gna-hunyuan"], goal=6.0),
    replace(CASES["llsa-256"], goal=20.0),
    replace(CASES["llsa-256-wide"], goal=None),
])  # fmt: skip
SCALING = _named([  # number of levels: default for each size
    Case(
        f"llsa-{side}x{side}", f"LLSA, {side}×{side}", "llsa", 8, 64, TokenLayout((side, side)),
        {"block_size": 16, "topk": 8}, None,
    )
    for side in (64, 96, 128, 192, 256, 384, 512, 768, 1024)
])  # fmt: skip


def select(names: Sequence[str], cases: Mapping[str, Case] = CASES) -> list[Case]:
    """Select cases by name or by a prefix of names (``sla-wan1.3b-480p``).

    Without names: the default cases, or all cases if none is a default one.

    Raises: ValueError: an unknown name; the message suggests the nearest and lists all.
    """
    if not names:
        return [case for case in cases.values() if case.default] or list(cases.values())
    chosen: dict[str, Case] = {}
    for name in names:
        found = {key: case for key, case in cases.items() if key == name or key.startswith(f"{name}-")}
        if name in cases:
            found = {name: cases[name]}
        if not found:
            close = get_close_matches(name, cases, n=1, cutoff=0.3)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"unknown case {name!r}{hint} Available: {', '.join(cases)}")
        chosen |= found
    return list(chosen.values())


_SMOKE: dict[str, dict[str, Any]] = {
    "sla": {"block_q": 32, "block_kv": 16, "critical": 0.25},
    "clear": {},
    "gna": {},
    "llsa": {"block_size": 4, "topk": 2},
}


def smoke(case: Case) -> Case:
    """Tiny version of a case that runs on any machine, to test the code path; its timings mean nothing."""
    grid = {1: (64,), 2: (12, 16), 3: (4, 6, 8)}[len(case.layout.grid)]
    if case.name in SCALING:
        grid = tuple(n // 16 for n in case.layout.grid)  # sizes must differ
    layout = TokenLayout(grid, before=min(case.layout.before, 5))
    options = dict(case.options) | _SMOKE[case.mechanism]
    if case.mechanism == "clear":
        options["radius"] /= 4
    elif case.mechanism == "gna":
        options = {"window": tuple(n // 2 for n in grid), "stride": tuple(n // 4 for n in grid)}
    learned = {name: (16,) * len(shape) for name, shape in case.learned.items()}
    return replace(case, heads=2, head_dim=16, layout=layout, options=options, learned=learned, goal=None)


_SMALL = {"sla": (6, 16, 16), "clear": (64, 64), "gna": (20, 32, 32), "llsa": (64, 64)}


def small(case: Case) -> Case:
    """Smaller version of a case with the same options, which plain torch can compute in float32, to compare results."""
    limits = _SMALL[case.mechanism]
    grid = tuple(min(n, limit) for n, limit in zip(case.layout.grid, limits, strict=True))
    return replace(case, heads=2, layout=TokenLayout(grid, before=min(case.layout.before, 64)))
