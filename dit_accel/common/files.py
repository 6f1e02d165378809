"""Atomic file writes, and folder locks for one writing process at a time."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "CannotWrite", "explain_os_error", "locked", "read_json", "remove_leftovers", "replacing", "require_writable",
    "write_json",
]  # fmt: skip

_FULL = {errno.ENOSPC: "the disk is full", getattr(errno, "EDQUOT", -1): "the disk quota is used up"}
_TEMPORARY = re.compile(r"\..*\.dit-accel-[a-z0-9_]{8}")
_LOCK = ".lock"


class CannotWrite(OSError):
    """A failed write. The message names the file and the reason, and the free space if the disk is full; ``errno`` is
    the system's."""

    def __init__(self, path: Path, reason: OSError) -> None:
        super().__init__(reason.errno, f"cannot write {path}: {_describe(reason, path.parent)}")

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, which replaces ``path`` if the block ends without an error.

    The temporary path has the same file name, in a separate folder: safetensors creates temporary files next to it.

    Raises: CannotWrite: the write failed; replaces the various errors of the libraries.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}.dit-accel-", dir=path.parent))
    except OSError as error:
        raise CannotWrite(path, error) from error
    temporary = folder / path.name
    try:
        with _held(folder / _LOCK):
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # safetensors sets 0600
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except Exception as error:
        reason = _os_error(error, temporary)
        if reason is None:
            raise
        raise CannotWrite(path, reason) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(*folders: Path) -> None:
    """Remove temporary files of killed processes. Files of running processes are locked and stay; on a file system
    without locks all files stay."""
    for folder in folders:
        for path in folder.glob(".*") if folder.is_dir() else ():
            if _TEMPORARY.fullmatch(path.name) and path.is_dir():
                with suppress(OSError), _held(path / _LOCK) as held:
                    if held:
                        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Lock the folder for this process. The system releases the lock if the process is killed.

    Args: warn: called with one line of text if the file system has no locks; the folder is then not protected.
    Raises: ValueError: another process has locked it.
    """
    path = folder / _LOCK
    try:
        handle = _open_lock(path, warn)
    except OSError as error:
        raise CannotWrite(path, error) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Write standard JSON atomically: UTF-8, without NaN and infinity."""
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that a command wrote.

    Raises: ValueError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): restore it, or choose another folder") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a JSON {type(content).__name__}, expected an object: restore it, or choose another folder"
        )
    return content


def require_writable(folder: Path) -> None:
    """Create the folder if it is missing, and check that files can be written into it.

    Raises: ValueError: the folder cannot be created or written into; the message gives the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror or error}") from None


def explain_os_error(error: OSError, folder: Path) -> str:
    """The error in one line. For a full disk, it names the file (or ``folder``, if the error names none) and the free
    space."""
    if isinstance(error, CannotWrite) or error.errno not in _FULL:
        return str(error)
    return str(CannotWrite(Path(error.filename) if error.filename else folder, error))


def _describe(reason: OSError, folder: Path) -> str:
    if reason.errno not in _FULL:
        return reason.strerror or str(reason)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    space = shutil.disk_usage(existing)
    return f"{_FULL[reason.errno]} ({_size(space.free)} free of {_size(space.total)} at {existing}): free some space"


def _size(n: int) -> str:
    power = min(4, (len(str(n)) - 1) // 3)
    return f"{n / 1000**power:.4g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _os_error(error: BaseException, temporary: Path) -> OSError | None:
    """The system error that caused a library's error; None if the error is not a failed write.

    Some libraries only mention the system error in their message, and some give no reason at all.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    found = [link for link in chain if isinstance(link, OSError) and link.errno is not None]
    mentioned = re.search(r"\(os error (\d+)\)", str(error))  # safetensors' format
    if mentioned:
        found.append(OSError(int(mentioned[1]), os.strerror(int(mentioned[1]))))
    full = next((reason for reason in found if reason.errno in _FULL), None)
    if full is None and isinstance(error, (OSError, RuntimeError)):  # torch and ffmpeg give no reason: retry a write
        try:
            with temporary.open("ab") as file:
                file.write(bytes(1 << 20))
        except OSError as reason:
            found.insert(0, reason)
    return full or next(iter(found), None)


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Lock a file, created if it is missing, and yield whether the lock was acquired."""
    if fcntl is None:  # Windows does not remove open files
        yield False
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT)  # NFS locks only files that are open for writing
    try:
        yield _try_lock(handle) is True
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool | None:
    """Try to lock; return whether the lock was acquired, or None if the system has no locks.

    The lock is held until the handle is closed.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def _open_lock(path: Path, warn: Callable[[str], None]) -> int:
    """Open and lock the file, and write the process number and host into it. Returns: the handle."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            acquired = _try_lock(handle)
            if acquired is False:
                holder = os.read(handle, 1000).decode(errors="replace") or "another process"
                raise ValueError(f"{holder} is writing into {path.parent}: wait until it ends, or choose another --out")
            if acquired is None:
                warn(f"{path.parent} is on a file system without locks: run only one process in it at a time")
            if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):  # else its holder just removed it
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
