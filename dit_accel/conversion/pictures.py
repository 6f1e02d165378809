"""Pictures of teacher and student side by side, same prompt and seed, drawn during training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from ..common.files import replacing

__all__ = ["Pictures"]

_FRAMES = 4  # frames shown of a clip, evenly spaced from first to last


class Pictures:
    """Drawings of a few prompts. The teacher's are made in the constructor, before a mechanism is installed."""

    def __init__(
        self, folder: Path, pipe: Any, component: str, call: dict[str, Any], prompts: tuple[str, ...], seed: int
    ) -> None:
        self.folder, self.pipe, self.component, self.call = folder, pipe, component, call
        self.prompts, self.seed = prompts, seed
        folder.mkdir(parents=True, exist_ok=True)
        self.teacher = [self._draw(i) for i in range(len(prompts))]

    def is_missing(self, step: int) -> bool:
        """Whether a picture of this step does not exist."""
        return not all(self._path(step, i).is_file() for i in range(len(self.teacher)))

    def against_teacher(self, step: int, writes: bool = True) -> Iterator[Path]:
        """Draw and write ``step-000200-0.png`` and so on, teacher left, student right; yield each path once written.

        Args: writes: False only draws, for a process that holds a shard of the student while another process writes.
        """
        model = getattr(self.pipe, self.component)
        device = model.device
        self._move(device)
        model.eval()
        for i, teacher in enumerate(self.teacher):
            both = np.concatenate([teacher, self._draw(i)], 1)
            path = self._path(step, i)
            if writes:
                with replacing(path) as temporary:
                    Image.fromarray(both).save(temporary)
                yield path
        model.train()
        self._move(torch.device("cpu"))

    def _path(self, step: int, i: int) -> Path:
        return self.folder / f"step-{step:06d}-{i}.png"

    @torch.no_grad()
    def _draw(self, i: int) -> NDArray[np.uint8]:
        """Draw the i-th prompt: (H, W, 3) uint8, the frames of a clip side by side."""
        generator = torch.Generator().manual_seed(self.seed + i)
        drawn = self.pipe(prompt=self.prompts[i], generator=generator, output_type="np", **self.call)[0][0]
        frames = drawn[None] if drawn.ndim == 3 else drawn
        chosen = frames[np.linspace(0, len(frames) - 1, min(_FRAMES, len(frames))).round().astype(int)]
        return (np.concatenate(list(chosen), 1).clip(0, 1) * 255).round().astype(np.uint8)

    def _move(self, device: torch.device) -> None:
        """Move all components except the denoiser."""
        for name, part in self.pipe.components.items():
            if isinstance(part, nn.Module) and name != self.component:
                part.to(device)
