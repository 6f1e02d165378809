"""Data sets of pictures or clips with captions: a folder of files, or webdataset .tar shards."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .media import CLIPS, PICTURES

__all__ = ["Example", "Folder", "Shards", "find_data"]

_SHARDS = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Example:
    """A picture or clip with its caption.

    Attributes:
        number: number of its sample; it does not depend on which other examples are readable.
        media: path of a file, or the bytes of one. suffix: the file's suffix.
    """

    number: str
    name: str
    caption: str
    media: Path | bytes
    suffix: str


def find_data(path: Path, clips: bool, drawer: str) -> Folder | Shards:
    """Open the data set that ``--data`` names and check that it has at least one usable example.

    Args: clips: True for clips, False for pictures. drawer: name of the pipeline, for messages.
    Raises: ValueError: the path does not exist, cannot be read, or has no example of this kind.
    """
    if path.is_dir():
        shards = sorted(x for x in path.iterdir() if x.name.endswith(_SHARDS))
        folder = Folder(path, clips, drawer)
        if not shards:
            folder.require()
            return folder
        if folder.examples or folder.without:
            raise ValueError(
                f"{path} has both .tar shards ({shards[0].name}, …) and files of examples: move one of them to "
                "another folder"
            )
        return Shards.opened(shards, clips, drawer)
    if "{" in str(path) and not path.exists():
        _require_webdataset()
        from braceexpand import braceexpand

        try:
            shards = [Path(text) for text in braceexpand(str(path))]
        except ValueError as error:
            raise ValueError(f"{path} is not a brace pattern such as shards-{{000..003}}.tar: {error}") from error
        missing = [str(x) for x in shards if not x.is_file()]
        if missing:
            raise ValueError(f"{len(missing)} of the {len(shards)} shards of {path} do not exist, first: {missing[0]}")
        return Shards.opened(shards, clips, drawer)
    if not path.is_file():
        raise ValueError(f"there is no folder or .tar file {path}")
    if not path.name.endswith(_SHARDS):
        raise ValueError(f"--data takes a folder, a .tar file or a brace pattern of .tar files, got {path}")
    return Shards.opened([path], clips, drawer)


def _kind(clips: bool) -> str:
    return "clip" if clips else "picture"


def _wrong_kind(path: Path, others: int, clips: bool, drawer: str) -> str:
    """Error message for a data set of the other kind."""
    return (
        f"{drawer} draws {_kind(clips)}s, and {path} has {others} {_kind(not clips)}s and no {_kind(clips)}: choose "
        "another --pipeline or --data, or use --data-free"
    )


@dataclass
class Folder:
    """Examples of a folder and its subfolders, sorted by path.

    A caption is the text of a ``.txt`` file of the same name, or an entry ``{"file_name": …, "text": …}`` of
    ``metadata.jsonl``.

    Attributes:
        without: number of files without a caption. others: number of files of the other kind (clips or pictures).
        broken: reason by name, for each shard or sample that cannot be read.
    """

    path: Path
    clips: bool
    drawer: str
    examples: list[Example] = field(default_factory=list)
    without: int = 0
    others: int = 0
    broken: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        captions = _metadata(self.path / "metadata.jsonl")
        wanted, other = (CLIPS, PICTURES) if self.clips else (PICTURES, CLIPS)
        for path in sorted(p for p in self.path.rglob("*") if p.suffix.lower() in wanted | other and p.is_file()):
            if path.suffix.lower() in other:
                self.others += 1
                continue
            text = path.with_suffix(".txt")
            caption = captions.get(path.relative_to(self.path).as_posix())
            if caption is None and text.is_file():
                caption = text.read_text(encoding="utf-8", errors="replace")
            if caption is None or not caption.strip():
                self.without += 1
            else:
                number, text_line = f"{len(self.examples):06d}", " ".join(caption.split())
                self.examples.append(Example(number, str(path), text_line, path, path.suffix.lower()))

    @property
    def total(self) -> int | None:
        """Number of examples."""
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def require(self) -> None:
        """Check that there is an example. Raises: ValueError: there is none."""
        if self.examples:
            return
        if self.others and not self.without:
            raise ValueError(_wrong_kind(self.path, self.others, self.clips, self.drawer))
        raise ValueError(
            f"{self.path} has no {_kind(self.clips)} with a caption ({self.without} without): add a .txt file of the "
            "same name beside each, or a metadata.jsonl with file_name and text"
        )


def _metadata(path: Path) -> dict[str, str]:
    """Captions of a ``metadata.jsonl`` by file name; empty if it does not exist.

    Raises: ValueError: a line without file_name and text.
    """
    if not path.is_file():
        return {}
    captions = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            captions[str(entry["file_name"])] = str(entry["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected file_name and text, got {line[:80]!r}") from error
    return captions


@dataclass
class Shards:
    """Examples of webdataset shards, read sequentially.

    A sample has a picture or clip, and its caption in a ``.txt`` or as "text" or "caption" of a ``.json``. The counts
    are those of :class:`Folder`, for the samples read so far.
    """

    paths: list[Path]
    clips: bool
    drawer: str
    without: int = 0
    others: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    total: None = None  # unknown before all shards are read

    @classmethod
    def opened(cls, paths: list[Path], clips: bool, drawer: str) -> Shards:
        """Open shards and read them up to the first usable example, as a check.

        Raises: ValueError: there is no usable example, or webdataset is not installed.
        """
        _require_webdataset()
        shards = cls(paths, clips, drawer)
        if next(iter(shards), None) is not None:
            return shards
        if shards.others:
            raise ValueError(_wrong_kind(paths[0], shards.others, clips, drawer))
        if shards.without or not shards.broken:
            raise ValueError(
                f"{paths[0]}{' and so on' if len(paths) > 1 else ''}: no {_kind(clips)} with a caption "
                f"({shards.without} without): add a .txt, or a .json with text or caption, of the same name"
            )
        first = next(iter(shards.broken.values()))
        raise ValueError(f"none of {len(paths)} shards can be read, first error: {first}")

    def __iter__(self) -> Iterator[Example]:
        from webdataset.tariterators import tarfile_samples

        self.without, self.others, self.broken = 0, 0, {}
        for i, path in enumerate(self.paths):

            def note(error: Exception, path: Path = path) -> bool:
                self.broken.setdefault(str(path), f"{path}: {error.args[0] if error.args else error!r}")
                return True

            if (fault := _shard_fault(path)) is not None:
                self.broken[str(path)] = f"{path} cannot be read to its end: {fault}"
            opened = [{"url": str(path.resolve())}]  # a path without a scheme is never run as a command
            for n, sample in enumerate(tarfile_samples(opened, handler=note)):
                example = self._example(f"{i:05d}-{n:06d}", f"{path}:{sample['__key__']}", sample)
                if example is not None:
                    yield example

    def _example(self, number: str, name: str, sample: dict[str, Any]) -> Example | None:
        wanted, other = (CLIPS, PICTURES) if self.clips else (PICTURES, CLIPS)
        parts = {key: x for key, x in sample.items() if not key.startswith("__")}
        media = [key for key in parts if _suffix(key) in wanted]
        if not media:
            self.others += any(_suffix(key) in other for key in parts)
            return None
        try:
            caption = _caption(parts)
        except ValueError as error:
            self.broken[name] = f"{name}: {error}"
            return None
        if not caption:
            self.without += 1
            return None
        key = min(media, key=lambda key: key.count("."))  # "jpg" before "depth.jpg"
        return Example(number, name, caption, parts[key], _suffix(key))


def _suffix(key: str) -> str:
    return f".{key.rpartition('.')[2]}"


def _caption(parts: dict[str, bytes]) -> str:
    """The caption of a sample; empty if there is none.

    Raises: ValueError: its ``.json`` cannot be read, or is not an object.
    """
    text = parts.get("txt", b"").decode("utf-8", "replace")
    if not text.strip() and "json" in parts:
        try:
            entry = json.loads(parts["json"])
        except ValueError as error:
            raise ValueError(f"its .json cannot be read: {error}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"its .json is a {type(entry).__name__}, expected an object with text or caption")
        text = next((x for x in (entry.get("text"), entry.get("caption")) if isinstance(x, str)), "")
    return " ".join(text.split())


def _shard_fault(path: Path) -> str | None:
    """The reason why a shard is incomplete; None if it is complete.

    Only headers are read. The check is needed because Python's tarfile takes a broken header for the end of the
    archive without an error, so that samples would be lost silently.
    """
    try:
        with tarfile.open(path) as tar:
            while tar.next() is not None:
                pass
            end, file = tar.offset, tar.fileobj
            assert file is not None
            file.seek(end)
            block = file.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        return " ".join(str(error).split())
    return None if len(block) == tarfile.BLOCKSIZE and not any(block) else f"broken at byte {end}"


def _require_webdataset() -> None:
    try:
        import webdataset  # noqa: F401
    except ImportError as error:
        raise ValueError("--data with .tar shards needs webdataset: pip install 'dit-accel[train]'") from error
