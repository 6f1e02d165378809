"""Selection of a mechanism's backend: plain torch, Triton kernels, or torch's FlexAttention."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from difflib import get_close_matches
from typing import Protocol

import torch

__all__ = ["BACKENDS", "ENV_VARIABLE", "check_backend", "resolve"]

ENV_VARIABLE = "DIT_ACCEL_BACKEND"
BACKENDS = ("torch", "triton", "flex")


class Mechanism(Protocol):
    """What is needed of a processor class."""

    name: str
    backends: tuple[str, ...]


def check_backend(backend: str | None, source: str = "backend") -> None:
    """Check the name of a backend; None is valid.

    Raises: ValueError: an unknown name; the message suggests the nearest and lists all. TypeError: not a string.
    """
    if backend is None or backend in BACKENDS:
        return
    if not isinstance(backend, str):
        raise TypeError(f"{source} must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    close = get_close_matches(backend.lower(), BACKENDS, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ValueError(f"unknown {source} {backend!r}{hint} Available: {', '.join(BACKENDS)}")


def resolve(backend: str | None, device: torch.device, mechanism: Mechanism) -> str:
    """Resolve the backend of a call: the argument, else ``DIT_ACCEL_BACKEND``, else Triton if the tensors are on a GPU
    and the mechanism supports it, else torch. A requested backend that is not available raises; there is no fallback.

    Args:
        backend: "torch", "triton", "flex" or None.
        device: device of the tensors.
        mechanism: its processor class.
    Returns: "torch", "triton" or "flex".
    Raises:
        ValueError: an unknown name, or a backend that the mechanism or the device does not support.
        RuntimeError: Triton is selected, but the package or a C compiler is missing.
    """
    requested, source = backend, "backend"
    if requested is None:
        requested, source = os.environ.get(ENV_VARIABLE) or None, ENV_VARIABLE  # an empty value counts as unset
    check_backend(requested, source)
    supported = mechanism.backends
    if requested is None:
        requested = "triton" if device.type == "cuda" and "triton" in supported else "torch"
    elif requested not in supported:
        raise ValueError(
            f"{source}={requested}: {mechanism.name} does not support this backend; available: {', '.join(supported)}. "
            f'Pass backend="{supported[0]}"'
        )
    if requested == "triton":
        _require_triton(device, source)
    return requested


def _require_triton(device: torch.device, source: str) -> None:
    """Check that Triton kernels can run.

    Raises: ValueError: the device cannot run them. RuntimeError: triton or a C compiler is missing.
    """
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in (
        "1",
        "true",
        "yes",
        "on",
        "y",
    )  # the values that Triton accepts
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        raise ValueError(
            f"{source}=triton needs a GPU, got tensors on {device}: use the torch backend "
            "(on the CPU, Triton kernels run only in its interpreter, for tests: TRITON_INTERPRET=1)"
        )
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            f"the Triton kernels need the package triton, which is not installed: pip install triton, or pass "
            f'backend="torch" ({ENV_VARIABLE}=torch)'
        )
    if not interpreted and not _c_compiler():
        raise RuntimeError(
            f"Triton needs a C compiler and found none (CC, gcc, clang): install gcc or set CC, or pass "
            f'backend="torch" ({ENV_VARIABLE}=torch)'
        )


def _c_compiler() -> bool:
    """Whether the C compiler that Triton calls for its launchers is installed; Triton for Windows includes one."""
    if sys.platform == "win32":
        return True
    named = os.environ.get("CC")
    if named is not None:
        return bool(named.split()) and shutil.which(named.split()[0]) is not None
    return any(shutil.which(name) for name in ("gcc", "clang"))
