"""Files that are written atomically, and folders that one process at a time writes into."""

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
    """A file that could not be written. The message names it and the reason, and for a full disk the space that is
    left; ``errno`` is the system's."""

    def __init__(self, path: Path, reason: OSError) -> None:
        super().__init__(reason.errno, f"cannot write {path}: {_describe(reason, path.parent)}")

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path of the same name that takes the place of ``path`` if the block ends without an error. It is
    in a folder of its own, since safetensors makes temporary files beside it.

    Raises: CannotWrite: whatever error a library raises for it.
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
            temporary.chmod(0o666 & ~umask)  # safetensors gives 0600
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
    """Remove what killed processes were writing. What a living process writes is locked and stays; on a file system
    without locks all stays."""
    for folder in folders:
        for path in folder.glob(".*") if folder.is_dir() else ():
            if _TEMPORARY.fullmatch(path.name) and path.is_dir():
                with suppress(OSError), _held(path / _LOCK) as held:
                    if held:
                        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(folder: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder for this process; the lock of a killed process is no hindrance.

    Args: warn: called with a line of text if the file system has no locks; the folder is then not protected.
    Raises: ValueError: another process holds it.
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
    """JSON that every reader takes: UTF-8, no NaN or infinity."""
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a command wrote.

    Raises: ValueError: it is damaged.
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
    """Make the folder if need be, and try to write in it.

    Raises: ValueError: it cannot be made or written in, and why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror or error}") from None


def explain_os_error(error: OSError, folder: Path) -> str:
    """The error in one line; one of a full disk names the file, else the folder, and the space that is left."""
    if isinstance(error, CannotWrite) or error.errno not in _FULL:
        return str(error)
    return str(CannotWrite(Path(error.filename) if error.filename else folder, error))


def _describe(reason: OSError, folder: Path) -> str:
    if reason.errno not in _FULL:
        return reason.strerror or str(reason)
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    space = shutil.disk_usage(there)
    return f"{_FULL[reason.errno]} ({_size(space.free)} free of {_size(space.total)} at {there}): free some space"


def _size(n: int) -> str:
    power = min(4, (len(str(n)) - 1) // 3)
    return f"{n / 1000**power:.4g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _os_error(error: BaseException, temporary: Path) -> OSError | None:
    """The system's error behind a library's, which may only mention it, or not even that; None: it is no failure to
    write."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    found = [link for link in chain if isinstance(link, OSError) and link.errno is not None]
    told = re.search(r"\(os error (\d+)\)", str(error))  # safetensors'
    if told:
        found.append(OSError(int(told[1]), os.strerror(int(told[1]))))
    full = next((reason for reason in found if reason.errno in _FULL), None)
    if full is None and isinstance(error, (OSError, RuntimeError)):  # torch's and ffmpeg's give no reason: try again
        try:
            with temporary.open("ab") as file:
                file.write(bytes(1 << 20))
        except OSError as reason:
            found.insert(0, reason)
    return full or next(iter(found), None)


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Lock a file, made if need be. Gives: whether that was possible."""
    if fcntl is None:  # Windows does not remove a file that is open
        yield False
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT)  # NFS locks only what is open for writing
    try:
        yield _lock(handle) is True
    finally:
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Whether the lock was taken, which is kept until the handle is closed; None: there are no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def _open_lock(path: Path, warn: Callable[[str], None]) -> int:
    """Handle of the file, locked, with this process' number and host in it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            taken = _lock(handle)
            if taken is False:
                holder = os.read(handle, 1000).decode(errors="replace") or "another process"
                raise ValueError(f"{holder} is writing into {path.parent}: wait until it ends, or choose another --out")
            if taken is None:
                warn(f"{path.parent} is on a file system without locks: let no other process write into it meanwhile")
            if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):  # else it was given back meanwhile
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
