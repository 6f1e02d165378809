"""Load plans for files of :func:`dit_accel.save_attention`: processors and weights for each denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..common.attention_group import ReadLayout
from ..install.installation import installation_of
from ..layout import TokenLayout
from .configuration import FUNCTION, SavedComponent, read_configuration
from .published import Plan
from .save import DOWN, UP
from .tensors import Weight, WeightsFile, shorten

__all__ = ["saved_plans"]


def saved_plans(
    models: dict[str, nn.Module],
    bare: bool,
    file: WeightsFile,
    component: str | None,
    layout: TokenLayout | ReadLayout | None,
    options: Mapping[str, Any],
) -> dict[str, Plan]:
    """Return the plans by the names of the models.

    Args:
        models: denoisers by name.
        bare: a model was passed instead of a pipeline, so that its name may differ from the component's in the file.
        file: contents of the file.
        component: component of the file to load; None for all.
        layout: user-defined layout that replaces those of the file.
        options: options of :func:`dit_accel.load_attention`; must be empty.

    Raises: ValueError: an invalid configuration, weights of no component, options, a layout that must be passed again.
    """
    components = read_configuration(file.metadata["dit_accel"], file.path)
    if options:
        raise ValueError(
            f"{file.path} has its own options; expected no others, got {', '.join(options)}: load it without, or set "
            "another processor with set_attn_processor"
        )
    stray = [key for key in file.weights if key.partition(".")[0] not in components]
    if stray:
        raise ValueError(
            f"{file.path} has weights that belong to none of its components {', '.join(components)}: {shorten(stray)}"
        )
    plans = {}
    for own, (name, saved) in _match_components(models, bare, components, component, file.path).items():
        processors = {layer: group.processor for group in saved.groups for layer in group.layers}
        prefix = f"{name}."
        weights = {key.removeprefix(prefix): x for key, x in file.weights.items() if key.startswith(prefix)}
        layouts = _layouts(saved, file.path) if layout is None else {}
        plans[own] = Plan(processors, _merge_lora(models[own], weights, file.path), layouts=layouts)
    return plans


def _layouts(saved: SavedComponent, path: Path) -> dict[str, TokenLayout | ReadLayout]:
    """Return the user-defined layouts by layer.

    Raises: ValueError: the layout was a function, which cannot be saved.
    """
    layouts: dict[str, TokenLayout | ReadLayout] = {}
    for group in saved.groups:
        if group.layout == FUNCTION:
            raise ValueError(
                f"{path} was saved with a token layout that is a function, and functions are not saved: pass it again, "
                "load_attention(..., layout=function)"
            )
        if isinstance(group.layout, TokenLayout):
            layouts |= dict.fromkeys(group.layers, group.layout)
    return layouts


def _merge_lora(model: nn.Module, weights: dict[str, Weight], path: Path) -> dict[str, Weight]:
    """Replace the two factors of each LoRA by the merged weight, based on the file's weight or else the pretrained one.

    Raises: ValueError: one factor without the other, or factors with shapes that do not match.
    """
    factors = (f".{DOWN}", f".{UP}")
    names = dict.fromkeys(key.rpartition(".")[0] for key in weights if key.endswith(factors))
    rest = {key: x for key, x in weights.items() if not key.endswith(factors)}
    for name in names:
        down, up = weights.get(f"{name}.{DOWN}"), weights.get(f"{name}.{UP}")
        if down is None or up is None or not _is_low_rank(down, up):
            shapes = " and ".join("none" if factor is None else str(factor.shape) for factor in (down, up))
            raise ValueError(
                f"{path}: the LoRA of {name} has factors {shapes}; expected {DOWN} (r, in) and {UP} (out, r), both of "
                "a floating-point dtype"
            )
        key, shape = f"{name}.weight", (up.shape[0], down.shape[1])
        own = rest.get(key)
        if own is not None and (own.shape != shape or not own.dtype.is_floating_point):
            raise ValueError(f"{path}: {key} is {own.dtype} {own.shape}, but its LoRA has shape {shape}")
        rest[key] = Weight(shape, up.dtype, partial(_add_low_rank, model, key, own, down, up))
    return rest


def _is_low_rank(down: Weight, up: Weight) -> bool:
    matching = len(up.shape) == len(down.shape) == 2 and up.shape[1] == down.shape[0]
    return matching and up.dtype.is_floating_point and down.dtype.is_floating_point


def _add_low_rank(model: nn.Module, key: str, own: Weight | None, down: Weight, up: Weight) -> Tensor:
    """Return the base weight plus up @ down in float32.

    The base is the file's weight ``own``; if None, the pretrained weight, even if an earlier load overwrote it.
    """
    if own is not None:
        base = own.read()
    else:
        installation = installation_of(model)
        kept = installation.overwritten if installation is not None else {}
        base = kept[key] if key in kept else model.get_parameter(key).detach().cpu()
    return base.float() + up.read().float() @ down.read().float()


def _match_components(
    models: dict[str, nn.Module], bare: bool, components: dict[str, SavedComponent], component: str | None, path: Path
) -> dict[str, tuple[str, SavedComponent]]:
    """Return component name and entry of the file by the name of the model.

    Raises: ValueError: no such component in the file, no such model in the pipeline, or an ambiguous choice.
    """
    available = list(components)
    if component is not None and component not in available:
        raise ValueError(f"{path} has no component {component!r}; it has {', '.join(available)}")
    if bare:
        own = next(iter(models))
        name = component or (own if own in available else available[0] if len(available) == 1 else own)
        if name not in available:
            raise ValueError(f"{path} has components {', '.join(available)}: choose one with component=")
        return {own: (name, components[name])}
    wanted = [component] if component is not None else available
    missing = [name for name in wanted if name not in models]
    if missing:
        raise ValueError(f"{path} is for {', '.join(missing)}, but this pipeline has only {', '.join(models)}")
    return {name: (name, components[name]) for name in wanted}
