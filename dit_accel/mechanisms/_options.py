"""Options of a processor as arguments of a torch operator: schema, and conversion in both directions."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, NamedTuple

__all__ = [
    "OperatorOption",
    "check_names",
    "members_of",
    "operator_arguments",
    "operator_options",
    "option_fields",
    "to_hashable",
]

_SCALARS: dict[Any, str] = {bool: "bool", int: "int", float: "float", str: "str"}


class OperatorOption(NamedTuple):
    """An option as operator argument: its type in the schema, its default (MISSING: none), and its conversion."""

    name: str
    schema: str
    default: Any
    convert: Callable[[Any], Any]


def to_hashable(value: Any) -> Any:
    """Convert a list to a tuple; return any other value unchanged."""
    return tuple(value) if isinstance(value, list) else value


def option_fields(kind: type) -> list[Field[Any]]:
    """Fields of a processor class that are options of its own, without those that all processors share."""
    base = next(x for x in reversed(kind.__mro__) if hasattr(x, "__dataclass_fields__"))
    common = {field.name for field in fields(base)}
    return [field for field in fields(kind) if field.name not in common]


def members_of(hint: Any) -> tuple[Any, ...]:
    """Members of a union type, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def operator_options(kind: type) -> tuple[OperatorOption, ...]:
    """Options of a processor class as operator arguments.

    Supported types: bool, int, float, str and ``Literal`` of strings, each also ``| None``; or such a type and a
    ``Sequence`` of it, for one value per axis.

    Raises: TypeError: an option of another type.
    """
    hints = typing.get_type_hints(kind)
    return tuple(_operator_option(kind, field, hints[field.name]) for field in option_fields(kind))


def _operator_option(kind: type, field: Field[Any], hint: Any) -> OperatorOption:
    members = [member for member in members_of(hint) if member is not type(None)]
    optional = len(members) < len(members_of(hint))
    scalar = next((member for member in members if typing.get_origin(member) is not Sequence), None)
    per_axis = [member for member in members if typing.get_origin(member) is Sequence]
    if typing.get_origin(scalar) is typing.Literal and all(isinstance(x, str) for x in typing.get_args(scalar)):
        scalar = str
    name = _SCALARS.get(scalar)
    sequences = [typing.get_args(member)[0] for member in per_axis]
    if name is None or len(members) != 1 + len(per_axis) or sequences not in ([], [scalar]) or (optional and per_axis):
        raise TypeError(
            f"{kind.__name__}.{field.name} has the type {hint}; expected bool, int, float, str or a Literal of "
            "strings, each also with | None, or one of these and a Sequence of it"
        )
    convert: Callable[[Any], Any] = _to_float if scalar is float else _same
    if per_axis:
        return OperatorOption(field.name, f"{name}[]", field.default, _to_floats if scalar is float else _to_list)
    return OperatorOption(field.name, name + ("?" if optional else ""), field.default, convert)


def _same(value: Any) -> Any:
    return value


def _to_float(value: Any) -> Any:
    return value if value is None else float(value)


def _to_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _to_floats(value: Any) -> list[float]:
    return [float(x) for x in _to_list(value)]


def check_names(name: str, options: Sequence[OperatorOption], given: Iterable[str]) -> None:
    """Raises: TypeError: an unknown option."""
    known = [option.name for option in options]
    for key in given:
        if key not in known:
            raise TypeError(f"{name} has no option {key!r}; expected {', '.join(known)}")


def operator_arguments(name: str, options: Sequence[OperatorOption], given: Mapping[str, Any]) -> tuple[Any, ...]:
    """Arguments of the operator for the given options, in the order of its schema.

    Raises: TypeError: an unknown option, or a missing one.
    """
    check_names(name, options, given)
    arguments = []
    for option in options:
        value = given.get(option.name, option.default)
        if value is MISSING:
            raise TypeError(f"{name} needs the option {option.name!r}: give it a value")
        arguments.append(option.convert(value))
    return tuple(arguments)
