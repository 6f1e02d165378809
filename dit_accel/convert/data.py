"""Pictures or clips with captions: a folder of files, or a webdataset of .tar shards."""

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
    """number: of its sample, the same whatever else can be read. media: a file, or what is in it; suffix: its kind."""

    number: str
    name: str
    caption: str
    media: Path | bytes
    suffix: str


def find_data(path: Path, clips: bool, drawer: str) -> Folder | Shards:
    """What ``--data`` names, looked into: there is an example of the right kind in it.

    Args: clips: whether clips are wanted, else pictures. drawer: the pipeline's name, for errors.
    Raises: ValueError: there is nothing, or nothing of this kind, or it cannot be read.
    """
    if path.is_dir():
        shards = sorted(x for x in path.iterdir() if x.name.endswith(_SHARDS))
        folder = Folder(path, clips, drawer)
        if not shards:
            folder.require()
            return folder
        if folder.examples or folder.without:
            raise ValueError(
                f"{path} has .tar shards ({shards[0].name}, …) and other files: put one of both into another folder"
            )
        return Shards.opened(shards, clips, drawer)
    if "{" in str(path) and not path.exists():
        _require_webdataset()
        from braceexpand import braceexpand

        try:
            shards = [Path(text) for text in braceexpand(str(path))]
        except ValueError as error:
            raise ValueError(f"{path} is no brace pattern such as shards-{{000..003}}.tar: {error}") from error
        missing = [str(x) for x in shards if not x.is_file()]
        if missing:
            raise ValueError(f"{path} names {len(shards)} shards, of which {len(missing)} are not there: {missing[0]}")
        return Shards.opened(shards, clips, drawer)
    if not path.is_file():
        raise ValueError(f"there is no folder or .tar file {path}")
    if not path.name.endswith(_SHARDS):
        raise ValueError(f"--data takes a folder, a .tar file or a pattern of such, got the file {path}")
    return Shards.opened([path], clips, drawer)


def _kind(clips: bool) -> str:
    return "clip" if clips else "picture"


def _wrong_kind(path: Path, others: int, clips: bool, drawer: str) -> str:
    return (
        f"{drawer} draws {_kind(clips)}s, and {path} has {others} {_kind(not clips)}s and no {_kind(clips)}: choose "
        "another --pipeline or --data, or use --data-free"
    )


@dataclass
class Folder:
    """Files of a folder and below, in the order of their names, with the text of the ``.txt`` file beside or the entry
    ``{"file_name": …, "text": …}`` of a ``metadata.jsonl``.

    without: how many had neither. others: how many were of the other kind. broken: what could not be read, and why.
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
                number, told = f"{len(self.examples):06d}", " ".join(caption.split())
                self.examples.append(Example(number, str(path), told, path, path.suffix.lower()))

    @property
    def total(self) -> int | None:
        """How many examples there are."""
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def require(self) -> None:
        """Raises: ValueError: there is no example."""
        if self.examples:
            return
        if self.others and not self.without:
            raise ValueError(_wrong_kind(self.path, self.others, self.clips, self.drawer))
        raise ValueError(
            f"{self.path} has no {_kind(self.clips)} with a caption ({self.without} without): expected a .txt file "
            "beside each, or a metadata.jsonl with file_name and text"
        )


def _metadata(path: Path) -> dict[str, str]:
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
    """A webdataset, read one example after the other: in each sample a picture or clip, and its caption in a ``.txt``
    or as "text" or "caption" in a ``.json``. Counts as in :class:`Folder`, of what was read so far."""

    paths: list[Path]
    clips: bool
    drawer: str
    without: int = 0
    others: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    total: None = None  # not known before the end

    @classmethod
    def opened(cls, paths: list[Path], clips: bool, drawer: str) -> Shards:
        """Read up to the first example.

        Raises: ValueError: there is none, or webdataset is not installed.
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
                f"({shards.without} without): expected a .txt, or a .json with text or caption, of the same name"
            )
        first = next(iter(shards.broken.values()))
        raise ValueError(f"none of {len(paths)} shards can be read, the first: {first}")

    def __iter__(self) -> Iterator[Example]:
        from webdataset.tariterators import tarfile_samples

        self.without, self.others, self.broken = 0, 0, {}
        for i, path in enumerate(self.paths):

            def note(error: Exception, path: Path = path) -> bool:
                self.broken.setdefault(str(path), f"{path}: {error.args[0] if error.args else error!r}")
                return True

            if (fault := _fault(path)) is not None:
                self.broken[str(path)] = f"{path} cannot be read to its end: {fault}"
            opened = [{"url": str(path.resolve())}]  # no scheme: never a command
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
    """Empty where there is none.

    Raises: ValueError: a ``.json`` that is no object.
    """
    text = parts.get("txt", b"").decode("utf-8", "replace")
    if not text.strip() and "json" in parts:
        try:
            told = json.loads(parts["json"])
        except ValueError as error:
            raise ValueError(f"its .json cannot be read: {error}") from error
        if not isinstance(told, dict):
            raise ValueError(f"its .json is a {type(told).__name__}, expected an object with text or caption")
        text = next((x for x in (told.get("text"), told.get("caption")) if isinstance(x, str)), "")
    return " ".join(text.split())


def _fault(path: Path) -> str | None:
    """What is wrong with a shard; None where it is whole. From its headers alone: a broken one is taken for the end in
    silence by Python's tarfile, so that samples would be lost and nobody told."""
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
