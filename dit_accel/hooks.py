"""Forward hooks on a denoiser: read the token layout and the denoising step, and forget them afterwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .intercept import LayoutCell, MechanismLayer, Rerouted
from .layout import TokenLayout
from .site import ReadLayout

__all__ = ["ReadStep", "SiteHook", "StepClock", "forward_parameters"]


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the forward arguments, in order; looked up once, since ``inspect`` cannot be traced."""
    return tuple(inspect.signature(module.forward).parameters)


def _by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


class SiteHook:
    """Before the owner's forward, fill the layout cell; after it, whatever happened, empty it."""

    def __init__(self, cell: LayoutCell, read: ReadLayout, names: tuple[str, ...]) -> None:
        self.cell = cell
        self.read = read
        self.names = names

    def __call__(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.cell.last = self.cell.layout = self.read(owner, _by_name(self.names, args, kwargs))
        if torch.compiler.is_compiling():  # the graph itself keeps the layout for its recomputation
            return
        checkpoint = getattr(owner, "_gradient_checkpointing_func", None)
        if getattr(owner, "gradient_checkpointing", False) and checkpoint is not None:
            owner._gradient_checkpointing_func = _CheckpointWithLayout(checkpoint, self.cell)  # type: ignore[assignment]

    def leave(self, owner: nn.Module, *_: Any) -> None:
        self.cell.layout = None
        checkpoint = getattr(owner, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, _CheckpointWithLayout):
            owner._gradient_checkpointing_func = checkpoint.original  # type: ignore[assignment]


class _CheckpointWithLayout:
    """A checkpoint function whose recomputation sees the layout of its own forward, not of the latest one."""

    def __init__(self, original: Callable[..., Any], cell: LayoutCell) -> None:
        self.original = original
        self.cell = cell
        self.layout = cell.layout

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.original(_WithLayout(block, self.cell, self.layout), *args, **kwargs)


class _WithLayout:
    def __init__(self, block: Callable[..., Any], cell: LayoutCell, layout: TokenLayout | None) -> None:
        self.block = block
        self.cell = cell
        self.layout = layout

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outside, self.cell.layout = self.cell.layout, self.layout
        try:
            return self.block(*args, **kwargs)
        finally:
            self.cell.layout = outside


class StepClock:
    """Counts denoising steps by the timesteps that go past: falling within a generation, up again at the next one.

    Shared by the denoisers of a pipeline, so that Wan 2.2's second transformer goes on counting.
    """

    def __init__(self) -> None:
        self.last: float | None = None
        self.step = 0

    def tick(self, timestep: float) -> int:
        """Number, from 0, of the step that this timestep belongs to; equal timesteps are one step (guidance)."""
        if self.last is None or timestep > self.last:
            self.step = 0
        elif timestep < self.last:
            self.step += 1
        self.last = timestep
        return self.step


_NOT_COUNTED = (
    "dense_steps needs the number of the denoising step, which a wholly compiled model cannot read: "
    "use model.compile_repeated_blocks(...) instead of torch.compile(model), or dense_steps=0"
)


class ReadStep:
    """Before the denoiser's forward: see that the processors are still in place, and which layers stay dense."""

    def __init__(self, clock: StepClock, names: tuple[str, ...]) -> None:
        self.clock = clock
        self.names = names
        self.counts = False  # whether a layer has dense_steps

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            if self.counts:
                raise ValueError(_NOT_COUNTED)
            return
        delayed = [layer for layer in self._check(model) if layer.mechanism.dense_steps]
        if not delayed:
            return
        step = None if model.training else self.clock.tick(self._timestep(args, kwargs))
        for layer in delayed:
            layer.dense = step is not None and step < layer.mechanism.dense_steps

    @staticmethod
    def _check(model: nn.Module) -> list[MechanismLayer]:
        layers, gone = [], []
        for name in model._dit_accel.originals:  # type: ignore[union-attr]
            attn = model.get_submodule(name)
            if not isinstance(attn.processor, Rerouted):
                gone.append(name)
            layers.append(attn.dit_accel)
        if gone:
            raise RuntimeError(
                f"the attention processors of {len(gone)} layers ({gone[0]} …) were replaced after dit_accel was "
                "installed; fuse_qkv_projections() and set_attn_processor() of the model do that. Call "
                "dit_accel.reset_attn_processor(...), then do both in the other order"
            )
        return layers  # type: ignore[return-value]

    def _timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        timestep = _by_name(self.names, args, kwargs).get("timestep")
        if timestep is None:
            raise ValueError("dense_steps counts the model's `timestep` argument, and this call passed none")
        return float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
