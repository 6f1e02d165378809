"""What a comparison has found so far: kept as plain data, written as JSON, shown as a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from ..files import write_json

__all__ = ["FIGURES", "Picture", "Report", "Variant", "figure"]

# figure -> (heading, format); what is None was not measured
FIGURES = {
    "seconds_per_step": ("s / step", "{:.3g}"),
    "times_dense": ("× dense", "{:.2f}×"),
    "logit_fraction": ("logits", "{:.1%}"),
    "psnr": ("PSNR dB", "{:.1f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "lpips": ("LPIPS", "{:.3f}"),
}


def figure(name: str, value: float | None) -> str:
    """A figure as people read it; a dash for what was not measured."""
    return "–" if value is None else FIGURES[name][1].format(value)


@dataclass
class Picture:
    """One prompt drawn by one variant, and how it compares with dense's picture of the same prompt and seed."""

    prompt: int
    file: str
    seconds_per_step: float
    times_dense: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None


@dataclass
class Variant:
    """Dense, or a mechanism with its options. source: of attention that was trained. status: waiting, running,
    complete, failed, interrupted."""

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    short: str = ""
    source: str | None = None
    status: str = "waiting"
    error: str | None = None
    logit_fraction: float | None = None
    installed: str | None = None
    pictures: list[Picture] = field(default_factory=list)

    def mean(self, name: str) -> float | None:
        """A figure averaged over the pictures that have it."""
        if name == "logit_fraction":
            return self.logit_fraction
        values = [value for picture in self.pictures if (value := getattr(picture, name)) is not None]
        return statistics.fmean(values) if values else None

    def picture(self, prompt: int) -> Picture | None:
        return next((picture for picture in self.pictures if picture.prompt == prompt), None)


@dataclass
class Report:
    """A comparison, dense first. status: running, complete, failed, interrupted."""

    path: Path
    about: Mapping[str, Any]
    prompts: list[str]
    variants: list[Variant]
    status: str = "running"
    files: dict[str, str] = field(default_factory=dict)
    dense_again: float | None = None  # dense's seconds per step once more, after everything else

    def drift(self) -> float | None:
        """How much slower (> 1) or faster dense was at the end than at the beginning: what else the machine did."""
        begun = self.variants[0].mean("seconds_per_step")
        return self.dense_again / begun if begun and self.dense_again else None

    def missing(self) -> list[dict[str, Any]]:
        """What was asked for and is not there."""
        return [
            {"attention": variant.label, "prompt": prompt, "status": variant.status}
            for variant in self.variants
            for prompt in range(len(self.prompts))
            if variant.picture(prompt) is None
        ]

    def content(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return {
            "status": self.status,
            "missing": self.missing(),
            **self.about,
            "prompts": self.prompts,
            "files": self.files,
            "dense_again": {"seconds_per_step": self.dense_again, "over_first": self.drift()},
            "attention": [
                {**asdict(variant), "mean": {name: variant.mean(name) for name in FIGURES}} for variant in self.variants
            ],
        }

    def save(self) -> None:
        """Write it, whole, in the place of what was there."""
        write_json(self.path, self.content())

    def table(self) -> Table:
        """One row a variant, means over the prompts."""
        shown = [name for name in FIGURES if name != "lpips" or any(v.mean("lpips") is not None for v in self.variants)]
        table = Table(title=f"{self.about['pipeline']['class']}, mean of {len(self.prompts)} prompt(s)")
        table.add_column("attention")
        for name in shown:
            table.add_column(FIGURES[name][0], justify="right")
        for variant in self.variants:
            note = "" if variant.status == "complete" else f" ({variant.status})"
            head = f"{variant.label}{note}\n[dim]{variant.short.replace(',', ', ')}[/dim]"
            table.add_row(head, *(figure(name, variant.mean(name)) for name in shown))
        return table
