"""Registry of the mechanisms, and their functions on tensors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from functools import cache, lru_cache
from importlib.metadata import entry_points
from textwrap import indent
from typing import Any, TypeVar
from warnings import warn

import torch
from torch import Tensor

from ..layout import TokenLayout
from ._common import check_learned, flat_layout
from ._inputs import AttentionInputs
from ._operator import define_operator
from ._options import check_names, operator_arguments, operator_options, option_fields, to_hashable
from .processor import AcceleratedAttnProcessor

__all__ = [
    "PROCESSORS",
    "attention_function",
    "find_processor",
    "reference_function",
    "register_processor",
    "untrained_mechanisms",
]

PROCESSORS: dict[str, type[AcceleratedAttnProcessor]] = {}

Kind = TypeVar("Kind", bound=type[AcceleratedAttnProcessor])

_LAST = ("key_mask", "scale", "backend")

_FIRST_ARGUMENTS = """query, key, value: (B, H, S, D), any floating dtype, any strides.
layout: position of the grid in the sequence{default}.
"""
_LAST_ARGUMENTS = """key_mask: (B, S) bool, True = attend; masked keys are not pooled either.
scale: factor on the logits; default D**-0.5.
"""
_BACKEND_ARGUMENT = "backend: {names}; None = the environment's DIT_ACCEL_BACKEND, else Triton on a GPU.\n"
_END = """
Returns: (B, H, S, D) in query.dtype; a row without a visible key is 0.
Raises: TypeError, ValueError: options that are out of range or do not suit the layout, a layout that does not match,
    tensors that do not match each other.
"""


def register_processor(kind: Kind) -> Kind:
    """Make a processor class known by its ``name``: to ``--attn``, saved files, comparisons and the demo app.

    Use it as a decorator above ``@dataclass(frozen=True, kw_only=True)``. The computation becomes the torch operator
    ``dit_accel::<name>_attention``, and :mod:`dit_accel.functional` gets the function ``<name>_attention``.

    Raises: TypeError: not a frozen dataclass that derives from ``AcceleratedAttnProcessor``, or an option of a type
        that an operator cannot have; ValueError: an invalid name, or one that another class has.
    """
    if not (isinstance(kind, type) and issubclass(kind, AcceleratedAttnProcessor)):
        raise TypeError(f"expected a subclass of dit_accel.AcceleratedAttnProcessor, got {kind!r}")
    if "__dataclass_params__" not in kind.__dict__ or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError(f"{kind.__name__} must be a dataclass: put @dataclass(frozen=True, kw_only=True) below")
    for attribute in ("name", "label", "summary"):
        if not isinstance(getattr(kind, attribute, None), str):
            raise TypeError(f"{kind.__name__} needs the class attribute {attribute}, a str")
    if not re.fullmatch("[a-z][a-z0-9_]*", kind.name):
        raise ValueError(f"the name of a mechanism has lower-case letters, digits and _, got {kind.name!r}")
    other = PROCESSORS.get(kind.name)
    if other is not None and (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"{kind.name!r} is {other.__module__}.{other.__qualname__}: choose another name")
    if kind.attend is AcceleratedAttnProcessor.attend:  # else it computes without an operator
        kind.operator_options = operator_options(kind)
        kind.operator = define_operator(kind)
    kind.registered = kind
    PROCESSORS[kind.name] = kind
    return kind


def find_processor(name: str) -> type[AcceleratedAttnProcessor] | None:
    """Return the processor class of a mechanism; None if there is none.

    For an unknown name, the modules in the entry point group ``dit_accel.processors`` of installed packages are
    imported, so that their mechanisms are known to the command line.
    """
    if name not in PROCESSORS:
        _load_entry_points()
    return PROCESSORS.get(name)


@cache
def _load_entry_points() -> None:
    for point in entry_points(group="dit_accel.processors"):
        try:
            point.load()
        except Exception as error:  # of another package: the mechanisms of this one must work without it
            warn(f"the mechanism {point.name} ({point.value}) could not be loaded: {error!r}", stacklevel=3)


def untrained_mechanisms() -> list[str]:
    """Names of the mechanisms that support every self-attention layer and work without training."""
    return [name for name, kind in PROCESSORS.items() if kind.any_host]


def attention_function(kind: type[AcceleratedAttnProcessor]) -> Callable[..., Tensor]:
    """Return the mechanism as a function ``(query, key, value, layout, *, options, learned, key_mask, scale, backend)``
    with signature and docstring."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout | None = None,
        *,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        backend: str | None = None,
        **given: Any,
    ) -> Tensor:
        learned = {name: given.pop(name) for name in kind.learned if name in given}
        if torch.compiler.is_compiling():
            arguments = operator_arguments(kind.name, kind.operator_options, given)
        else:
            processor = _checked_processor(kind, given, scale, backend)
            _check_learned(processor, learned, query)
            arguments = processor._arguments
        return kind.call(
            query, key, value, layout, arguments, key_mask=key_mask, scale=scale, fit=False, backend=backend,
            learned=learned,
        )  # fmt: skip

    _document(attention, kind, f"{kind.name}_attention", with_backend=True)
    return attention


