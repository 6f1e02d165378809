"""Files of weights: where one is, here or on the hub, and what it holds; tensors are read when they are used."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["FILE_NAME", "Weight", "WeightsFile", "find_weights", "read_weights", "shorten"]

FILE_NAME = "dit_accel.safetensors"
_PICKLED = (".pth", ".pt", ".bin", ".ckpt")
_INDEX = ".safetensors.index.json"
_SUFFIXES = (".safetensors", *_PICKLED)


@dataclass(frozen=True)
class Weight:
    """A tensor in a file: its shape and dtype, and how to read it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Weight:
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def reshape(self, shape: Iterable[int]) -> Weight:
        shape = tuple(shape)
        return Weight(shape, self.dtype, lambda: self.read().reshape(shape))


@dataclass(frozen=True)
class WeightsFile:
    """What a file holds. Where it is in shards, all of them.

    Args:
        path: of the file, or of the index of its shards.
        weights: by key.
        metadata: of a safetensors file.
        config: the ``config.json`` beside it; None where there is none.
    """

    path: Path
    weights: Mapping[str, Weight]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


def find_weights(source: str | os.PathLike[str]) -> Path:
    """The file of weights meant by a path or by a name on the Hugging Face hub.

    Args:
        source: a file; a folder with ``dit_accel.safetensors`` or with one other file of weights, which may be in
            shards with their index; on the hub a repository that has ``dit_accel.safetensors``, or
            ``owner/repository/file``.

    Raises: FileNotFoundError: nothing there; ValueError: a folder with several files.
    """
    path = Path(source)
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that the system cannot have
        return _in_folder(path)
    if os.path.isfile(path):
        return path
    owner, slash, rest = str(source).partition("/")
    name, _, file = rest.partition("/")
    local = os.path.exists(path) or path.is_absolute() or str(source).startswith(".") or not slash
    if local or (not file and name.endswith(_SUFFIXES)) or (file and not file.endswith(_SUFFIXES)):
        raise _nothing_at(path)
    return _from_hub(f"{owner}/{name}", file or FILE_NAME, source)


def _nothing_at(path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"no attention file at {path}; expected a file of weights, a folder with {FILE_NAME}, or a hub id"
    )


def _in_folder(folder: Path) -> Path:
    if (folder / FILE_NAME).is_file():
        return folder / FILE_NAME
    found = sorted(folder.glob(f"*{_INDEX}")) or sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES)
    if not found:
        raise _nothing_at(folder / FILE_NAME)
    if len(found) > 1:
        raise ValueError(
            f"{folder} has several files of weights, {shorten([p.name for p in found])}: give the path of the one meant"
        )
    return found[0]


def _from_hub(repository: str, file: str, source: str | os.PathLike[str]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = Path(hf_hub_download(repository, file))
        if file != FILE_NAME:
            with contextlib.suppress(EntryNotFoundError):  # LinFusion's tells which layers the weights are for
                hf_hub_download(repository, Path(file).with_name("config.json").as_posix())
        return path
    except Exception as error:
        raise FileNotFoundError(
            f"{source} is no file or folder here, and {file} could not be had from the hub: {error}"
        ) from error


def read_weights(path: Path) -> WeightsFile:
    """What the file holds; a pickle may hold nothing but tensors.

    Raises: ValueError: not a whole file of weights, or shards that are not there.
    """
    config = _read_json(path.with_name("config.json"))
    if path.name.endswith(_INDEX):
        return WeightsFile(path, _read_shards(path), {}, config)
    if path.suffix in _PICKLED:
        return WeightsFile(path, _read_pickled(path), {}, config)
    return WeightsFile(path, *_read_safetensors(path), config)


def _read_shards(index: Path) -> dict[str, Weight]:
    """The weights of all shards, which must be beside their index and hold what it lists.

    Raises: ValueError: no index, a shard that is elsewhere or not there, keys that are in no shard or in two.
    """
    names = (_read_json(index) or {}).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} is not an index of safetensors shards: it has no weight_map")
    listed: dict[str, set[str]] = {}
    for key, name in names.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise ValueError(
                f"{index} says that {shorten([key])} is in {shorten([repr(name)])}; expected the name of a safetensors "
                "file in the folder of the index"
            )
        listed.setdefault(name, set()).add(key)
    weights: dict[str, Weight] = {}
    for name, keys in sorted(listed.items()):
        held, _ = _read_safetensors(index.with_name(name))
        lacking, twice = sorted(keys - held.keys()), sorted(held.keys() & weights.keys())
        if lacking or twice:
            raise ValueError(
                f"{index} and its shard {name} differ: the shard lacks {shorten(lacking)}, and another shard has "
                f"{shorten(twice)} as well"
            )
        weights |= held
    return weights


_SHARD = re.compile(r"[^/\\:\0]+\.safetensors")  # no separator of any system: nothing outside of the folder


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    return content if isinstance(content, dict) else None


def _read_safetensors(path: Path) -> tuple[dict[str, Weight], dict[str, str]]:
    try:
        file = safe_open(path, framework="pt", device="cpu")
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        weights = {
            key: Weight(tuple(part.get_shape()), _DTYPES[part.get_dtype()], partial(file.get_tensor, key))
            for key, part in slices.items()
        }
        return weights, file.metadata() or {}
    except KeyError as error:
        raise ValueError(f"{path} holds tensors of dtype {error}, which dit_accel cannot load") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # as safetensors names them


def _read_pickled(path: Path) -> dict[str, Weight]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors: dit_accel loads no code from a file"
        ) from error
    except Exception as error:  # a damaged pickle raises anything: KeyError, IndexError, AttributeError, BadZipFile …
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a whole file of torch.save: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        kind = "a dict of more than tensors" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} holds {kind}; expected a state dict, that is a dict of tensors by their names")
    for key, tensor in content.items():
        if not isinstance(key, str) or not _is_plain(tensor):
            raise ValueError(
                f"{path} holds {key!r}, a {tensor.dtype} tensor on {tensor.device} with the layout {tensor.layout}; "
                "expected names that are text, and dense tensors with data"
            )
    return {key: Weight.of(tensor) for key, tensor in content.items()}


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor can be copied into a parameter: dense, with data, of a dtype that safetensors has as well."""
    dense = tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type == "cpu"
    return dense and tensor.dtype in _DTYPES.values()


def shorten(names: Iterable[str], most: int = 8) -> str:
    """The first few, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest if names else "none"
