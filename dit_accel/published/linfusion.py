"""LinFusion for Stable Diffusion 1.5, 2.1 and XL (arXiv 2409.02097): whole self-attention modules, numbered; which is
which is in the ``config.json`` beside them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from ..attention_group import self_attention_layers
from ..processor import LinFusionAttnProcessor
from ..weights import WeightsFile, shorten
from ._plan import Plan, check_option_names, learned_key, parameter_names, renamed

NAME = "LinFusion for Stable Diffusion"
MODELS = (UNet2DConditionModel,)

_KEY = re.compile(r"(\d+)\.((to_[qk]_)\.\d+\.(?:weight|bias)|.+)")


def recognises(keys: Collection[str]) -> bool:
    return any(re.fullmatch(r"\d+\.to_[qk]_\.\d+\.(weight|bias)", key) for key in keys)


def plan(model: nn.Module, file: WeightsFile, options: Mapping[str, Any]) -> Plan:
    """The modules' names from ``layers=[...]``, else from ``config.json``; inner widths from the weights.

    Raises: ValueError: no names to be had, or not as many as modules, or not of this U-Net's self-attention; other
        heads than the U-Net's; an option that LinFusion lacks.
    """
    check_option_names(LinFusionAttnProcessor, options, file.path, ("layers",))
    further = {name: value for name, value in options.items() if name != "layers"}
    if "projection_mid_dim" in further:
        raise ValueError(f"projection_mid_dim is the width of {file.path}'s own weights: leave it out")
    layers = _layer_names(file, options.get("layers"))
    _check_layers(model, file, layers, None if "layers" in options else _entries(file))
    processors = {}
    for i, layer in enumerate(layers):
        first = file.weights.get(f"{i}.to_q_.0.weight")
        width = None if first is None or not first.shape else first.shape[0]
        processors[layer] = LinFusionAttnProcessor(projection_mid_dim=width, **further)

    def rename(key: str) -> str | None:
        match = _KEY.fullmatch(key)
        if not match or int(match[1]) >= len(layers):
            return None
        layer = layers[int(match[1])]
        return learned_key(layer, match[2]) if match[3] else f"{layer}.{match[2]}"

    projections = {
        name for name in parameter_names(model) if re.search(r"\.(to_[qkv]|to_out\.0)\.(weight|bias)$", name)
    }
    required = frozenset(name for name in projections if name.rpartition(".to_")[0] in layers)
    told = () if "layers" in options else ("which module is which, from config.json",)
    return Plan(processors, renamed(file, rename), required, told)


def _entries(file: WeightsFile) -> Sequence[Mapping[str, Any]]:
    entries = (file.config or {}).get("modules_list")
    usable = isinstance(entries, list) and all(isinstance(x, dict) and "module_name" in x for x in entries)
    return entries if usable and entries is not None else ()


def _layer_names(file: WeightsFile, given: Sequence[str] | None) -> list[str]:
    layers = [str(entry["module_name"]) for entry in _entries(file)] if given is None else list(given)
    if not layers:
        raise ValueError(
            f"{file.path} is of LinFusion and numbers its modules, and there is no config.json with a modules_list "
            "beside it that names them: put it there, or give layers=[...], the U-Net's modules in the file's order"
        )
    numbers = {int(match[1]) for key in file.weights if (match := _KEY.fullmatch(key))}
    if numbers != set(range(len(layers))):
        raise ValueError(
            f"{file.path} has modules {shorten(map(str, sorted(numbers)))}, but {len(layers)} of them are named: "
            "it is not whole, or these names are of another file"
        )
    if len(set(layers)) < len(layers):
        raise ValueError(f"{file.path}: a module is named twice among {shorten(layers)}")
    return layers


def _check_layers(
    model: nn.Module, file: WeightsFile, layers: Sequence[str], entries: Sequence[Mapping[str, Any]] | None
) -> None:
    """Raises: ValueError: a name that is not of this model's self-attention, or another number of heads."""
    there = self_attention_layers(model)
    absent = [name for name in layers if name not in there]
    if absent:
        raise ValueError(
            f"{file.path} is for self-attention modules that this {type(model).__name__} lacks: {shorten(absent)}. "
            f"It has {len(there)}, {shorten(there, 2)}: is it for another Stable Diffusion?"
        )
    for name, entry in zip(layers, entries or (), strict=False):
        heads = model.get_submodule(name).heads
        if entry.get("heads", heads) != heads:
            raise ValueError(
                f"{file.path} has {entry['heads']} heads in {name}, this U-Net {heads}: it is for another one"
            )
