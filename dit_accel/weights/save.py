"""Save what was learned in the installed attention layers, for :mod:`dit_accel.load`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from ..common.attention_group import GivenLayout
from ..common.files import replacing
from ..install.installation import denoisers, installation_of, installed_layers
from ..install.intercept import MechanismLayer
from ..layout import TokenLayout
from ..mechanisms.processor import AcceleratedAttnProcessor
from .configuration import FUNCTION, SavedComponent, SavedGroup, write_configuration
from .tensors import FILE_NAME

__all__ = ["ADAPTER", "DOWN", "FILE_NAME", "UP", "save_attention", "whole"]

ADAPTER = "conversion"  # peft's name for a LoRA that belongs to the attention; others are the user's own
DOWN, UP = "lora_A", "lora_B"  # (r, in) and (out, r): up @ down is added to a linear layer's weight


def save_attention(pipe_or_model: Any, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Path:
    """Write ``dit_accel.safetensors``: learned parameters, with the configuration as JSON in the file's metadata.

    The file is written whole or not at all. Included are host weights that :func:`dit_accel.load_attention` had
    overwritten or ``dit-accel convert`` has trained, and the LoRA that it has trained, as its two factors. A
    ``TokenLayout`` that was given by hand is saved; a function cannot be. Of a model
    under ``fully_shard`` every process calls it, and the first writes.

    Args:
        pipe_or_model: pipeline or denoiser with an installed mechanism.
        folder: made if it is not there.
        dtype: to save in, such as ``torch.bfloat16`` for half the size; None = the parameters' own.

    Returns: path of the file.
    Raises: ValueError: nothing is installed, or an integer dtype; OSError: the folder cannot be written.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is to be a floating-point one such as torch.bfloat16, got {dtype}")
    tensors: dict[str, Tensor] = {}
    components: dict[str, SavedComponent] = {}
    writes = True
    for component, model in denoisers(pipe_or_model).items():
        layers = installed_layers(model)
        if not layers:
            continue
        sharded = any(_is_sharded(parameter) for parameter in model.parameters())
        writes = not sharded or distributed.get_rank() == 0
        for key, value in _learned(model):
            full = whole(value.detach())  # in every process, one value after the other
            if writes:
                tensors[f"{component}.{key}"] = full.to("cpu", dtype or full.dtype).contiguous()
        components[component] = SavedComponent(_class_name(model), _groups(layers))
    if not components:
        raise ValueError("nothing to save: call dit_accel.set_attn_processor(...) first")
    folder = Path(folder)
    target = folder / FILE_NAME
    if not writes:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"dit_accel": write_configuration(components)}
    with replacing(target) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return target


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, on its mesh's device, in every process, each of which calls this; another tensor itself."""
    if not _is_sharded(tensor):
        return tensor
    split: Any = tensor
    full: Tensor = split.to(split.device_mesh.device_type).full_tensor()
    return full


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, the module of which takes long to import."""
    return hasattr(tensor, "full_tensor")


def _groups(layers: Mapping[str, MechanismLayer]) -> tuple[SavedGroup, ...]:
    """The layers by their processor and their layout, if that was given by hand."""
    groups: dict[tuple[AcceleratedAttnProcessor, TokenLayout | str | None], list[str]] = {}
    for name, layer in layers.items():
        saved = replace(layer.mechanism, backend=None)  # a property of this machine, not of what was learned
        groups.setdefault((saved, _given_layout(layer)), []).append(name)
    return tuple(SavedGroup(processor, tuple(names), layout) for (processor, layout), names in groups.items())


def _given_layout(layer: MechanismLayer) -> TokenLayout | str | None:
    """The layout of a layer if it was given by hand; ``FUNCTION`` for a function, which no file can hold."""
    read = layer.slot.group.read if layer.slot.group is not None else None
    if not isinstance(read, GivenLayout):
        return None
    return read.layout if isinstance(read.layout, TokenLayout) else FUNCTION


def _class_name(model: nn.Module) -> str:
    """Of the class that ``fully_shard`` has put its own in front of."""
    return next(kind.__name__ for kind in type(model).__mro__ if not hasattr(kind, "reshard"))


def _learned(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What is to be saved of a model, by its name in the file."""
    for name, layer in installed_layers(model).items():
        for key, value in layer.named_parameters():
            yield f"{name}.dit_accel.{key}", value
    installation = installation_of(model)
    for key in installation.overwritten if installation else ():
        yield key, model.get_parameter(key)
    yield from _low_rank(model)


def _low_rank(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The conversion's LoRA, by the name of the linear layer."""
    for name, module in model.named_modules():
        down = getattr(getattr(module, DOWN, None), "_modules", {}).get(ADAPTER)
        if down is not None:
            up: Any = module
            yield f"{name}.{DOWN}", down.weight
            yield f"{name}.{UP}", up.lora_B[ADAPTER].weight * up.scaling[ADAPTER]
