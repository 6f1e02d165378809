"""Weights that the authors of the mechanisms have published: one short file a release, found by looking at its keys.

A release's file has ``NAME`` for people; ``MODELS``, the denoiser classes that it is for; ``recognises(keys) -> bool``;
and ``plan(model, file, options) -> Plan``.
"""

from __future__ import annotations

from collections.abc import Collection
from types import ModuleType

from . import clear, fastvideo, linfusion, turbodiffusion
from ._plan import Plan

__all__ = ["RELEASES", "Plan", "recognise"]

RELEASES: tuple[ModuleType, ...] = (clear, turbodiffusion, fastvideo, linfusion)


def recognise(keys: Collection[str]) -> ModuleType | None:
    """The release that a file with these keys is of; None if of none that is known."""
    return next((release for release in RELEASES if release.recognises(keys)), None)
