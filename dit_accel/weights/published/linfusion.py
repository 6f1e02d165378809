"""LinFusion for Stable Diffusion 1.5, 2.1 and XL (arXiv 2409.02097): complete self-attention modules, numbered.

A ``config.json`` in the same folder maps the numbers to names of modules.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from dit_accel.common.attention_group import self_attention_layers
from dit_accel.mechanisms.linfusion import LinFusionAttnProcessor

from ..tensors import WeightsFile, shorten
from ._plan import Plan, check_option_names, learned_key, parameter_names, rename_weights

NAME = "LinFusion for Stable Diffusion"
MODELS = (UNet2DConditionModel,)

_KEY = re.compile(r"(\d+)\.((to_[qk]_)\.\d+\.(?:weight|bias)|.+)")


def recognises(keys: Collection[str]) -> bool:
    return any(re.fullmatch(r"\d+\.to_[qk]_\.\d+\.(weight|bias)", key) for key in keys)


def plan(model: nn.Module, file: WeightsFile, options: Mapping[str, Any]) -> Plan:
    """Return the plan, with the names of modules from ``layers=[...]``, or else from ``config.json``.

    Inner widths are those of the weights.

    Raises: ValueError: no names, another number of names than of modules, names that are not self-attention modules of
        this U-Net, another number of heads, an option that LinFusion lacks.
    """
    check_option_names(LinFusionAttnProcessor, options, file.path, ("layers",))
    further = {name: value for name, value in options.items() if name != "layers"}
    if "projection_mid_dim" in further:
        raise ValueError(f"projection_mid_dim is read from the weights of {file.path}: leave it out")
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
    remarks = () if "layers" in options else ("names of the modules from config.json",)
    return Plan(processors, rename_weights(file, rename), required, remarks)


def _entries(file: WeightsFile) -> Sequence[Mapping[str, Any]]:
    entries = (file.config or {}).get("modules_list")
    usable = isinstance(entries, list) and all(isinstance(x, dict) and "module_name" in x for x in entries)
    return entries if usable and entries is not None else ()


def _layer_names(file: WeightsFile, given: Sequence[str] | None) -> list[str]:
    layers = [str(entry["module_name"]) for entry in _entries(file)] if given is None else list(given)
    if not layers:
        raise ValueError(
            f"{file.path} is a LinFusion file with numbered modules; expected a config.json with a modules_list in its "
            "folder, found none: add it, or pass layers=[...], the U-Net's modules in the file's order"
        )
    numbers = {int(match[1]) for key in file.weights if (match := _KEY.fullmatch(key))}
    if numbers != set(range(len(layers))):
        raise ValueError(
            f"{file.path} has modules {shorten(map(str, sorted(numbers)))}, but {len(layers)} names were found: "
            "the file is incomplete, or the names are those of another file"
        )
    if len(set(layers)) < len(layers):
        raise ValueError(f"{file.path}: the names of its modules must differ, got {shorten(layers)}")
    return layers


def _check_layers(
    model: nn.Module, file: WeightsFile, layers: Sequence[str], entries: Sequence[Mapping[str, Any]] | None
) -> None:
    """Check that all names are self-attention modules of the model, with the same number of heads.

    Raises: ValueError: another name, or another number of heads.
    """
    available = self_attention_layers(model)
    absent = [name for name in layers if name not in available]
    if absent:
        raise ValueError(
            f"{file.path} is for self-attention modules that this {type(model).__name__} lacks: {shorten(absent)}. "
            f"It has {len(available)}, {shorten(available, 2)}: is the file for another Stable Diffusion?"
        )
    for name, entry in zip(layers, entries or (), strict=False):
        heads = model.get_submodule(name).heads
        if entry.get("heads", heads) != heads:
            raise ValueError(
                f"{file.path} has {entry['heads']} heads in {name}, but this U-Net has {heads}: it is for another one"
            )
