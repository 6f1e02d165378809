"""What is compared with dense attention: a mechanism as it is, or one that a pipeline was converted to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..attn_spec import AttentionSpec, short_options
from ..install import attention, reset_attn_processor
from ..layout import TokenLayout
from ..load import load_attention
from ..processor import AcceleratedAttnProcessor

__all__ = ["Student", "make_students"]


@dataclass(frozen=True)
class Student:
    """``source``: what ``load_attention`` takes, where the attention was trained; the processor is then its own."""

    label: str
    processor: AcceleratedAttnProcessor
    source: str | None = None

    @property
    def short(self) -> str:
        """In few words."""
        options = short_options(self.processor)
        return options if self.source is None else f"{self.processor.name}, trained; {options}"

    @contextmanager
    def installed(self, pipe: Any) -> Iterator[None]:
        """Inside, the pipeline has this attention."""
        if self.source is None:
            with attention(pipe, self.processor):
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
            processor, source = next(iter(loaded.parts[0].processors.values())), one
        else:
            name, processor, source = one.name, one.processor(grid), None
            with attention(pipe, processor):  # refuses models that are not known
                pass
        if grid is not None:  # refuses a window with another number of axes
            layout = TokenLayout(grid)
            processor.mechanism.fit(layout, **processor.layer_options(layout))
        seen[name] = seen.get(name, 0) + 1
        students.append(Student(name if seen[name] == 1 else f"{name}-{seen[name]}", processor, source))
    return students
