"""Save what was learned in the installed attention layers, for :mod:`dit_accel.load`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from .files import replacing
from .install import denoisers, installation_of, installed_layers
from .processor import AcceleratedAttnProcessor
from .weights import FILE_NAME

__all__ = ["ADAPTER", "DOWN", "FILE_NAME", "FORMAT", "UP", "save_attention"]

FORMAT = 1
ADAPTER = "conversion"  # peft's name for a LoRA that belongs to the attention; others are the user's own
DOWN, UP = "lora_A", "lora_B"  # (r, in) and (out, r): up @ down is added to a linear layer's weight


def save_attention(pipe_or_model: Any, folder: str | os.PathLike[str]) -> Path:
    """Write ``dit_accel.safetensors``: learned parameters, with the configuration as JSON in the file's metadata.

    The file is written whole or not at all. Included are host weights that :func:`dit_accel.load_attention` had
    overwritten or ``dit-accel convert`` has trained, and the LoRA that it has trained, as its two factors.

    Args:
        pipe_or_model: pipeline or denoiser with an installed mechanism.
        folder: made if it is not there.

    Returns: path of the file.
    Raises: ValueError: nothing is installed; OSError: the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    components: dict[str, Any] = {}
    for component, model in denoisers(pipe_or_model).items():
        layers = installed_layers(model)
        if not layers:
            continue
        groups: dict[AcceleratedAttnProcessor, list[str]] = {}
        for name, layer in layers.items():
            saved = replace(layer.mechanism, backend=None)  # a property of this machine, not of what was learned
            groups.setdefault(saved, []).append(name)
            for key, value in layer.named_parameters():
                tensors[f"{component}.{name}.dit_accel.{key}"] = value.detach().cpu().contiguous()
        installation = installation_of(model)
        for key in installation.overwritten if installation else ():
            tensors[f"{component}.{key}"] = model.get_parameter(key).detach().cpu().contiguous()
        tensors |= {f"{component}.{key}": value for key, value in _low_rank(model).items()}
        components[component] = {
            "class": type(model).__name__,
            "attention": [{**_to_json(processor), "layers": names} for processor, names in groups.items()],
        }
    if not components:
        raise ValueError("nothing to save: call dit_accel.set_attn_processor(...) first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    configuration = json.dumps({"format": FORMAT, "components": components})
    target = folder / FILE_NAME
    with replacing(target) as temporary:
        save_file(tensors, temporary, metadata={"dit_accel": configuration})
    return target


def _low_rank(model: nn.Module) -> dict[str, Tensor]:
    """The conversion's LoRA, by the name of the linear layer."""
    found = {}
    for name, module in model.named_modules():
        down = getattr(getattr(module, DOWN, None), "_modules", {}).get(ADAPTER)
        if down is not None:
            up: Any = module
            found[f"{name}.{DOWN}"] = down.weight.detach().cpu().contiguous()
            found[f"{name}.{UP}"] = (up.lora_B[ADAPTER].weight * up.scaling[ADAPTER]).detach().cpu().contiguous()
    return found


def _to_json(processor: AcceleratedAttnProcessor) -> dict[str, Any]:
    options = {name: value for name, value in asdict(processor).items() if name != "backend"}
    return {"mechanism": processor.name, "options": options}
