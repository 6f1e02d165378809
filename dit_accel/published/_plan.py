"""What a release's file does to one denoiser, and what the releases have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from ..attention_group import ReadLayout
from ..layout import TokenLayout
from ..processor import AcceleratedAttnProcessor
from ..weights import Weight, WeightsFile

__all__ = ["Plan", "check_option_names", "learned_key", "parameter_names", "renamed"]


@dataclass(frozen=True)
class Plan:
    """What is to be installed and loaded.

    Args:
        processors: by the name of the attention module.
        weights: by the model's own names; learned parameters as :func:`learned_key` names them.
        required: the host's parameters that must be among the weights; learned ones always must.
        remarks: for people: where options came from that the user did not give.
        layouts: by the name of the attention module, a layout given by hand; the model's own for the others.
    """

    processors: Mapping[str, AcceleratedAttnProcessor]
    weights: Mapping[str, Weight]
    required: frozenset[str] = frozenset()
    remarks: tuple[str, ...] = ()
    layouts: Mapping[str, TokenLayout | ReadLayout] = field(default_factory=dict)


def learned_key(layer: str, name: str) -> str:
    """Name in the model of a layer's learned parameter."""
    return f"{layer}.dit_accel.{name}"


def parameter_names(model: nn.Module) -> frozenset[str]:
    """The host's own parameters, without what dit_accel has put into them."""
    return frozenset(name for name, _ in model.named_parameters() if ".dit_accel." not in name)


def renamed(file: WeightsFile, rename: Callable[[str], str | None]) -> dict[str, Weight]:
    """The file's weights by the model's names; a key that ``rename`` does not know (None) keeps its own.

    Raises: ValueError: two keys that are one weight of the model.
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
    """Raises: ValueError: an option that this processor does not have."""
    known = [field.name for field in fields(kind)] + list(further)
    wrong = [name for name in options if name not in known]
    if wrong:
        raise ValueError(f"{path} is for {kind.name}, which has no option {wrong[0]!r}; it has: {', '.join(known)}")
