"""Load plan for one denoiser, and helpers that the releases share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from dit_accel.common.attention_group import ReadLayout
from dit_accel.layout import TokenLayout
from dit_accel.mechanisms.processor import AcceleratedAttnProcessor

from ..tensors import Weight, WeightsFile

__all__ = ["Plan", "check_option_names", "learned_key", "parameter_names", "rename_weights"]


@dataclass(frozen=True)
class Plan:
    """Processors to install and weights to load.

    Args:
        processors: processor by name of the attention module.
        weights: weight by the model's parameter name; learned parameters are named by :func:`learned_key`.
        required: the model's own parameters that ``weights`` must contain; learned ones are always required.
        remarks: notes for the user on the source of options that were not passed.
        layouts: user-defined layout by name of the attention module; other modules use the model family's layout.
    """

    processors: Mapping[str, AcceleratedAttnProcessor]
    weights: Mapping[str, Weight]
    required: frozenset[str] = frozenset()
    remarks: tuple[str, ...] = ()
    layouts: Mapping[str, TokenLayout | ReadLayout] = field(default_factory=dict)


def learned_key(layer: str, name: str) -> str:
    """Return the model's name of a learned parameter of a layer."""
    return f"{layer}.dit_accel.{name}"


def parameter_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the model's own parameters, without those that dit_accel added."""
    return frozenset(name for name, _ in model.named_parameters() if ".dit_accel." not in name)


def rename_weights(file: WeightsFile, rename: Callable[[str], str | None]) -> dict[str, Weight]:
    """Return the file's weights by the model's names; a key stays as it is if ``rename`` returns None.

    Raises: ValueError: two keys with the same new name.
    """
    found: dict[str, Weight] = {}
    sources: dict[str, str] = {}
    for key, weight in file.weights.items():
        name = rename(key) or key
        if name in found:
            raise ValueError(f"{file.path} has {name} twice, as {sources[name]} and as {key}")
        found[name], sources[name] = weight, key
    return found


def check_option_names(
    kind: type[AcceleratedAttnProcessor], options: Mapping[str, Any], path: Path, further: tuple[str, ...] = ()
) -> None:
    """Check that the processor class has all these options.

    Raises: ValueError: an unknown option.
    """
    known = [field.name for field in fields(kind)] + list(further)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"{path} is for {kind.name}, which has no option {unknown[0]!r}; it has: {', '.join(known)}")
