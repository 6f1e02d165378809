"""CLEAR for Flux.1-dev (arXiv 2412.16112): the attention projections, and pooling weights if there are pooled tokens.

The five files are ``clear_local_{8,16,32}`` and, with pooled tokens, ``clear_local_{8,16}_down_4``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusers import FluxTransformer2DModel
from torch import nn

from dit_accel.common.attention_group import self_attention_layers
from dit_accel.mechanisms.clear import CLEARAttnProcessor

from ..tensors import Weight, WeightsFile
from ._plan import Plan, check_option_names, learned_key, parameter_names, rename_weights

NAME = "CLEAR for Flux.1"
MODELS = (FluxTransformer2DModel,)

_PROJECTION = r"(?:single_)?transformer_blocks\.\d+\.attn\.(?:to_[qkv]|to_out\.0)\.(?:weight|bias)"
_POOLING = r"((?:single_)?transformer_blocks\.\d+\.attn)\.processor\.spatial_weight"
_FILE_NAME = re.compile(r"clear_local_(\d+)(?:_down_(\d+))?(?!\d)")


def recognises(keys: Collection[str]) -> bool:
    return bool(keys) and all(re.fullmatch(f"{_PROJECTION}|{_POOLING}", key) for key in keys)


def plan(model: nn.Module, file: WeightsFile, options: Mapping[str, Any]) -> Plan:
    """Return the plan, with ``radius`` and ``down_factor`` from the options, or else from the file name.

    Raises: ValueError: no radius, a ``down_factor`` that does not match the weights, an option that CLEAR lacks.
    """
    check_option_names(CLEARAttnProcessor, options, file.path)
    named, source = _options_from_name(file.path)
    chosen = {**named, **options}
    factor = _pooling_factor(file)
    if "radius" not in chosen:
        raise ValueError(
            f"{file.path} is a CLEAR file, and its name does not contain the radius, as clear_local_16_down_4 does: "
            f"pass it, load_attention(pipe, file, radius=16{f', down_factor={factor}' * (factor > 1)})"
        )
    if chosen.setdefault("down_factor", factor) != factor:
        found = f"weights of {factor}×{factor} tiles" if factor > 1 else "no spatial_weight, that is down_factor=1"
        origin = "passed" if "down_factor" in options else "in its name"
        raise ValueError(
            f"{file.path} has {found}, but down_factor={chosen['down_factor']} was {origin}: pass down_factor={factor}"
        )
    processor = CLEARAttnProcessor(**chosen)
    weights = {
        name: weight.reshape((factor, factor)) if name.endswith(".pool_weight") else weight
        for name, weight in rename_weights(file, _rename).items()
    }
    required = frozenset(name for name in parameter_names(model) if re.fullmatch(_PROJECTION, name))
    remarks = [f"{key}={value}, from the name of the {source}" for key, value in named.items() if key not in options]
    return Plan(dict.fromkeys(self_attention_layers(model), processor), weights, required, tuple(remarks))


def _rename(key: str) -> str | None:
    pooling = re.fullmatch(_POOLING, key)
    return learned_key(pooling[1], "pool_weight") if pooling else None


def _options_from_name(path: Path) -> tuple[dict[str, int], str]:
    """Return the options in the name of the file, or else of its folder, and "file" or "folder"."""
    for name, kind in ((path.name, "file"), (path.parent.name, "folder")):
        match = _FILE_NAME.search(name)
        if match:
            return {"radius": int(match[1]), "down_factor": int(match[2] or 1)}, kind
    return {}, "file"


def _pooling_factor(file: WeightsFile) -> int:
    """Return the side f of the pooling tiles: spatial weights have shape (1, 1, 1, f, 1, f, 1); 1 without them.

    Raises: ValueError: another shape, or different shapes.
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
