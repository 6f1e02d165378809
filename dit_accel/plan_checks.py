"""Checks of a plan against the model that it is for, before anything is installed or written."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .families import family_of
from .install import installed_layers, new_layer
from .published import Plan
from .weights import shorten

__all__ = ["check_fit", "check_host", "check_installed", "check_layout", "check_writable"]


def check_host(model: nn.Module, path: Path) -> None:
    """Raises: ValueError: projections that are not read where the file's would be written."""
    fused = next((name for name, module in model.named_modules() if _is_fused(module)), None)
    if fused is not None:
        raise ValueError(
            f"{path} has query, key and value projections, which {fused} has fused into one: call "
            "unfuse_qkv_projections() first"
        )
    adapter = next((name for name, _ in model.named_parameters() if ".base_layer." in name), None)
    if adapter is not None:
        raise ValueError(
            f"{path} has weights that an adapter is around ({adapter}): unload or fuse the LoRA first "
            "(pipe.unload_lora_weights()), and load it again afterwards"
        )


def _is_fused(module: nn.Module) -> bool:
    """A U-Net keeps the mark when it is unfused; what its plain processor reads are the single projections."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    plain = isinstance(getattr(module, "processor", None), AttnProcessor2_0)
    return getattr(module, "fused_projections", False) is True and not plain


def check_installed(model: nn.Module, plan: Plan, path: Path) -> None:
    installed = installed_layers(model)
    for name, processor in plan.processors.items():
        if name in installed and installed[name].mechanism.name != processor.name:
            raise ValueError(
                f"{path} is for {processor.name}, but {installed[name].mechanism.name} is installed on {name}: "
                "call dit_accel.reset_attn_processor(...) first"
            )


def check_layout(model: nn.Module, plan: Plan, path: Path) -> None:
    """Raises: ValueError: layers whose token layout neither the plan nor the model's family gives."""
    without = [name for name in plan.processors if name not in plan.layouts]
    if without and family_of(model) is None:
        raise ValueError(
            f"{path} holds no token layout for {shorten(without, 2)}, and dit_accel does not know where the tokens of "
            f"{type(model).__name__} are: pass it, load_attention(..., layout=TokenLayout(grid=(H, W), "
            "before=text_tokens)), or a function (model, arguments) -> TokenLayout"
        )


def check_fit(model: nn.Module, plan: Plan, path: Path) -> None:
    """Every learned and every required parameter is there with its shape, and nothing else but what the host has.

    Raises: ValueError: layers that the model lacks, missing and unexpected weights, other shapes, whole numbers.
    """
    modules = dict(model.named_modules())
    absent = [name for name in plan.processors if name not in modules]
    if absent:
        raise ValueError(f"{path} has layers that {type(model).__name__} lacks: {shorten(absent)}")
    expected: dict[str, torch.Size] = {}
    with torch.device("meta"):  # for the shapes alone
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
                f"{path}: {key} is {weight.shape}, the model needs {shape} (a model of another size, or another head "
                "size?)"
            )
        if not weight.dtype.is_floating_point:
            raise ValueError(f"{path}: {key} is {weight.dtype}; expected floating-point numbers")


def check_writable(model: nn.Module, plan: Plan, path: Path) -> None:
    """Raises: ValueError: parameters that are not there to be written, or not as the numbers that they stand for."""
    for key in plan.weights:
        parameter = None if ".dit_accel." in key else model.get_parameter(key)
        if parameter is not None and (parameter.is_meta or not parameter.is_floating_point()):
            reason = "is offloaded, its weights are elsewhere" if parameter.is_meta else "is quantized"
            raise ValueError(
                f"{path} has {key}, which {reason}: load the attention first, and offload or quantize afterwards"
            )
