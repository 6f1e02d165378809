"""The text form of processors on the command line: ``gna:window=16x16,stride=8;window=40x40@blocks.1``."""

from __future__ import annotations

import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from .processor import PROCESSORS, AcceleratedAttnProcessor

__all__ = ["AttentionSpec", "ByLayer", "grid_defaults", "parse_attention", "parse_student", "short_options"]

ByLayer = tuple[tuple[str | None, AcceleratedAttnProcessor], ...]  # None: on all layers


@dataclass(frozen=True)
class AttentionSpec:
    """A mechanism by name and the options that the user gave for it. exceptions: which options are others on which
    layers, named as :func:`dit_accel.set_attn_processor` takes them."""

    name: str
    options: Mapping[str, Any]
    exceptions: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    @property
    def needs_grid(self) -> bool:
        """True if an option without a default was left out: it is then chosen from the pipeline's token grid."""
        return any(
            field.default is MISSING and field.name not in self.options for field in fields(PROCESSORS[self.name])
        )

    def processor(self, grid: Sequence[int] | None = None) -> AcceleratedAttnProcessor:
        """The processor, with what was left out chosen from the grid.

        Raises: ValueError, TypeError: an option out of range, or one that is needed and no grid to choose it from.
        """
        options = dict(self.options)
        if not options and grid is not None:
            options = grid_defaults(self.name, grid)
        elif self.needs_grid:
            if grid is None:
                name = next(iter(grid_defaults(self.name, (1, 1))))
                raise ValueError(
                    f"{self.name} needs {name} for this pipeline, whose token grid is not known beforehand: "
                    f"give it as {self.name}:{name}=…"
                )
            options = {**grid_defaults(self.name, grid), **options}
        return PROCESSORS[self.name](**options)

    def by_layer(self, usual: AcceleratedAttnProcessor) -> ByLayer:
        """What is set on which layers, the later over the earlier. usual: :meth:`processor`, on all of them.

        Raises: ValueError, TypeError: an option out of range.
        """
        return (None, usual), *((layers, replace(usual, **options)) for layers, options in self.exceptions)


def parse_attention(text: str) -> AttentionSpec:
    """Read ``NAME`` or ``NAME:key=value,key=value`` (tuples as ``16x16``, None as ``none``); behind it, each after a
    semicolon, ``key=value,key=value@LAYERS``: options that differ on layers in whose name the expression is found.

    Raises: ValueError: an unknown name or option (with the nearest right one), or a value that does not fit.
    """
    usual, *others = text.strip().split(";")
    name, _, rest = usual.strip().partition(":")
    name = name.strip().lower()
    if name not in PROCESSORS:
        raise ValueError(f"unknown attention {name!r}{_nearest(name, PROCESSORS)}")
    options = _read_options(name, rest)
    spec = AttentionSpec(name, options, tuple(_exception(name, other) for other in others))
    tuples = (value for part in (options, *(x for _, x in spec.exceptions)) for value in part.values())
    axes = max((len(value) for value in tuples if isinstance(value, tuple)), default=2)
    try:
        spec.by_layer(spec.processor((4096,) * min(axes, 3)))  # a stand-in for the real grid
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from None
    return spec


def _exception(name: str, text: str) -> tuple[str, dict[str, Any]]:
    options, at, layers = (piece.strip() for piece in text.partition("@"))
    if not at or not layers or not options:
        raise ValueError(f"{name}: {text.strip()!r} does not say which options on which layers; write key=VALUE@LAYERS")
    try:
        re.compile(layers)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name}: {layers!r} is no regular expression of layers' names: {error}") from None
    return layers, _read_options(name, options)


def _read_options(name: str, text: str) -> dict[str, Any]:
    hints = typing.get_type_hints(PROCESSORS[name])
    known = {field.name: hints[field.name] for field in fields(PROCESSORS[name])}
    options: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}{_nearest(key, known)}")
        if not equals or not value:
            raise ValueError(f"{name}: option {key} has no value; write {key}=VALUE")
        if key in options:
            raise ValueError(f"{name}: option {key} is given twice")
        options[key] = _read(name, key, value, known[key])
    return options


def parse_student(text: str) -> AttentionSpec | str:
    """As :func:`parse_attention`; or the folder, file or hub id of attention that was trained, as it is.

    Raises: ValueError: neither.
    """
    text = text.strip()
    name = text.partition(":")[0].strip().lower()
    if name not in PROCESSORS and (os.path.exists(text) or "/" in text):
        return text
    return parse_attention(text)


def grid_defaults(name: str, grid: Sequence[int], share: float = 0.1) -> dict[str, Any]:
    """What a bare name takes on a grid: about a tenth of the logits. LLSA's own defaults are near that on 64×64.

    SLA: a tenth of the blocks, as compact tiles rather than runs of the raster, which catches more untrained.

    CLEAR: the radius, one per axis where the sides differ, of an ellipse or ellipsoid that covers a tenth of the grid.
    GNA: a window of a tenth of the grid, in the grid's proportions, and a stride of a fifth of the window; on 256×256
    these are the paper's for Flux (80 and 16).

    Args:
        share: another than a tenth; LLSA, whose number of keys hardly grows with the grid, stays as it is.
    """
    side = share ** (1 / len(grid))
    if name == "clear":
        ball = {1: 2.0, 2: math.pi, 3: 4 / 3 * math.pi}[len(grid)]
        radii = tuple(max(1.5, round(n * side / ball ** (1 / len(grid)), 1)) for n in grid)
        return {"radius": radii[0] if len(set(radii)) == 1 else radii}
    if name == "gna":
        window = tuple(max(1, round(n * side)) for n in grid)
        return {"window": window, "stride": tuple(max(1, n // 5) for n in window)}
    return {"critical": share, "tile_order": True} if name == "sla" else {}


def short_options(processor: AcceleratedAttnProcessor) -> str:
    """The two options that matter most, and every other that is not at its default, as the command line takes them."""
    own = processor.options()
    leading = list(own)[:2]
    changed = [field.name for field in fields(processor) if getattr(processor, field.name) != field.default]
    names = leading + [name for name in changed if name not in leading]
    return ",".join(f"{name}={_write(getattr(processor, name))}" for name in names)


def _write(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(_write(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    close = close or [name for name in known if word and name.startswith(word.lower())][:1]
    return (f"; did you mean {close[0]!r}?" if close else ";") + f" There are: {', '.join(known)}"


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _read(name: str, key: str, text: str, hint: Any) -> Any:
    members = _members(hint)
    if type(None) in members and text.lower() == "none":
        return None
    for member in members:
        if typing.get_origin(member) is Sequence:
            pieces = text.lower().split("x")
            item = typing.get_args(member)[0]
            values = [_scalar(piece, item) for piece in pieces]
            if len(values) > 1 and None not in values:
                return tuple(values)
        elif member is not type(None) and (value := _scalar(text, member)) is not None:
            return value
    raise ValueError(f"{name}: {key} takes {_wanted(members)}, got {text!r}")


def _scalar(text: str, kind: type) -> Any:
    """The text as this kind of value; None where it is not one."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower())
    try:
        return kind(text)
    except ValueError:
        return None


def _wanted(members: Sequence[Any]) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "none"}
    named = [words[member] for member in members if member in words]
    for member in members:
        if typing.get_origin(member) is Sequence:
            example = {bool: "truexfalse", float: "4x8.5"}.get(typing.get_args(member)[0], "16x16")
            named.append(f"one per axis such as {example}")
    return " or ".join(named)
