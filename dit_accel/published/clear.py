"""CLEAR's files for Flux.1-dev: the attention's projections, and in two of the five the weights of pooled patches.

``clear_local_{8,16,32}`` and ``clear_local_{8,16}_down_4``, arXiv 2412.16112.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusers import FluxTransformer2DModel
from torch import nn

from ..attention_group import self_attention_layers
from ..processor import CLEARAttnProcessor
from ..weights import Weight, WeightsFile
from ._plan import Plan, check_option_names, learned_key, parameter_names, renamed

NAME = "CLEAR for Flux.1"
MODELS = (FluxTransformer2DModel,)

_PROJECTION = r"(?:single_)?transformer_blocks\.\d+\.attn\.(?:to_[qkv]|to_out\.0)\.(?:weight|bias)"
_POOLING = r"((?:single_)?transformer_blocks\.\d+\.attn)\.processor\.spatial_weight"
_FILE_NAME = re.compile(r"clear_local_(\d+)(?:_down_(\d+))?(?!\d)")


def recognises(keys: Collection[str]) -> bool:
    return bool(keys) and all(re.fullmatch(f"{_PROJECTION}|{_POOLING}", key) for key in keys)


def plan(model: nn.Module, file: WeightsFile, options: Mapping[str, Any]) -> Plan:
    """``radius`` and ``down_factor`` from the options, else from the file's name; the latter must fit the weights.

    Raises: ValueError: no radius to be had, a ``down_factor`` that is not the weights', an option that CLEAR lacks.
    """
    check_option_names(CLEARAttnProcessor, options, file.path)
    named, told = _from_name(file.path)
    chosen = {**named, **options}
    factor = _pooling_factor(file)
    if "radius" not in chosen:
        raise ValueError(
            f"{file.path} is of CLEAR, and neither it nor its name (clear_local_16_down_4) says the radius that it was "
            f"trained for: give it, as load_attention(pipe, file, radius=16{f', down_factor={factor}' * (factor > 1)})"
        )
    if chosen.setdefault("down_factor", factor) != factor:
        held = f"weights of {factor}×{factor} patches" if factor > 1 else "no spatial_weight, that is down_factor=1"
        source = "you gave" if "down_factor" in options else "its name says"
        raise ValueError(
            f"{file.path} has {held}, but {source} down_factor={chosen['down_factor']}: give down_factor={factor}"
        )
    processor = CLEARAttnProcessor(**chosen)
    weights = {
        name: weight.reshape((factor, factor)) if name.endswith(".pool_weight") else weight
        for name, weight in renamed(file, _rename).items()
    }
    required = frozenset(name for name in parameter_names(model) if re.fullmatch(_PROJECTION, name))
    remarks = [f"{key}={value}, as the {told} is named" for key, value in named.items() if key not in options]
    return Plan(dict.fromkeys(self_attention_layers(model), processor), weights, required, tuple(remarks))


def _rename(key: str) -> str | None:
    pooling = re.fullmatch(_POOLING, key)
    return learned_key(pooling[1], "pool_weight") if pooling else None


def _from_name(path: Path) -> tuple[dict[str, int], str]:
    """The options that the name of the file says, else that of its folder, and which of the two it was."""
    for name, kind in ((path.name, "file"), (path.parent.name, "folder")):
        match = _FILE_NAME.search(name)
        if match:
            return {"radius": int(match[1]), "down_factor": int(match[2] or 1)}, kind
    return {}, "file"


def _pooling_factor(file: WeightsFile) -> int:
    """Side f of the patches: the spatial weights are (1, 1, 1, f, 1, f, 1); 1 where there are none.

    Raises: ValueError: weights of another shape, or not all of one.
    """
    pooling: dict[str, Weight] = {key: x for key, x in file.weights.items() if re.fullmatch(_POOLING, key)}
    if not pooling:
        return 1
    shapes = {weight.shape for weight in pooling.values()}
    shape = shapes.pop()
    if shapes or len(shape) != 7 or shape != (1, 1, 1, shape[3], 1, shape[3], 1):
        raise ValueError(
            f"{file.path}: spatial_weight must be (1, 1, 1, f, 1, f, 1) with one f in all layers, got "
            f"{', '.join(str(x) for x in sorted({shape, *shapes}))}"
        )
    return shape[3]
