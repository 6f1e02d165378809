"""Checks of a load plan against its model, before anything is installed or written."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..install.families import family_of
from ..install.installation import installed_layers, new_layer
from .published import Plan
from .tensors import shorten

__all__ = ["check_fit", "check_host", "check_installed", "check_layout", "check_writable"]


def check_host(model: nn.Module, path: Path) -> None:
    """Check that the projections can be overwritten.

    Raises: ValueError: projections that are fused, or that an adapter wraps.
    """
    fused = next((name for name, module in model.named_modules() if _is_fused(module)), None)
    if fused is not None:
        raise ValueError(
            f"{path} has separate query, key and value projections, but those of {fused} are fused: call "
            "unfuse_qkv_projections() first"
        )
    adapter = next((name for name, _ in model.named_parameters() if ".base_layer." in name), None)
    if adapter is not None:
        raise ValueError(
            f"{path} has weights of layers that an adapter wraps ({adapter}): unload or fuse the LoRA first "
            "(pipe.unload_lora_weights()), and load it again afterwards"
        )


def _is_fused(module: nn.Module) -> bool:
    """Return whether the module uses fused projections.

    diffusers' ``Attention`` keeps the mark after unfusing, so its processor decides: those that read fused ones are
    named so.
    """
    from diffusers.models.attention_processor import Attention

    marked = getattr(module, "fused_projections", False) is True
    return marked and (not isinstance(module, Attention) or type(module.processor).__name__.startswith("Fused"))


def check_installed(model: nn.Module, plan: Plan, path: Path) -> None:
    """Check that no layer of the plan has another mechanism.

    Raises: ValueError: another mechanism is installed.
    """
    installed = installed_layers(model)
    for name, processor in plan.processors.items():
        if name in installed and installed[name].mechanism.name != processor.name:
            raise ValueError(
                f"{path} is for {processor.name}, but {installed[name].mechanism.name} is installed on {name}: "
                "call dit_accel.reset_attn_processor(...) first"
            )


def check_layout(model: nn.Module, plan: Plan, path: Path) -> None:
    """Check that every layer has a token layout.

    Raises: ValueError: layers without a layout in the plan, in a model of no supported family.
    """
    without = [name for name in plan.processors if name not in plan.layouts]
    if without and family_of(model) is None:
        raise ValueError(
            f"{path} has no token layout for {shorten(without, 2)}, and dit_accel has none for "
            f"{type(model).__name__}: pass one, load_attention(..., layout=TokenLayout(grid=(H, W), "
            "before=text_tokens)), or a function (model, arguments) -> TokenLayout"
        )


def check_fit(model: nn.Module, plan: Plan, path: Path) -> None:
    """Check that all learned and required parameters are in the plan, that the model has all others, and all shapes.

    Raises: ValueError: layers that the model lacks, missing or unexpected weights, other shapes, integer dtypes.
    """
    modules = dict(model.named_modules())
    absent = [name for name in plan.processors if name not in modules]
    if absent:
        raise ValueError(f"{path} has layers that {type(model).__name__} lacks: {shorten(absent)}")
    expected: dict[str, torch.Size] = {}
    with torch.device("meta"):  # only the shapes are needed
        for name, processor in plan.processors.items():
            layer = new_layer(processor, modules[name], name)
            expected.update({f"{name}.dit_accel.{key}": value.shape for key, value in layer.named_parameters()})
    host = {key: value.shape for key, value in model.named_parameters() if ".dit_accel." not in key}
    missing = [key for key in (*expected, *sorted(plan.required)) if key not in plan.weights]
    unexpected = [key for key in plan.weights if key not in expected and key not in host]
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: missing {shorten(missing)}; unexpected {shorten(unexpected)}"
        )
    for key, weight in plan.weights.items():
        shape = tuple(expected[key] if key in expected else host[key])
        if weight.shape != shape:
            raise ValueError(
                f"{path}: {key} is {weight.shape}, but the model needs {shape}: is the file for another model or head "
                "size?"
            )
        if not weight.dtype.is_floating_point:
            raise ValueError(f"{path}: {key} is {weight.dtype}; expected a floating-point dtype")


def check_writable(model: nn.Module, plan: Plan, path: Path) -> None:
    """Check that the model's own parameters can be written.

    Raises: ValueError: offloaded or quantized parameters.
    """
    for key in plan.weights:
        parameter = None if ".dit_accel." in key else model.get_parameter(key)
        if parameter is not None and (parameter.is_meta or not parameter.is_floating_point()):
            reason = "is offloaded" if parameter.is_meta else "is quantized"
            raise ValueError(
                f"{path} has {key}, which {reason}: load the attention first, and offload or quantize afterwards"
            )
