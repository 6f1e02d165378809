"""Select device and precision, and describe machine and versions for reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .version import __version__

__all__ = ["about_machine", "about_versions", "pick_device", "pick_dtype"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_PACKAGES = ("dit-accel", "triton", "diffusers", "transformers", "accelerate", "torchmetrics", "numpy")


def pick_device(name: str | None) -> torch.device:
    """The named device; by default CUDA, else MPS, else the CPU.

    Raises: ValueError: the device is unknown, or missing on this machine or in this torch build.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; give cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name} is not available: torch {torch.__version__} finds {torch.cuda.device_count()} GPU(s)"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device {name} is not available")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {name} is not supported; give cpu, cuda, cuda:1 or mps")
    return device


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named precision; by default bfloat16 on CUDA, else float32.

    Raises: ValueError: the name is not float32, float16 or bfloat16.
    """
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    full = _SHORT.get(name, name).removeprefix("torch.")
    if full not in _DTYPES:
        raise ValueError(f"unknown dtype {name!r}; give {', '.join(_DTYPES)}")
    return _DTYPES[full]


def about_versions() -> dict[str, str | None]:
    """Versions of the packages that results depend on; None for packages that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["dit-accel"] = found["dit-accel"] or __version__  # not installed if run from the source tree
    return found


def about_machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Device, its name, precision, number of threads and platform."""
    return {
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
