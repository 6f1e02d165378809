"""Weights published by the authors of the mechanisms: one module per release, recognised by the keys of its files.

A release's module defines ``NAME``, shown to users; ``MODELS``, the supported denoiser classes;
``recognises(keys) -> bool``; and ``plan(model, file, options) -> Plan``.
"""

from __future__ import annotations

from collections.abc import Collection
from types import ModuleType

from . import clear, fastvideo, linfusion, turbodiffusion
from ._plan import Plan

__all__ = ["RELEASES", "Plan", "recognise"]

RELEASES: tuple[ModuleType, ...] = (clear, turbodiffusion, fastvideo, linfusion)


def recognise(keys: Collection[str]) -> ModuleType | None:
    """Return the release that a file with these keys belongs to; None for an unknown one."""
    return next((release for release in RELEASES if release.recognises(keys)), None)
