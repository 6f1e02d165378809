"""Attention transfer: train each converted layer on the teacher's inputs and outputs. [LoLCATs, arXiv 2410.10254]

The mean over layers is that of the authors' trainer, which compares the outputs of the heads. Here the outputs of the
modules are compared, after their output projection, since a diffusers attention module exposes nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.common.attention_group import AttentionGroup
from dit_accel.install.families import attention_groups_of
from dit_accel.install.hooks import forward_parameters
from dit_accel.install.installation import installed_layers, unwrap
from dit_accel.layout import TokenLayout

__all__ = ["Call", "TeacherForced", "recorded_calls"]


@dataclass
class Call:
    """A call of an attention module: token layout, arguments and output tensors."""

    layout: TokenLayout
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...] = ()


@contextmanager
def recorded_calls(teacher: nn.Module, layers: list[str]) -> Iterator[dict[str, Call]]:
    """Record the calls of the teacher's attention modules, by name, inside the context."""
    calls: dict[str, Call] = {}
    teacher = unwrap(teacher)
    handles = [handle for group in attention_groups_of(teacher) for handle in _record(teacher, group, layers, calls)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _record(teacher: nn.Module, group: AttentionGroup, layers: list[str], calls: dict[str, Call]) -> Iterator[Any]:
    """Hooks of one attention group; the forward pass of the group's owner, which runs first, gives the layout."""
    owner = teacher.get_submodule(group.owner)
    names, layout = forward_parameters(owner), list[TokenLayout]()

    def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layout[:] = [group.read(owner, {**dict(zip(names, args, strict=False)), **kwargs})]

    yield owner.register_forward_pre_hook(read, with_kwargs=True)
    for name in group.layers:
        if name not in layers:
            continue

        def note(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            calls[name] = Call(layout[0], args, kwargs, _tensors(output))

        yield teacher.get_submodule(name).register_forward_hook(note, with_kwargs=True)


def _tensors(output: Any) -> tuple[Tensor, ...]:
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)


class TeacherForced(nn.Module):
    """The student's attention modules without the rest of the network.

    It is a module of its own so that DistributedDataParallel averages the gradients of the parameters it uses.
    """

    def __init__(self, host: nn.Module, layers: list[str]) -> None:
        super().__init__()
        self.host = host
        self.layers = layers

    def forward(self, calls: dict[str, Call]) -> Tensor:
        """Mean squared distance between student's and teacher's outputs for the same arguments; () float32.

        The mean is over all outputs of a module (with joint attention also the text's), then over layers.
        """
        installed = installed_layers(self.host)
        return torch.stack([self._distance(name, installed[name], calls[name]) for name in self.layers]).mean()

    def _distance(self, name: str, layer: Any, call: Call) -> Tensor:
        layer.slot.layout, layer.dense = call.layout, False
        try:
            ours = _tensors(self.host.get_submodule(name)(*call.args, **call.kwargs))
        finally:
            layer.slot.layout = None
        pairs = zip(ours, call.outputs, strict=True)
        squares = torch.stack([(x.float() - y.float()).square().sum() for x, y in pairs])
        return squares.sum() / sum(x.numel() for x in ours)
