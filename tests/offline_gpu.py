"""Offline compilation of Triton kernels: compiles what a launch would compile, for any target, on any machine."""

from __future__ import annotations

import re
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _Driver:
    """The part of a driver that compilation needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def is_active(self) -> bool:
        return True


@contextmanager
def target(name: str):
    """Compile kernels for this target inside the context; they cannot be launched."""
    old = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(TARGETS[name]))
    try:
        yield
    finally:
        triton.runtime.driver._active = old


def resources(kernel) -> dict[str, int]:
    """Registers per thread, spilled bytes and shared memory of a kernel built for an NVIDIA GPU."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {**found, "shared": kernel.metadata.shared}
