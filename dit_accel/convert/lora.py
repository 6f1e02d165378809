"""LoRA on the projections of attention modules, through peft and diffusers. [arXiv 2106.09685]"""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["LORA_FILE", "add_lora", "load_lora", "require_peft", "save_lora"]

LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it


def require_peft() -> None:
    """Raises: ValueError: peft is not installed."""
    if find_spec("peft") is None:
        raise ValueError("LoRA needs peft: pip install 'dit-accel[train]'")


def add_lora(model: Any, layers: list[str], rank: int, seed: int) -> list[str]:
    """Put a LoRA of this rank around every linear layer of the attention modules. What it adds is 0 at first.

    Returns: names of the parameters that it has.
    """
    from peft import LoraConfig

    targets = [
        f"{layer}.{name}"
        for layer in layers
        for name, part in model.get_submodule(layer).named_modules()
        if isinstance(part, nn.Linear) and not name.startswith("dit_accel.")
    ]
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the same in every process, and when a run goes on
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    return [name for name, _ in model.named_parameters() if ".lora_" in name]


def save_lora(model: Any, folder: Path) -> Path:
    """Write the adapter as diffusers does, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        model.save_lora_adapter(temporary, weight_name=LORA_FILE)
        os.replace(Path(temporary) / LORA_FILE, folder / LORA_FILE)
    return folder / LORA_FILE


def load_lora(model: Any, folder: Path) -> None:
    """Load the adapter that :func:`save_lora` wrote, if there is one."""
    if (folder / LORA_FILE).is_file():
        model.load_lora_adapter(folder, prefix=None, weight_name=LORA_FILE)
