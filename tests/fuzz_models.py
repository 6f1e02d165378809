"""New models of a family, fast, and files of learned attention for them: for fuzz_world.py."""

from __future__ import annotations

import functools
import io
import pickle
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fuzz_families import FAMILIES, PROCESSORS, UNKNOWN, Installed, layout_argument, native_layers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import dit_accel
from dit_accel.install.installation import installed_layers


@dataclass
class SavedFile:
    """What a file of save_attention should hold."""

    path: Path
    spec: dict[str, Installed]
    host: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by the weight's name


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fuzz")


def component_of(model: nn.Module) -> str:
    return "unet" if "UNet" in type(model).__name__ else "transformer"


@functools.cache
def prepared(family: str) -> dict[str, SavedFile]:
    """Three files: sparse attention alone; SLA with host weights; SLA with a LoRA's factors."""
    model = FAMILIES[family](1).double()
    layers = native_layers(model)
    files = {}
    for name, processor in (("sparse", "gna3"), ("host", "sla_all"), ("lora", "sla_all")):
        dit_accel.reset_attn_processor(model)
        chosen = layers if name == "sparse" else layers[::2]
        layout = layout_argument(family, "native" if family in UNKNOWN else None)
        dit_accel.set_attn_processor(model, PROCESSORS[processor], layers=chosen, layout=layout)
        spec = {layer: Installed(processor, "native" if family in UNKNOWN else None) for layer in chosen}
        for number, layer in enumerate(chosen if processor == "sla_all" else []):
            spec[layer].bias = draw(number, installed_layers(model)[layer].bias.shape)
            with torch.no_grad():
                installed_layers(model)[layer].bias.copy_(spec[layer].bias)
        file = SavedFile(dit_accel.save_attention(model, f"{folder().name}/{family}/{name}"), spec)
        more: dict[str, Tensor] = {}
        for number, layer in enumerate(chosen):
            shape = model.get_parameter(f"{layer}.to_q.weight").shape
            if name == "host":
                file.host[f"{layer}.to_q.weight"] = more[f"{layer}.to_q.weight"] = draw(20 + number, shape)
            if name == "lora":
                down, up = draw(40 + number, (3, shape[1])), draw(60 + number, (shape[0], 3))
                file.factors[f"{layer}.to_k.weight"] = down, up
                more |= {f"{layer}.to_k.lora_A": down, f"{layer}.to_k.lora_B": up}
        _add_to_file(file.path, {f"{component_of(model)}.{key}": value for key, value in more.items()})
        files[name] = file
    return files


def draw(seed: int, shape: Any) -> Tensor:
    """Numbers that float32 holds exactly, in float64."""
    return (torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) * 0.2).double()


def _add_to_file(path: Path, more: dict[str, Tensor]) -> None:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    save_file({**tensors, **more}, path, metadata=metadata)


class Template:
    """Makes new models of a family with the same weights; six times as fast as ``copy.deepcopy``."""

    def __init__(self, family: str) -> None:
        tensors: list[Tensor] = []

        class Pickler(pickle.Pickler):
            def persistent_id(self, value: Any) -> int | None:
                if not isinstance(value, Tensor):
                    return None
                tensors.append(value)
                return len(tensors) - 1

        buffer = io.BytesIO()
        Pickler(buffer).dump(FAMILIES[family](0).double())
        self.data, self.tensors = buffer.getvalue(), tensors

    def __call__(self) -> nn.Module:
        tensors = self.tensors

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, number: int) -> Tensor:
                value = tensors[number].detach().clone()
                return nn.Parameter(value) if isinstance(tensors[number], nn.Parameter) else value

        return Unpickler(io.BytesIO(self.data)).load()


template_of = functools.cache(Template)
