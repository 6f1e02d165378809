"""What is installed where, and what share of the logits it computes."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from .backend import resolve
from .install import denoisers, installation_of, installed_layers
from .intercept import MechanismLayer
from .layout import TokenLayout
from .processor import AcceleratedAttnProcessor

__all__ = ["count_logits", "describe", "logit_fraction"]


def describe(pipe_or_model: Any) -> str:
    """A table of what is installed: layers, mechanism, backend, token layout of the last forward, what it capped.

    Raises: TypeError: neither a pipeline nor a model; ValueError: a pipeline without a denoiser.
    """
    rows: list[tuple[str, ...]] = [("layers", "mechanism", "backend", "tokens", "note")]
    for component, model in denoisers(pipe_or_model).items():
        layers = installed_layers(model)
        groups: dict[tuple[str, ...], list[str]] = {}
        for name, layer in layers.items():
            layout = layer.slot.last
            tokens = "not run yet" if layout is None else str(layout)
            backend, trouble = _backend(model, name, layer)
            notes = "; ".join(filter(None, (trouble, _note(layer))))
            groups.setdefault((str(layer.mechanism), backend, tokens, notes), []).append(name)
        rows += [(f"{component}: {_ranges(names)}", *what) for what, names in groups.items()]
        installation = installation_of(model)
        rest = "all" if installation is None else f"{installation.attention_layers - len(layers)} self-attention"
        if rest != "0 self-attention":
            rows.append((f"{component}: {rest} layers", "dense", "", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(slot.ljust(width) for slot, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _backend(model: nn.Module, name: str, layer: MechanismLayer) -> tuple[str, str]:
    """The backend that the layer takes where its model will run; or what was asked for, and why it cannot be had."""
    attn = model.get_submodule(name)
    device = next((p.device for p in attn.parameters()), torch.device("cpu"))
    for module in (attn, model):  # offloaded: accelerate's hook knows where it will run
        execution = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if execution is not None:
            device = torch.device(execution)
            break
    processor, layout = layer.mechanism, layer.slot.last
    if layout is not None and _stays_dense(layer, layout):
        return "", ""
    try:
        return resolve(processor.backend, device, processor.name), ""
    except (ValueError, RuntimeError) as error:
        return "none", f"cannot run: {error}"


def _note(layer: MechanismLayer) -> str:
    """Why a layer differs from what was asked: dense, or capped to its grid."""
    processor, layout = layer.mechanism, layer.slot.last
    notes = [f"first {processor.dense_steps} steps dense"] if processor.dense_steps else []
    if layout is None:
        return "; ".join(notes)
    if _stays_dense(layer, layout):
        return f"dense: {layout.grid_len} tokens < min_tokens={processor.min_tokens}"
    asked = processor.layer_options(layout)
    fitted = processor.mechanism.fit(processor.grid_layout(layout), **asked)
    for key, value in fitted.items():
        if _expanded(asked[key], value) != value:
            notes.append(f"{key} {asked[key]} → {value} (grid {'×'.join(map(str, layout.grid))})")
    return "; ".join(notes)


def _expanded(asked: Any, like: Any) -> Any:
    return (asked,) * len(like) if isinstance(like, tuple) and not isinstance(asked, tuple) else asked


def _stays_dense(layer: MechanismLayer, layout: TokenLayout) -> bool:
    return layer.mechanism.min_tokens > 0 and layout.grid_len < layer.mechanism.min_tokens


def _ranges(names: list[str]) -> str:
    """``blocks.{0-3,5}.attn1`` for names that differ in their numbers alone."""
    shapes: dict[str, list[int]] = {}
    for name in names:
        numbers = re.findall(r"\d+", name)
        shape = re.sub(r"\d+", "{}", name, count=1) if len(numbers) == 1 else name
        shapes.setdefault(shape, []).extend([int(numbers[0])] if len(numbers) == 1 else [])
    return ", ".join(shape.replace("{}", _runs(numbers)) if numbers else shape for shape, numbers in shapes.items())


def _runs(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if text.isdigit() else f"{{{text}}}"


def logit_fraction(pipe_or_model: Any) -> float:
    """Logits that the exact masks of the last forward keep, over those of dense attention, all self-attention layers.

    Layers are weighted by what they cost dense; those left dense count whole. 1.0 where nothing is installed. Layers
    without the mechanism in a model where others have it are taken to be as long as the installed ones on average.

    Raises: ValueError: a mechanism is installed and the model has not run yet.
    """
    computed = dense = 0.0
    for model in denoisers(pipe_or_model).values():
        ours, whole = _logits(model)
        computed, dense = computed + ours, dense + whole
    return computed / dense if dense else 1.0


def count_logits(processor: AcceleratedAttnProcessor, layout: TokenLayout) -> float:
    """Logits that a processor's exact mask keeps in a layer of this layout, its options capped to the grid."""
    grid = processor.grid_layout(layout)
    fitted = processor.mechanism.fit(grid, **processor.layer_options(layout))
    return float(processor.mechanism.count_logits(grid, **fitted))


def _logits(model: nn.Module) -> tuple[float, float]:
    layers = installed_layers(model)
    run = [layer for layer in layers.values() if layer.slot.last is not None]
    if layers and not run:
        raise ValueError("run the pipeline once: the share of the logits depends on the token layout of a forward pass")
    computed = dense = 0.0
    for layer in run:
        layout = layer.slot.last
        assert layout is not None
        whole = float(layout.seq_len) ** 2
        dense += whole
        if _stays_dense(layer, layout):
            computed += whole
            continue
        computed += count_logits(layer.mechanism, layout)
    installation = installation_of(model)
    left = installation.attention_layers - len(layers) if installation else 0
    rest = left * (dense / len(run)) if run else 0.0
    return computed + rest, dense + rest
