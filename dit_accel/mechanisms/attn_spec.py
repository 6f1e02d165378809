"""Command-line format of processors: ``gna:window=16x16,stride=8;window=40x40@blocks.1``."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from ._options import members_of
from .processor import AcceleratedAttnProcessor
from .registry import PROCESSORS, find_processor, untrained_mechanisms

__all__ = [
    "AttentionSpec",
    "ByLayer",
    "attention_help",
    "join_options",
    "parse_attention",
    "parse_student",
    "short_options",
]

ByLayer = tuple[tuple[str | None, AcceleratedAttnProcessor], ...]  # (layers, processor); None: all layers


@dataclass(frozen=True)
class AttentionSpec:
    """Name of a mechanism and the options given for it.

    ``exceptions``: pairs of layers, in the format of :func:`dit_accel.set_attn_processor`, and the options that differ
    there.
    """

    name: str
    options: Mapping[str, Any]
    exceptions: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    @property
    def needs_grid(self) -> bool:
        """True if an option without a default is missing; its value then depends on the pipeline's token grid."""
        return any(
            field.default is MISSING and field.name not in self.options for field in fields(PROCESSORS[self.name])
        )

    def processor(self, grid: Sequence[int] | None = None) -> AcceleratedAttnProcessor:
        """Build the processor; missing options get their defaults for the grid.

        Raises: ValueError, TypeError: an option is out of range, or a required option and the grid are both missing.
        """
        options = dict(self.options)
        if not options and grid is not None:
            options = PROCESSORS[self.name].suggest(grid)
        elif self.needs_grid:
            if grid is None:
                name = next(iter(PROCESSORS[self.name].suggest((1, 1))))
                raise ValueError(
                    f"{self.name} needs {name} for this pipeline, whose token grid is unknown: "
                    f"write {self.name}:{name}=…"
                )
            options = {**PROCESSORS[self.name].suggest(grid), **options}
        return PROCESSORS[self.name](**options)

    def by_layer(self, default: AcceleratedAttnProcessor) -> ByLayer:
        """Processors per layer, in the order to set them: ``default`` on all layers, then the exceptions.

        Args: default: result of :meth:`processor`.
        Raises: ValueError, TypeError: an option is out of range.
        """
        return (None, default), *((layers, replace(default, **options)) for layers, options in self.exceptions)


def parse_attention(text: str) -> AttentionSpec:
    """Parse ``NAME`` or ``NAME:key=value,key=value`` (tuples as ``16x16``, None as ``none``).

    Parts ``;key=value,key=value@LAYERS`` may follow: options that differ on the layers whose name matches the regular
    expression.

    A text that ends with ``.yaml`` or ``.yml`` is a file::

        attention: gna
        options: {window: [16, 16], stride: 8}
        layers:
          'blocks\\.1\\.': {window: [40, 40]}

    Raises: ValueError: an unknown name or option (the message suggests the nearest), or an invalid value.
    """
    if _is_yaml(text):
        return _read_yaml(Path(text.strip()))
    default, *others = text.strip().split(";")
    name, _, rest = default.strip().partition(":")
    name = name.strip().lower()
    _check_name(name)
    options = _parse_options(name, rest)
    return _checked(AttentionSpec(name, options, tuple(_parse_exception(name, other) for other in others)))


def _check_name(name: str) -> None:
    if find_processor(name) is None:
        raise ValueError(f"unknown attention {name!r}{_suggest(name, PROCESSORS)}")


def _checked(spec: AttentionSpec) -> AttentionSpec:
    """The specification. Raises: ValueError: an option is out of range."""
    tuples = (value for part in (spec.options, *(x for _, x in spec.exceptions)) for value in part.values())
    axes = max((len(value) for value in tuples if isinstance(value, tuple)), default=2)
    try:
        spec.by_layer(spec.processor((4096,) * min(axes, 3)))  # the pipeline's grid is unknown here
    except (ValueError, TypeError) as error:
        raise ValueError(f"{spec.name}: {error}") from None
    return spec


def _is_yaml(text: str) -> bool:
    return text.strip().lower().endswith((".yaml", ".yml"))


def _read_yaml(path: Path) -> AttentionSpec:
    """Read the specification from a YAML file with the keys ``attention``, ``options`` and ``layers``.

    Raises: ValueError: no such file, no YAML, an unknown key or option, or an invalid value.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    keys = ("attention", "options", "layers")
    if not isinstance(content, dict) or not isinstance(content.get("attention"), str):
        raise ValueError(f"{path}: expected a mapping with the key attention, such as 'attention: gna'")
    unknown = [key for key in content if key not in keys]
    if unknown:
        raise ValueError(f"{path} has the unknown key {unknown[0]!r}{_suggest(str(unknown[0]), keys)}")
    name = content["attention"].strip().lower()
    _check_name(name)
    layers = content.get("layers") or {}
    if not isinstance(layers, dict):
        raise ValueError(f"{path}: layers must map regular expressions of layer names to options, got {layers!r}")
    exceptions = tuple(
        (_check_layers(name, str(pattern)), _yaml_options(name, options)) for pattern, options in layers.items()
    )
    try:
        return _checked(AttentionSpec(name, _yaml_options(name, content.get("options") or {}), exceptions))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _yaml_options(name: str, given: Any) -> dict[str, Any]:
    """Options from YAML: numbers, true, false, null, lists for one value per axis, or text as on the command line."""
    if not isinstance(given, dict):
        raise ValueError(f"{name}: options must be a mapping such as {{window: [16, 16]}}, got {given!r}")
    known = _option_types(name)
    options: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}{_suggest(str(key), known)}")
        text = "x".join(map(_yaml_text, value)) if isinstance(value, list) else _yaml_text(value)
        options[key] = _parse_value(name, key, text, known[key])
    return options


def _yaml_text(value: Any) -> str:
    """A YAML value in command-line format."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _parse_exception(name: str, text: str) -> tuple[str, dict[str, Any]]:
    options, at, layers = (piece.strip() for piece in text.partition("@"))
    if not at or not layers or not options:
        raise ValueError(f"{name}: expected options and layers, got {text.strip()!r}; write key=VALUE@LAYERS")
    return _check_layers(name, layers), _parse_options(name, options)


