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


def _cases(benchmark: str) -> dict[str, Case]:
    """Cases of all registered mechanisms for a benchmark, by name."""
    found = {}
    for kind in PROCESSORS.values():
        for work in kind.workloads:
            if benchmark not in work.goals:
                continue
            learned = {
                name: tuple(x.shape) for name, x in kind(**work.options).initial_parameters(work.head_dim).items()
            }
            found[work.name] = Case(
                work.name, work.title, kind.name, work.heads, work.head_dim, work.layout, work.options,
                work.goals[benchmark], learned,
            )  # fmt: skip
    return found


CASES, BACKWARD, SCALING = (_cases(benchmark) for benchmark in ("forward", "backward", "scaling"))


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


def smoke(case: Case) -> Case:
    """Tiny version of a case that runs on any machine, to test the code path; its timings mean nothing."""
    grid = {1: (64,), 2: (12, 16), 3: (4, 6, 8)}[len(case.layout.grid)]
    if case.name in SCALING:
        grid = tuple(n // 16 for n in case.layout.grid)  # sizes must differ
    layout = TokenLayout(grid, before=min(case.layout.before, 5))
    options = PROCESSORS[case.mechanism].tiny_options(case.options, grid)
    learned = {name: (16,) * len(shape) for name, shape in case.learned.items()}
    return replace(case, heads=2, head_dim=16, layout=layout, options=options, learned=learned, goal=None)


def small(case: Case) -> Case:
    """Smaller version of a case with the same options, which plain torch can compute in float32, to compare results."""
    limits = PROCESSORS[case.mechanism].comparison_grid or case.layout.grid
    grid = tuple(min(n, limit) for n, limit in zip(case.layout.grid, limits, strict=True))
    return replace(case, heads=2, layout=TokenLayout(grid, before=min(case.layout.before, 64)))
