"""What is compared with dense attention: a mechanism as it is, or one that a pipeline was converted to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..attn_spec import AttentionSpec, ByLayer, short_options
from ..install import attention, reset_attn_processor, set_by_layer
from ..layout import TokenLayout
from ..load import load_attention
from ..processor import AcceleratedAttnProcessor

__all__ = ["Student", "make_students"]


@dataclass(frozen=True)
class Student:
    """``source``: what ``load_attention`` takes, where the attention was trained; the processors are then its own.
    ``exceptions``: layers with another than ``processor``."""

    label: str
    processor: AcceleratedAttnProcessor
    source: str | None = None
    exceptions: ByLayer = ()

    @property
    def short(self) -> str:
        """In few words."""
        options = short_options(self.processor) + (" and others by layer" if self.exceptions else "")
        return options if self.source is None else f"{self.processor.name}, trained; {options}"

    @contextmanager
    def installed(self, pipe: Any) -> Iterator[None]:
        """Inside, the pipeline has this attention."""
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


def make_students(asked: Sequence[AttentionSpec | str], pipe: Any, grid: tuple[int, ...] | None) -> list[Student]:
    """Tried on the pipeline.

    Raises: ValueError, TypeError: one that does not fit the grid, or a model that takes none; FileNotFoundError.
    """
    students: list[Student] = []
    seen: dict[str, int] = {}
    for one in asked:
        if isinstance(one, str):
            name = Path(one).stem if Path(one).is_file() else Path(one).name
            loaded = load_attention(pipe, one)  # refuses what does not fit
            reset_attn_processor(pipe)
            choices, source = _choices(loaded.parts[0].processors), one
        else:
            name, source = one.name, None
            choices = one.by_layer(one.processor(grid))
            with attention(pipe, choices[0][1]):  # refuses models and layers that are not known
                set_by_layer(pipe, choices)
        for _, processor in choices if grid is not None else ():  # refuses a window with another number of axes
            layout = TokenLayout(grid or ())
            processor.mechanism.fit(layout, **processor.layer_options(layout))
        seen[name] = seen.get(name, 0) + 1
        label = name if seen[name] == 1 else f"{name}-{seen[name]}"
        students.append(Student(label, choices[0][1], source, choices[1:]))
    return students


def _choices(processors: Mapping[str, AcceleratedAttnProcessor]) -> ByLayer:
    """The most usual of these first, then each layer that has another."""
    usual = Counter(processors.values()).most_common(1)[0][0]
    return (None, usual), *((layer, processor) for layer, processor in processors.items() if processor != usual)
