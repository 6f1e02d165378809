"""Attention transfer: each converted layer is fed what the teacher's was fed. [LoLCATs, arXiv 2410.10254]

The mean over layers is that of the authors' trainer, which compares the heads' outputs. Here the modules' are compared,
after their output projection: all that can be seen of a diffusers attention module from outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention_group import AttentionGroup
from ..families import attention_groups_of
from ..hooks import forward_parameters
from ..install import installed_layers, unwrap
from ..layout import TokenLayout

__all__ = ["Call", "TeacherForced", "recorded_calls"]


@dataclass
class Call:
    """Of one attention module: the token layout, its arguments, and the tensors that it gave."""

    layout: TokenLayout
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...] = ()


@contextmanager
def recorded_calls(teacher: nn.Module, layers: list[str]) -> Iterator[dict[str, Call]]:
    """What the teacher's attention modules of these names are given, and give, while inside."""
    calls: dict[str, Call] = {}
    teacher = unwrap(teacher)
    handles = [handle for group in attention_groups_of(teacher) for handle in _record(teacher, group, layers, calls)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _record(teacher: nn.Module, group: AttentionGroup, layers: list[str], calls: dict[str, Call]) -> Iterator[Any]:
    """The hooks of one group: its owner's forward tells the layout, which comes first."""
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
    """The student's attention modules alone, without the rest of the network. Called as a module of its own, so that
    DistributedDataParallel around it averages the gradients of what its forward uses."""

    def __init__(self, host: nn.Module, layers: list[str]) -> None:
        super().__init__()
        self.host = host
        self.layers = layers

    def forward(self, calls: dict[str, Call]) -> Tensor:
        """() float32: mean over layers of the mean squared distance of all that the module gives (with joint attention
        also the text's) to what the teacher's gave for the same arguments."""
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
