"""Plans from files of :func:`dit_accel.save_attention`: what is to be installed and loaded into each denoiser."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .install import installation_of
from .plan_checks import check_host
from .processor import PROCESSORS, AcceleratedAttnProcessor
from .published import Plan
from .save import DOWN, FORMAT, UP
from .weights import Weight, WeightsFile

__all__ = ["own_plans"]


def own_plans(
    models: dict[str, nn.Module], bare: bool, file: WeightsFile, component: str | None, options: Mapping[str, Any]
) -> dict[str, Plan]:
    """By the models' names; those of the file may differ for a bare model."""
    configuration = _configuration(file)
    if options:
        raise ValueError(
            f"{file.path} carries its options, and takes none, got {', '.join(options)}: load it, or set another "
            "processor with set_attn_processor"
        )
    plans = {}
    for own, (name, entry) in _match(models, bare, configuration, component, file.path).items():
        processors = {layer: _from_json(group, file.path) for group in entry["attention"] for layer in group["layers"]}
        prefix = f"{name}."
        weights = {key.removeprefix(prefix): x for key, x in file.weights.items() if key.startswith(prefix)}
        plans[own] = Plan(processors, _merged(models[own], weights, file.path))
    return plans


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


def _configuration(file: WeightsFile) -> dict[str, Any]:
    try:
        configuration = json.loads(file.metadata["dit_accel"])
        known = configuration["format"] == FORMAT and isinstance(configuration["components"], dict)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{file.path} has a configuration in its metadata that cannot be read: {error}") from error
    if not known:
        raise ValueError(
            f"{file.path} has format {configuration['format']!r}; this version reads {FORMAT}: update dit_accel"
        )
    return configuration


def _from_json(entry: dict[str, Any], path: Path) -> AcceleratedAttnProcessor:
    name = entry.get("mechanism")
    if name not in PROCESSORS:
        raise ValueError(
            f"{path} holds the mechanism {name!r}, which is not known here; known: {', '.join(PROCESSORS)}"
        )
    return PROCESSORS[name](**entry["options"])


def _match(
    models: dict[str, nn.Module], bare: bool, configuration: dict[str, Any], component: str | None, path: Path
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Component name and entry in the file, by the name of the model that they are for."""
    components = configuration["components"]
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
