"""Table of the installed processors, and the fraction of the logits that they compute."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from ..layout import TokenLayout
from ..mechanisms.backend import resolve
from .installation import denoisers, installation_of, installed_layers
from .intercept import MechanismLayer

__all__ = ["describe", "logit_fraction"]


def describe(pipe_or_model: Any) -> str:
    """Return a table of the installed processors: layers, mechanism, backend, layout of the last forward, notes.

    A note names each option that was capped to the grid, and the reason why a layer is dense or cannot run.

    Raises: TypeError: neither a pipeline nor a model; ValueError: a pipeline without a denoiser.
    """
    rows: list[tuple[str, ...]] = [("layers", "mechanism", "backend", "tokens", "note")]
    for component, model in denoisers(pipe_or_model).items():
        layers = installed_layers(model)
        groups: dict[tuple[str, ...], list[str]] = {}
        for name, layer in layers.items():
            layout = layer.slot.last
            tokens = "not run yet" if layout is None else str(layout)
            backend, failure = _backend(model, name, layer)
            notes = "; ".join(filter(None, (failure, _note(layer))))
            groups.setdefault((str(layer.mechanism), backend, tokens, notes), []).append(name)
        rows += [(f"{component}: {_ranges(names)}", *cells) for cells, names in groups.items()]
        installation = installation_of(model)
        rest = "all" if installation is None else f"{installation.attention_layers - len(layers)} self-attention"
        if rest != "0 self-attention":
            rows.append((f"{component}: {rest} layers", "dense", "", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(slot.ljust(width) for slot, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _backend(model: nn.Module, name: str, layer: MechanismLayer) -> tuple[str, str]:
    """Return the backend that a layer will run with, and an empty text; or ``"none"`` and the reason for a failure."""
    attn = model.get_submodule(name)
    device = next((p.device for p in attn.parameters()), torch.device("cpu"))
    for module in (attn, model):  # if offloaded, the execution device is in accelerate's hook
        execution = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if execution is not None:
            device = torch.device(execution)
            break
    processor, layout = layer.mechanism, layer.slot.last
    if layout is not None and _stays_dense(layer, layout):
        return "", ""
    try:
        return resolve(processor.backend, device, type(processor)), ""
    except (ValueError, RuntimeError) as error:
        return "none", f"cannot run: {error}"


def _note(layer: MechanismLayer) -> str:
    """Return how a layer differs from its options: dense, or options capped to its grid."""
    processor, layout = layer.mechanism, layer.slot.last
    notes = [f"first {processor.dense_steps} steps dense"] if processor.dense_steps else []
    if layout is None:
        return "; ".join(notes)
    if _stays_dense(layer, layout):
        return f"dense: {layout.grid_len} tokens < min_tokens={processor.min_tokens}"
    options = processor.layer_options(layout)
    fitted = processor.for_layout(layout).options()
    for key, value in fitted.items():
        if _repeat_like(options[key], value) != value:
            notes.append(f"{key} {options[key]} → {value} (grid {'×'.join(map(str, layout.grid))})")
    return "; ".join(notes)


def _repeat_like(value: Any, like: Any) -> Any:
    """Repeat a single value to the length of ``like`` if that is a tuple."""
    return (value,) * len(like) if isinstance(like, tuple) and not isinstance(value, tuple) else value


def _stays_dense(layer: MechanismLayer, layout: TokenLayout) -> bool:
    return layer.mechanism.min_tokens > 0 and layout.grid_len < layer.mechanism.min_tokens


def _ranges(names: list[str]) -> str:
    """Format names that differ only in one number as ``blocks.{0-3,5}.attn1``."""
    patterns: dict[str, list[int]] = {}
    for name in names:
        numbers = re.findall(r"\d+", name)
        pattern = re.sub(r"\d+", "{}", name, count=1) if len(numbers) == 1 else name
        patterns.setdefault(pattern, []).extend([int(numbers[0])] if len(numbers) == 1 else [])
    return ", ".join(
        pattern.replace("{}", _intervals(numbers)) if numbers else pattern for pattern, numbers in patterns.items()
    )


def _intervals(numbers: list[int]) -> str:
    """Format numbers as ``5`` or ``{0-3,5}``."""
    intervals: list[list[int]] = []
    for n in sorted(numbers):
        if intervals and n == intervals[-1][1] + 1:
            intervals[-1][1] = n
        else:
            intervals.append([n, n])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in intervals)
    return text if text.isdigit() else f"{{{text}}}"


def logit_fraction(pipe_or_model: Any) -> float:
    """Return the logits kept by the exact masks of the last forward, divided by those of dense attention.

    Sums are over all self-attention layers; a dense layer counts with all its logits. 1.0 if nothing is installed. For
    a layer without a processor, the number of logits is the mean over the layers with one in the same model.

    Raises: ValueError: a mechanism is installed and the model has not run yet.
    """
    computed = dense = 0.0
    for model in denoisers(pipe_or_model).values():
        model_computed, model_dense = _logits(model)
        computed, dense = computed + model_computed, dense + model_dense
    return computed / dense if dense else 1.0


def _logits(model: nn.Module) -> tuple[float, float]:
    """Return the logits that a model computes, and those of dense attention."""
    layers = installed_layers(model)
    executed = [layer for layer in layers.values() if layer.slot.last is not None]
    if layers and not executed:
        raise ValueError("the logit fraction depends on the token layout of a forward pass: run the pipeline once")
    computed = dense = 0.0
    for layer in executed:
        layout = layer.slot.last
        assert layout is not None
        logits = float(layout.seq_len) ** 2
        dense += logits
        if _stays_dense(layer, layout):
            computed += logits
            continue
        computed += layer.mechanism.layer_logits(layout)
    installation = installation_of(model)
    not_installed = installation.attention_layers - len(layers) if installation else 0
    rest = not_installed * (dense / len(executed)) if executed else 0.0
    return computed + rest, dense + rest
