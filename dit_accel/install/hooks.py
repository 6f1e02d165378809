"""Forward hooks on a denoiser: read the token layout and the denoising step, and forget them afterwards."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import TokenLayout
from .intercept import InterceptedProcessor, LayoutSlot, MechanismLayer, ThreadSlot

__all__ = ["LayoutHook", "StepClock", "StepHook", "forward_parameters"]


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the forward arguments, in order; looked up once, since ``inspect`` cannot be traced."""
    return tuple(inspect.signature(module.forward).parameters)


def _by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


class LayoutHook:
    """Before the owner's forward, fill the layout slot; after it, whatever happened, empty it."""

    def __init__(self, slot: LayoutSlot, owner: nn.Module) -> None:
        assert slot.group is not None
        self.slot = slot
        self.read = slot.group.read
        self.names = forward_parameters(owner)
        self.handles = [
            owner.register_forward_pre_hook(self, with_kwargs=True),
            owner.register_forward_hook(self.leave, always_call=True),
        ]

    def __call__(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.slot.last = self.slot.layout = self.read(owner, _by_name(self.names, args, kwargs))
        if torch.compiler.is_compiling():  # the graph itself keeps the layout for its recomputation
            return
        if getattr(owner, "gradient_checkpointing", False):
            _CheckpointWithLayouts.enter(owner, self.slot)

    def leave(self, owner: nn.Module, *_: Any) -> None:
        entered = self.slot.layout is not None  # else reading it has failed
        self.slot.layout = None
        if entered and not torch.compiler.is_compiling():
            _CheckpointWithLayouts.leave(owner, self.slot)

    def remove(self) -> None:
        """Take the hooks off the owner."""
        for handle in self.handles:
            handle.remove()


class _CheckpointWithLayouts:
    """A checkpoint function whose recomputation sees the layouts of its own forward, not of the latest one.

    In place of the owner's function while a forward is in progress in any thread.
    """

    _LOCK = threading.Lock()

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.entered: dict[LayoutSlot, int] = {}  # forwards in progress by slot

    @classmethod
    def enter(cls, owner: nn.Module, slot: LayoutSlot) -> None:
        with cls._LOCK:
            function = getattr(owner, "_gradient_checkpointing_func", None)
            if function is None:
                return
            if not isinstance(function, cls):
                function = cls(function)
                owner._gradient_checkpointing_func = function  # type: ignore[assignment]
            function.entered[slot] = function.entered.get(slot, 0) + 1

    @classmethod
    def leave(cls, owner: nn.Module, slot: LayoutSlot) -> None:
        function = getattr(owner, "_gradient_checkpointing_func", None)
        if not isinstance(function, cls):
            return
        with cls._LOCK:
            function.entered[slot] = function.entered.get(slot, 0) - 1
            if not any(count > 0 for count in function.entered.values()):
                owner._gradient_checkpointing_func = function.original  # type: ignore[assignment]

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        layouts = {slot: slot.layout for slot in tuple(self.entered)}
        return self.original(_WithLayouts(block, layouts), *args, **kwargs)


class _WithLayouts:
    def __init__(self, block: Callable[..., Any], layouts: Mapping[LayoutSlot, TokenLayout | None]) -> None:
        self.block = block
        self.layouts = layouts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outside = {slot: slot.layout for slot in self.layouts}
        _set_layouts(self.layouts)
        try:
            return self.block(*args, **kwargs)
        finally:
            _set_layouts(outside)


def _set_layouts(layouts: Mapping[LayoutSlot, TokenLayout | None]) -> None:
    for slot, layout in layouts.items():
        slot.layout = layout


class StepClock:
    """Counts denoising steps by the timesteps that go past: falling within a generation, up again at the next one.

    Shared by the denoisers of a pipeline: Wan 2.2's second transformer continues the count. Threads count separately.
    """

    def __init__(self) -> None:
        self._latest = ThreadSlot()  # (latest timestep, its step)

    @property
    def step(self) -> int:
        """Number, from 0, of this thread's latest step."""
        return self._latest.value[1] if self._latest.value else 0

    def tick(self, timestep: float) -> int:
        """Number, from 0, of the step that this timestep belongs to; equal timesteps are one step (guidance)."""
        last, step = self._latest.value or (timestep, 0)
        if timestep > last:
            step = 0
        elif timestep < last:
            step += 1
        self._latest.value = timestep, step
        return step


_NOT_COUNTED = (
    "dense_steps needs the number of the denoising step, which a wholly compiled model cannot read: "
    "use model.compile_repeated_blocks(...) instead of torch.compile(model), or dense_steps=0"
)


class StepHook:
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
            if not isinstance(attn.processor, InterceptedProcessor):
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
