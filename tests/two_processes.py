"""Two distributed processes on this machine: a script imports torch and diffusers once, then forks both."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any


def free_ports(count: int) -> list[str]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(each.getsockname()[1]) for each in held]
    for each in held:
        each.close()
    return ports


def start(script: str, *arguments: Any, **environment: str) -> subprocess.Popen[bytes]:
    """Start a script that calls :func:`fork_both`."""
    return subprocess.Popen(
        [sys.executable, script, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, start_new_session=True,
    )  # fmt: skip


def finish(script: subprocess.Popen[bytes]) -> None:
    """Wait for a started script and check that it succeeded."""
    try:
        output, _ = script.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(script.pid, signal.SIGKILL)  # also its processes
        output, _ = script.communicate()
    assert script.returncode == 0, output[-3000:].decode()


def fork_both(work: Callable[[], int | None], status: int = 0, **environment: str) -> None:
    """Fork two processes of ranks 0 and 1 and wait until ``work`` has ended in both.

    Raises: RuntimeError: the exit status of one is not ``status``.
    """
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1)[0], **environment}
    children = []
    for rank in "01":
        child = os.fork()
        if not child:
            os.environ.update(world, RANK=rank, LOCAL_RANK=rank)
            sys.exit(work())
        children.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if ended != [status, status]:
        raise RuntimeError(f"expected exit status {status}, got {ended}")
