"""Attention to compare with dense: an untrained mechanism, or one that a pipeline was converted to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..install.installation import attention, reset_attn_processor, set_by_layer
from ..layout import TokenLayout
from ..mechanisms.attn_spec import AttentionSpec, ByLayer, short_options
from ..mechanisms.processor import AcceleratedAttnProcessor
from ..weights.load import load_attention

__all__ = ["Student", "make_students"]


@dataclass(frozen=True)
class Student:
    """Attention to compare with dense.

    Args:
        label: name in the report.
        processor: processor of most layers.
        source: argument of ``load_attention`` for trained attention, which then defines the processors.
        exceptions: layers with another processor.
    """

    label: str
    processor: AcceleratedAttnProcessor
    source: str | None = None
    exceptions: ByLayer = ()

    @property
    def short(self) -> str:
        """Options in command-line format, for titles."""
        options = short_options(self.processor) + (" and others by layer" if self.exceptions else "")
        return options if self.source is None else f"{self.processor.name}, trained; {options}"

    @contextmanager
    def installed(self, pipe: Any) -> Iterator[None]:
        """Context in which the pipeline uses this attention."""
        if self.source is None:
            with attention(pipe, self.processor):
                set_by_layer(pipe, self.exceptions)
                yield
            return
        load_attention(pipe, self.source)
        try:
            yield
        finally:
            reset_attn_processor(pipe)


def make_students(requested: Sequence[AttentionSpec | str], pipe: Any, grid: tuple[int, ...] | None) -> list[Student]:
    """Build the students and check each one on the pipeline.

    Raises:
        ValueError, TypeError: options that do not fit the grid, or an unsupported model.
        FileNotFoundError: no trained attention at the given source.
    """
    students: list[Student] = []
    counts: dict[str, int] = {}
    for spec in requested:
        if isinstance(spec, str):
            name = Path(spec).stem if Path(spec).is_file() else Path(spec).name
            loaded = load_attention(pipe, spec)  # raises if it does not fit the model
            reset_attn_processor(pipe)
            choices, source = _choices(loaded.parts[0].processors), spec
        else:
            name, source = spec.name, None
            choices = spec.by_layer(spec.processor(grid))
            with attention(pipe, choices[0][1]):  # raises for unknown models and layers
                set_by_layer(pipe, choices)
        for _, processor in choices if grid is not None else ():  # raises for a window with another number of axes
            processor.for_layout(TokenLayout(grid or ()))
        counts[name] = counts.get(name, 0) + 1
        label = name if counts[name] == 1 else f"{name}-{counts[name]}"
        students.append(Student(label, choices[0][1], source, choices[1:]))
    return students


def _choices(processors: Mapping[str, AcceleratedAttnProcessor]) -> ByLayer:
    """The most common processor for all layers, then each layer with another one."""
    default = Counter(processors.values()).most_common(1)[0][0]
    return (None, default), *((layer, processor) for layer, processor in processors.items() if processor != default)