def reference_function(kind: type[AcceleratedAttnProcessor]) -> Callable[..., Tensor]:
    """Return the mechanism's ``dense_reference`` as a function with the arguments of its attention function."""

    def reference(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout | None = None,
        *,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        **given: Any,
    ) -> Tensor:
        learned = {name: given.pop(name) for name in kind.learned if name in given}
        processor = kind(**given)
        return processor.dense_reference(
            AttentionInputs(
                query, key, value, key_mask, tuple(learned.get(name) for name in kind.learned),
                flat_layout(layout, query), query.shape[-1] ** -0.5 if scale is None else scale,
            )
        )  # fmt: skip

    _document(reference, kind, f"{kind.name}_reference", with_backend=False)
    return reference


def _checked_processor(kind: Any, given: Mapping[str, Any], scale: Any, backend: Any) -> AcceleratedAttnProcessor:
    """Processor with these options. Raises: TypeError, ValueError: an invalid option or scale."""
    key = tuple((name, *_key(value)) for name, value in given.items())
    try:
        hash(key)
    except TypeError:
        processor = _make(kind, given, backend)
    else:
        processor = _cached(kind, key, backend)
    processor.check_scale(scale)
    return processor


def _key(value: Any) -> tuple[Any, Any]:
    """The value and the types in it: 1 and True are equal, and only one of them is valid."""
    value = to_hashable(value)
    return value, tuple(map(type, value)) if isinstance(value, tuple) else type(value)


@lru_cache(maxsize=1024)
def _cached(kind: Any, key: tuple[tuple[str, Any, Any], ...], backend: Any) -> AcceleratedAttnProcessor:
    return _make(kind, {name: value for name, value, _ in key}, backend)


def _make(kind: type[AcceleratedAttnProcessor], given: Mapping[str, Any], backend: Any) -> AcceleratedAttnProcessor:
    check_names(kind.name, kind.operator_options, given)
    return kind(**given, backend=backend)


def _check_learned(processor: AcceleratedAttnProcessor, learned: Mapping[str, Any], query: Any) -> None:
    """Raises: TypeError, ValueError: a learned tensor of another shape, dtype or device."""
    if learned and isinstance(query, Tensor) and query.dim():
        shapes = processor.learned_shapes(query.shape[-1])
        for name, x in learned.items():
            check_learned(name, x, shapes[name], query)


def _document(function: Any, kind: type[AcceleratedAttnProcessor], name: str, with_backend: bool) -> None:
    """Give a function the name, signature and docstring of the mechanism's."""
    own = inspect.signature(function)
    kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD and p.name not in _LAST]
    options = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, annotation=field.type,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
        )
        for field in option_fields(kind)
    ]  # fmt: skip
    learned = [
        inspect.Parameter(x, inspect.Parameter.KEYWORD_ONLY, annotation="Tensor | None", default=None)
        for x in kind.learned
    ]
    if kind.needs_layout:
        kept[-1] = kept[-1].replace(default=inspect.Parameter.empty, annotation="TokenLayout")
    last = [own.parameters[x] for x in _LAST if x in own.parameters]
    function.__signature__ = own.replace(parameters=[*kept, *options, *learned, *last])
    function.__name__ = function.__qualname__ = name
    function.__doc__ = _docstring(kind, with_backend)


def _docstring(kind: type[AcceleratedAttnProcessor], with_backend: bool) -> str:
    text = inspect.getdoc(kind) or ""
    head, _, options = text.partition("\nArgs:\n")
    default = "" if kind.needs_layout else "; None = the whole sequence is the grid, 1-D"
    arguments = _FIRST_ARGUMENTS.format(default=default)
    arguments += inspect.cleandoc("x\n" + options)[2:].rstrip() + "\n" if options else ""
    arguments += "".join(f"{name}: {words}\n" for name, words in kind.learned.items()) + _LAST_ARGUMENTS
    if with_backend:
        arguments += _BACKEND_ARGUMENT.format(names=" or ".join(f'"{x}"' for x in kind.backends))
    return head.rstrip() + "\n\nArgs:\n" + indent(arguments, "    ").rstrip() + _END
