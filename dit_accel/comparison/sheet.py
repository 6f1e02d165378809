"""Contact sheet of prompts × attention: a picture or clip with the figures under each cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..common.files import replacing
from .report import Report, Variant, figure

__all__ = ["Sheet", "contact_cell", "save_clip", "save_image"]

_CELL_WIDTH, _MARGIN, _GAP = 320, 32, 20
_INK, _GREY, _EMPTY, _PAPER = "#16181d", "#5c6470", "#eceef1", "#ffffff"
_BIG, _MEDIUM, _SMALL = (ImageFont.load_default(size) for size in (30, 21, 17))
_LINE = {id(_BIG): 40, id(_MEDIUM): 30, id(_SMALL): 24}
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Sheet:
    """Contact sheet of a report, with empty cells to paste pictures into.

    Args:
        report: results with the figures to print.
        aspect: height over width of a cell.
        subtitle: a line under the title.
    """

    def __init__(self, report: Report, aspect: float, subtitle: str) -> None:
        self.cell = (_CELL_WIDTH, max(1, round(_CELL_WIDTH * aspect)))
        self.report = report
        columns = len(report.variants)
        width = 2 * _MARGIN + columns * _CELL_WIDTH + (columns - 1) * _GAP
        self.heads = [_wrap(variant.short, _SMALL, _CELL_WIDTH, ",") for variant in report.variants]
        self.captions = [_wrap(f"“{prompt}”", _MEDIUM, width - 2 * _MARGIN, " ") for prompt in report.prompts]
        self.notes = [[_notes(variant, prompt) for variant in report.variants] for prompt in range(len(report.prompts))]
        self.places: dict[tuple[int, int], tuple[int, int]] = {}  # (prompt, column) -> top left corner
        height = self._lay_out(None, subtitle)
        self.image = Image.new("RGB", (width + width % 2, height + height % 2), _PAPER)  # H.264 needs even sides
        self._lay_out(ImageDraw.Draw(self.image), subtitle)

    def _lay_out(self, draw: ImageDraw.ImageDraw | None, subtitle: str) -> int:
        """Draw all texts and empty cells; without a canvas, only compute the height. Returns: the height."""
        left = [_MARGIN + i * (_CELL_WIDTH + _GAP) for i in range(len(self.report.variants))]
        y = _write(draw, _MARGIN, _MARGIN, [str(self.report.about["pipeline"]["class"])], _BIG, _INK)
        y = _write(draw, _MARGIN, y, [subtitle], _SMALL, _GREY) + _GAP
        bottoms = []
        for x, variant, lines in zip(left, self.report.variants, self.heads, strict=True):
            below = _write(draw, x, y, [_title(variant)], _BIG, _INK)
            bottoms.append(_write(draw, x, below, lines, _SMALL, _GREY))
        y = max(bottoms) + _GAP // 2
        for prompt, caption in enumerate(self.captions):
            y = _write(draw, _MARGIN, y + _GAP // 2, caption, _MEDIUM, _INK) + 6
            for column, x in enumerate(left):
                self.places[prompt, column] = (x, y)
                if draw is not None:
                    draw.rectangle((x, y, x + self.cell[0] - 1, y + self.cell[1] - 1), fill=_EMPTY)
            y += self.cell[1] + 8
            y = max(_write(draw, x, y, lines, _SMALL, _GREY) for x, lines in zip(left, self.notes[prompt], strict=True))
        return y + _MARGIN

    def paste(self, prompt: int, column: int, cell: Image.Image) -> None:
        """Paste a picture into its cell, scaled to fit."""
        sampling = Image.Resampling.LANCZOS if cell.width >= self.cell[0] else Image.Resampling.BICUBIC
        self.image.paste(cell.convert("RGB").resize(self.cell, sampling), self.places[prompt, column])


def _title(variant: Variant) -> str:
    return variant.label if variant.label == "dense" else variant.label.upper()


def _notes(variant: Variant, prompt: int) -> list[str]:
    """Figures under a cell, or the reason for a missing picture."""
    picture = variant.picture(prompt)
    if picture is None:
        return [variant.status if variant.status in ("failed", "interrupted") else "not drawn"]
    time = f"{figure('seconds_per_step', picture.seconds_per_step)} s/step"
    if variant.label == "dense":
        return [time, "the baseline"]
    share = f"{figure('logit_fraction', variant.logit_fraction)} of the logits"
    likeness = f"PSNR {figure('psnr', picture.psnr)} dB · SSIM {figure('ssim', picture.ssim)}"
    lines = [f"{time} · {figure('times_dense', picture.times_dense)} dense", share, likeness]
    return lines if picture.lpips is None else [*lines, f"LPIPS {figure('lpips', picture.lpips)}"]


def _wrap(text: str, font: Font, width: int, at: str) -> list[str]:
    """Break a text after occurrences of ``at`` into lines of at most ``width`` pixels, if possible."""
    lines = [""]
    pieces = text.split(at)
    for i, piece in enumerate(pieces):
        piece += at if i + 1 < len(pieces) else ""
        if lines[-1] and font.getlength(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def _write(draw: ImageDraw.ImageDraw | None, x: int, y: int, lines: list[str], font: Font, colour: str) -> int:
    """Write lines below each other. Returns: the y coordinate below them."""
    for line in lines:
        if draw is not None:
            draw.text((x, y), line.replace("×", "x"), font=font, fill=colour)  # Pillow's default font has no ×
        y += _LINE[id(font)]
    return y


def contact_cell(frames: NDArray[np.uint8]) -> Image.Image:
    """Cell of the sheet: the picture, or a 2×2 grid of evenly spaced frames of a clip."""
    if len(frames) == 1:
        return Image.fromarray(frames[0])
    _, height, width, _ = frames.shape
    gap = max(1, width // 50)
    cell = Image.new("RGB", (2 * width + gap, 2 * height + gap), _PAPER)
    for i, time in enumerate(np.linspace(0, len(frames) - 1, 4).round().astype(int)):
        cell.paste(Image.fromarray(frames[time]), (i % 2 * (width + gap), i // 2 * (height + gap)))
    return cell


def save_image(path: Path, image: Image.Image) -> None:
    """Save a picture as PNG, atomically."""
    with replacing(path) as temporary:
        image.save(temporary)


def save_clip(path: Path, frames: Iterator[NDArray[np.uint8]], fps: int) -> None:
    """Save (H, W, 3) frames as MP4 (H.264, 4:2:0), atomically; odd sides are padded by repeating the last pixel."""
    import imageio.v2

    with (
        replacing(path) as temporary,
        imageio.v2.get_writer(
            temporary, format="FFMPEG", fps=fps, codec="libx264", quality=8, macro_block_size=1
        ) as writer,
    ):
        for frame in frames:
            height, width = frame.shape[:2]
            writer.append_data(np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))


def sheet_frames(
    sheet: Sheet, length: int, frame_of: Callable[[int, int, int], NDArray[np.uint8] | None]
) -> Iterator[NDArray[np.uint8]]:
    """Frames of the sheet as a clip; ``frame_of(prompt, column, time)`` returns a cell's frame, or None."""
    for time in range(length):
        for prompt, column in sheet.places:
            frame = frame_of(prompt, column, time)
            if frame is not None:
                sheet.paste(prompt, column, Image.fromarray(frame))
        yield np.asarray(sheet.image)
