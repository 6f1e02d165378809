"""Which implementation computes a mechanism: torch everywhere, Triton kernels on a GPU, or torch's FlexAttention."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from difflib import get_close_matches

import torch

__all__ = ["BACKENDS", "BUILT", "VARIABLE", "check_backend", "resolve"]

VARIABLE = "DIT_ACCEL_BACKEND"
BACKENDS = ("torch", "triton", "flex")
BUILT = {
    "sla": BACKENDS,
    "clear": BACKENDS,
    "gna": BACKENDS,
    "llsa": ("torch", "triton"),
    "linfusion": ("torch",),
}  # the backends a mechanism has


def check_backend(backend: str | None, source: str = "backend") -> None:
    """Raises: ValueError: an unknown name, with the nearest right one and all; TypeError: not a name."""
    if backend is None or backend in BACKENDS:
        return
    if not isinstance(backend, str):
        raise TypeError(f"{source} must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    close = get_close_matches(backend.lower(), BACKENDS, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    raise ValueError(f"unknown {source} {backend!r}{hint} There are: {', '.join(BACKENDS)}")


def resolve(backend: str | None, device: torch.device, mechanism: str) -> str:
    """The backend that a call takes: the argument, else the environment's ``DIT_ACCEL_BACKEND``, else Triton on a GPU
    where the mechanism has it, else torch. What was asked for and cannot be had raises; it is never replaced.

    Args:
        backend: "torch", "triton", "flex" or None.
        device: where the tensors lie.
        mechanism: "sla", "clear", "llsa", "gna" or "linfusion".
    Returns: "torch", "triton" or "flex".
    Raises:
        ValueError: an unknown name, or a backend that this mechanism or this device does not have.
        RuntimeError: Triton is chosen and the package or a C compiler is missing.
    """
    asked, source = backend, "backend"
    if asked is None:
        asked, source = os.environ.get(VARIABLE) or None, VARIABLE  # set but empty is not set
    check_backend(asked, source)
    built = BUILT[mechanism]
    if asked is None:
        asked = "triton" if device.type == "cuda" and "triton" in built else "torch"
    elif asked not in built:
        raise ValueError(
            f"{source}={asked}: {mechanism} has no such backend yet; it has: {', '.join(built)}. "
            f'Give backend="{built[0]}" for it'
        )
    if asked == "triton":
        _require_triton(device, source)
    return asked


def _require_triton(device: torch.device, source: str) -> None:
    """Raises: ValueError: a device that Triton's kernels do not run on; RuntimeError: what they need is not there."""
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in (
        "1",
        "true",
        "yes",
        "on",
        "y",
    )  # as Triton reads it
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        raise ValueError(
            f"{source}=triton needs a GPU, got tensors on {device}: use torch there "
            "(on the CPU Triton's kernels run only for tests, in its interpreter: TRITON_INTERPRET=1)"
        )
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            f"the Triton kernels need the package triton, which is not installed: pip install triton, or choose "
            f'backend="torch" ({VARIABLE}=torch)'
        )
    if not interpreted and not _c_compiler():
        raise RuntimeError(
            f"Triton needs a C compiler and found none (CC, gcc, clang): install gcc or set CC, or choose "
            f'backend="torch" ({VARIABLE}=torch)'
        )


def _c_compiler() -> bool:
    """Whether the compiler that Triton will call for its launchers is there; Triton for Windows brings its own."""
    if sys.platform == "win32":
        return True
    named = os.environ.get("CC")
    if named is not None:
        return bool(named.split()) and shutil.which(named.split()[0]) is not None
    return any(shutil.which(name) for name in ("gcc", "clang"))