def _check_layers(name: str, layers: str) -> str:
    """The regular expression. Raises: ValueError: it is none."""
    try:
        re.compile(layers)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{name}: {layers!r} is not a regular expression for layer names: {error}") from None
    return layers


def _option_types(name: str) -> dict[str, Any]:
    hints = typing.get_type_hints(PROCESSORS[name])
    return {field.name: hints[field.name] for field in fields(PROCESSORS[name])}


def _parse_options(name: str, text: str) -> dict[str, Any]:
    known = _option_types(name)
    options: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}{_suggest(key, known)}")
        if not equals or not value:
            raise ValueError(f"{name}: option {key} has no value; write {key}=VALUE")
        if key in options:
            raise ValueError(f"{name}: option {key} is given twice")
        options[key] = _parse_value(name, key, value, known[key])
    return options


def parse_student(text: str) -> AttentionSpec | str:
    """Parse with :func:`parse_attention`; return the folder, file or hub id of trained attention unchanged.

    Raises: ValueError: the text is neither.
    """
    text = text.strip()
    name = text.partition(":")[0].strip().lower()
    if not _is_yaml(text) and find_processor(name) is None and (os.path.exists(text) or "/" in text):
        return text
    return parse_attention(text)


def attention_help() -> str:
    """Help for ``--attn``: format, mechanisms and the options of bare names, from the registry."""
    suggested = {name: PROCESSORS[name].suggest((64, 64)) for name in untrained_mechanisms()}
    bare = [
        f"{name}:{join_options(options)}" if options else f"{name} (its defaults)"
        for name, options in suggested.items()
    ]
    return (
        "Attention to compare with dense: NAME, NAME:key=value,key=value, a .yaml file with options per layer, or the "
        f"folder, file or hub id of trained attention. Repeatable; default {', '.join(untrained_mechanisms())}. The "
        "keys are the options of the processors; write one length per axis as 16x16 or 2x8x8, for example "
        "gna:window=16x16,stride=8. To set other options on some layers, append ;key=value@REGEX: "
        "gna:window=12x12;window=40x40@blocks.1 sets the larger window on the layers whose name contains blocks.1. A "
        f"name without options computes about a tenth of the logits; on 64×64 tokens: {'; '.join(bare)}."
    )


def join_options(options: Mapping[str, Any]) -> str:
    """Options in command-line format."""
    return ",".join(f"{name}={_format(value)}" for name, value in options.items())


def short_options(processor: AcceleratedAttnProcessor) -> str:
    """The two main options and all options that differ from their defaults, in command-line format."""
    own = processor.options()
    leading = list(own)[:2]
    changed = [field.name for field in fields(processor) if getattr(processor, field.name) != field.default]
    names = leading + [name for name in changed if name not in leading]
    return join_options({name: getattr(processor, name) for name in names})


def _format(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(_format(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _suggest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    close = close or [name for name in known if word and name.startswith(word.lower())][:1]
    return (f"; did you mean {close[0]!r}?" if close else ".") + f" Available: {', '.join(known)}"


def _parse_value(name: str, key: str, text: str, hint: Any) -> Any:
    members = members_of(hint)
    if type(None) in members and text.lower() == "none":
        return None
    for member in members:
        if typing.get_origin(member) is Sequence:
            pieces = text.lower().split("x")
            item = typing.get_args(member)[0]
            values = [_parse_scalar(piece, item) for piece in pieces]
            if len(values) > 1 and None not in values:
                return tuple(values)
        elif member is not type(None) and (value := _parse_scalar(text, member)) is not None:
            return value
    raise ValueError(f"{name}: {key} takes {_expected(members)}, got {text!r}")


def _parse_scalar(text: str, kind: type) -> Any:
    """The value as ``kind``; None if the text does not have this type."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower())
    if typing.get_origin(kind) is typing.Literal:
        return text if text in typing.get_args(kind) else None
    try:
        return kind(text)
    except ValueError:
        return None


def _expected(members: Sequence[Any]) -> str:
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a word", type(None): "none"}
    named = [words[member] for member in members if member in words]
    for member in members:
        if typing.get_origin(member) is typing.Literal:
            named.extend(map(repr, typing.get_args(member)))
        if typing.get_origin(member) is Sequence:
            example = {bool: "truexfalse", float: "4x8.5"}.get(typing.get_args(member)[0], "16x16")
            named.append(f"one per axis such as {example}")
    return " or ".join(named)
