"""Configuration in the metadata of ``dit_accel.safetensors``: processors, their layers, user-defined layouts."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..layout import TokenLayout
from ..mechanisms.processor import AcceleratedAttnProcessor
from ..mechanisms.registry import PROCESSORS, find_processor

__all__ = ["FUNCTION", "SavedComponent", "SavedGroup", "read_configuration", "write_configuration"]

FORMAT = 1
FUNCTION = "function"  # stands for a user-defined layout that is a function, which cannot be saved


@dataclass(frozen=True)
class SavedGroup:
    """Attention modules with one processor and one layout.

    Args:
        processor: the processor without its backend, which depends on the machine.
        layers: names of the attention modules.
        layout: the user-defined ``TokenLayout``; ``FUNCTION`` if it is a function; None for the model family's own.
    """

    processor: AcceleratedAttnProcessor
    layers: tuple[str, ...]
    layout: TokenLayout | str | None = None


@dataclass(frozen=True)
class SavedComponent:
    """Denoiser in the file: the name of its class, and its groups."""

    class_name: str
    groups: tuple[SavedGroup, ...]


def write_configuration(components: Mapping[str, SavedComponent]) -> str:
    """Return the JSON text that :func:`read_configuration` reads."""
    entries = {
        name: {"class": component.class_name, "attention": [_group_to_json(group) for group in component.groups]}
        for name, component in components.items()
    }
    return json.dumps({"format": FORMAT, "components": entries})


def _group_to_json(group: SavedGroup) -> dict[str, Any]:
    options = {name: value for name, value in asdict(group.processor).items() if name != "backend"}
    entry = {"mechanism": group.processor.name, "options": options, "layers": list(group.layers)}
    if group.layout is not None:
        entry["layout"] = asdict(group.layout) if isinstance(group.layout, TokenLayout) else group.layout
    return entry


def read_configuration(text: str, path: Path) -> dict[str, SavedComponent]:
    """Return the components by name; ``path`` is used in messages.

    Raises: ValueError: not a JSON text of this form, another format, an unknown mechanism or option, an option of the
        wrong type or out of range.
    """
    try:
        content = json.loads(text)
        if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {content['format']!r}: update dit_accel")
        top = _fields("the configuration", content, {"format", "components"})
        components = _of_type("components", top["components"], dict)
        if not components:
            raise ValueError("components must not be empty")
        return {name: _component(name, entry) for name, entry in components.items()}
    except RecursionError as error:
        raise ValueError(f"{path} has an invalid configuration in its metadata: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path} has an invalid configuration in its metadata: {error}") from error


def _component(name: str, entry: Any) -> SavedComponent:
    content = _fields(f"component {name}", entry, {"class", "attention"})
    groups = tuple(_group(f"component {name}", group) for group in _list_of("attention", content["attention"], dict))
    layers = [layer for group in groups for layer in group.layers]
    if not layers:
        raise ValueError(f"component {name} has no layers")
    twice = next((layer for layer in layers if layers.count(layer) > 1), None)
    if twice is not None:
        raise ValueError(f"component {name} has the layer {twice} twice")
    return SavedComponent(_of_type("class", content["class"], str), groups)


def _group(component: str, entry: Any) -> SavedGroup:
    content = _fields(f"an attention group of {component}", entry, {"mechanism", "options", "layers"}, {"layout"})
    name = content["mechanism"]
    if not isinstance(name, str) or find_processor(name) is None:
        raise ValueError(f"unknown mechanism {name!r}; expected one of {', '.join(PROCESSORS)}")
    kind = PROCESSORS[name]
    known = {field.name for field in fields(kind)} - {"backend"}
    options = _fields(f"the options of {name}", content["options"], (), known)
    try:
        processor = kind(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the options of {name} are not valid: {error}") from error
    layers = tuple(_list_of("layers", content["layers"], str))
    return SavedGroup(processor, layers, _layout(content["layout"]) if "layout" in content else None)


def _layout(entry: Any) -> TokenLayout | str:
    if entry == FUNCTION:
        return FUNCTION
    content = _fields("the token layout", entry, {"grid", "before", "after", "references"})
    before, after = (_of_type(name, content[name], int) for name in ("before", "after"))
    references = [_grid(each) for each in _of_type("references", content["references"], list)]
    return TokenLayout(_grid(content["grid"]), before, after, tuple(references))


def _grid(value: Any) -> tuple[int, ...]:
    return TokenLayout(tuple(_list_of("a grid", value, int))).grid


def _fields(name: str, value: Any, required: Collection[str], optional: Collection[str] = ()) -> dict[str, Any]:
    """Return the value if it is a JSON object with these keys.

    Raises: ValueError: not an object, a missing or an unknown key.
    """
    _of_type(name, value, dict)
    missing = [key for key in required if key not in value]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(sorted(missing))}")
    known = {*required, *optional}
    unknown = [key for key in value if key not in known]
    if unknown:
        raise ValueError(f"{name} has the unknown key {unknown[0]!r}; expected {', '.join(sorted(known))}")
    return value


def _list_of(name: str, value: Any, kind: type) -> list[Any]:
    return [_of_type(f"an entry of {name}", each, kind) for each in _of_type(name, value, list)]


_JSON_NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer"}


def _of_type(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} must be {_JSON_NAMES[kind]}, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
