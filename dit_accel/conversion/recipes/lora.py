"""LoRA on the projections of attention modules, through peft and diffusers. [arXiv 2106.09685]"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from dit_accel.weights.save import ADAPTER

__all__ = ["add_lora", "require_peft"]


def require_peft() -> None:
    """Check that peft is installed. Raises: ValueError: it is not."""
    if find_spec("peft") is None:
        raise ValueError("LoRA needs peft: pip install 'dit-accel[train]'")


def add_lora(model: Any, layers: list[str], where: str, rank: int, seed: int) -> list[str]:
    """Add a LoRA of this rank to every linear layer of the attention modules, or of their transformer blocks.

    The LoRA's initial update is 0.

    Args: where: "attention" or "blocks".
    Returns: names of the LoRA's parameters.
    """
    from peft import LoraConfig

    modules = layers if where == "attention" else sorted({_block_of(model, layer) for layer in layers})
    targets = [
        f"{path}.{name}"
        for path in modules
        for name, module in model.get_submodule(path).named_modules()
        if isinstance(module, nn.Linear) and ".dit_accel." not in f".{name}"
    ]
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the same in every process and after a resume
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), adapter_name=ADAPTER)
    return [name for name, _ in model.named_parameters() if ".lora_" in name]


def _block_of(model: nn.Module, layer: str) -> str:
    """Name of the innermost ModuleList member that contains an attention module; else the module's own name."""
    path = layer.split(".")
    for i in range(len(path) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(path[: i - 1])), nn.ModuleList):
            return ".".join(path[:i])
    return layer
