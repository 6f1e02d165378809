"""Plans from files of :func:`dit_accel.save_attention`: what is to be installed and loaded into each denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .attention_group import ReadLayout
from .configuration import FUNCTION, SavedComponent, read_configuration
from .install import installation_of
from .layout import TokenLayout
from .plan_checks import check_host
from .published import Plan
from .save import DOWN, UP
from .weights import Weight, WeightsFile, shorten

__all__ = ["own_plans"]


def own_plans(
    models: dict[str, nn.Module],
    bare: bool,
    file: WeightsFile,
    component: str | None,
    layout: TokenLayout | ReadLayout | None,
    options: Mapping[str, Any],
) -> dict[str, Plan]:
    """The plans by the models' names; those of the file may differ for a bare model. layout: instead of the file's.

    Raises: ValueError: a configuration that cannot be read, weights of no component, a layout that is needed.
    """
    components = read_configuration(file.metadata["dit_accel"], file.path)
    if options:
        raise ValueError(
            f"{file.path} carries its options, and takes none, got {', '.join(options)}: load it, or set another "
            "processor with set_attn_processor"
        )
    stray = [key for key in file.weights if key.partition(".")[0] not in components]
    if stray:
        raise ValueError(
            f"{file.path} has weights of none of its components ({', '.join(components)}): {shorten(stray)}"
        )
    plans = {}
    for own, (name, saved) in _match(models, bare, components, component, file.path).items():
        processors = {layer: group.processor for group in saved.groups for layer in group.layers}
        prefix = f"{name}."
        weights = {key.removeprefix(prefix): x for key, x in file.weights.items() if key.startswith(prefix)}
        layouts = _layouts(saved, file.path) if layout is None else {}
        plans[own] = Plan(processors, _merged(models[own], weights, file.path), layouts=layouts)
    return plans


def _layouts(saved: SavedComponent, path: Path) -> dict[str, TokenLayout | ReadLayout]:
    """The layouts that were given by hand, by layer.

    Raises: ValueError: a function was given, which no file can hold.
    """
    layouts: dict[str, TokenLayout | ReadLayout] = {}
    for group in saved.groups:
        if group.layout == FUNCTION:
            raise ValueError(
                f"{path} was saved with a token layout that is a function, which no file can hold: pass it again, "
                "load_attention(..., layout=function)"
            )
        if isinstance(group.layout, TokenLayout):
            layouts |= dict.fromkeys(group.layers, group.layout)
    return layouts


def _merged(model: nn.Module, weights: dict[str, Weight], path: Path) -> dict[str, Weight]:
    """Replace the two factors of each LoRA by the weight that they make of the pretrained one, or of the file's own.

    Raises: ValueError: one factor without the other, factors that do not go together, or a projection that is fused or
        has an adapter around it.
    """
    factors = (f".{DOWN}", f".{UP}")
    names = dict.fromkeys(key.rpartition(".")[0] for key in weights if key.endswith(factors))
    if names:
        check_host(model, path)
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
            raise ValueError(f"{path}: {key} is {own.dtype} {own.shape}, and its LoRA makes a {shape}")
        rest[key] = Weight(shape, up.dtype, partial(_add_low_rank, model, key, own, down, up))
    return rest


def _is_low_rank(down: Weight, up: Weight) -> bool:
    fit = len(up.shape) == len(down.shape) == 2 and up.shape[1] == down.shape[0]
    return fit and up.dtype.is_floating_point and down.dtype.is_floating_point


def _add_low_rank(model: nn.Module, key: str, own: Weight | None, down: Weight, up: Weight) -> Tensor:
    """Return up @ down, added to the file's own weight if it has one; else to the pretrained one, whatever an earlier
    load has written over it. float32."""
    if own is not None:
        base = own.read()
    else:
        installation = installation_of(model)
        kept = installation.overwritten if installation is not None else {}
        base = kept[key] if key in kept else model.get_parameter(key).detach().cpu()
    return base.float() + up.read().float() @ down.read().float()


def _match(
    models: dict[str, nn.Module], bare: bool, components: dict[str, SavedComponent], component: str | None, path: Path
) -> dict[str, tuple[str, SavedComponent]]:
    """Component name and entry in the file, by the name of the model that they are for."""
    there = list(components)
    if component is not None and component not in there:
        raise ValueError(f"{path} has no component {component!r}; it has {', '.join(there)}")
    if bare:
        own = next(iter(models))
        name = component or (own if own in there else there[0] if len(there) == 1 else own)
        if name not in there:
            raise ValueError(f"{path} has components {', '.join(there)}: say which one is meant with component=")
        return {own: (name, components[name])}
    wanted = [component] if component is not None else there
    lacking = [name for name in wanted if name not in models]
    if lacking:
        raise ValueError(f"{path} is for {', '.join(lacking)}, which this pipeline lacks (it has {', '.join(models)})")
    return {name: (name, components[name]) for name in wanted}
