"""Weights files: find them locally or on the hub, list their tensors; the data is read when a tensor is used."""

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
    """Tensor in a file: shape, dtype, and the function that reads its data."""

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
    """Contents of a weights file, or of all its shards.

    Args:
        path: path of the file, or of the index of its shards.
        weights: tensors by key.
        metadata: metadata of a safetensors file.
        config: contents of the ``config.json`` in the same folder; None if there is none.
    """

    path: Path
    weights: Mapping[str, Weight]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


def find_weights(source: str | os.PathLike[str]) -> Path:
    """Return the path of the weights file for a local path or a name on the Hugging Face hub.

    Args:
        source: a file; a folder with ``dit_accel.safetensors`` or exactly one other weights file, which may be sharded
            with an index; on the hub, a repository with ``dit_accel.safetensors``, or ``owner/repository/file``.

    Raises: FileNotFoundError: no such file; ValueError: a folder with several files.
    """
    path = Path(source)
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that the system does not allow
        return _in_folder(path)
    if os.path.isfile(path):
        return path
    owner, slash, rest = str(source).partition("/")
    name, _, file = rest.partition("/")
    local = os.path.exists(path) or path.is_absolute() or str(source).startswith(".") or not slash
    if local or (not file and name.endswith(_SUFFIXES)) or (file and not file.endswith(_SUFFIXES)):
        raise _no_file_at(path)
    return _from_hub(f"{owner}/{name}", file or FILE_NAME, source)


def _no_file_at(path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"no attention file at {path}; expected a weights file, a folder with {FILE_NAME}, or a hub id"
    )


def _in_folder(folder: Path) -> Path:
    if (folder / FILE_NAME).is_file():
        return folder / FILE_NAME
    found = sorted(folder.glob(f"*{_INDEX}")) or sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES)
    if not found:
        raise _no_file_at(folder / FILE_NAME)
    if len(found) > 1:
        raise ValueError(
            f"{folder} has several weights files, {shorten([p.name for p in found])}: give the path of one of them"
        )
    return found[0]


def _from_hub(repository: str, file: str, source: str | os.PathLike[str]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = Path(hf_hub_download(repository, file))
        if file != FILE_NAME:
            with contextlib.suppress(EntryNotFoundError):  # LinFusion's maps weights to layers
                hf_hub_download(repository, Path(file).with_name("config.json").as_posix())
        return path
    except Exception as error:
        raise FileNotFoundError(
            f"{source} is not a local file or folder, and {file} could not be downloaded from the hub: {error}"
        ) from error


def read_weights(path: Path) -> WeightsFile:
    """List the tensors of a file; a pickle may hold only tensors.

    Raises: ValueError: an incomplete or damaged weights file, or missing shards.
    """
    config = _read_json(path.with_name("config.json"))
    if path.name.endswith(_INDEX):
        return WeightsFile(path, _read_shards(path), {}, config)
    if path.suffix in _PICKLED:
        return WeightsFile(path, _read_pickled(path), {}, config)
    return WeightsFile(path, *_read_safetensors(path), config)


def _read_shards(index: Path) -> dict[str, Weight]:
    """List the tensors of all shards; they must be in the folder of the index and match its entries.

    Raises: ValueError: not an index, a shard that is missing or in another folder, keys in no shard or in two.
    """
    names = (_read_json(index) or {}).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} is not an index of safetensors shards: it has no weight_map")
    listed: dict[str, set[str]] = {}
    for key, name in names.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise ValueError(
                f"{index} maps {shorten([key])} to {shorten([repr(name)])}; expected the name of a safetensors "
                "file in the folder of the index"
            )
        listed.setdefault(name, set()).add(key)
    weights: dict[str, Weight] = {}
    for name, keys in sorted(listed.items()):
        held, _ = _read_safetensors(index.with_name(name))
        missing, twice = sorted(keys - held.keys()), sorted(held.keys() & weights.keys())
        if missing or twice:
            raise ValueError(
                f"{index} and its shard {name} do not match: missing in the shard {shorten(missing)}; also in another "
                f"shard {shorten(twice)}"
            )
        weights |= held
    return weights


_SHARD = re.compile(r"[^/\\:\0]+\.safetensors")  # no path separator of any system, so that names stay in the folder


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
        raise ValueError(f"{path} has tensors of dtype {error}, which dit_accel cannot load") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


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
            f"{path} is damaged or has objects other than tensors, which dit_accel does not load: they can run code"
        ) from error
    except Exception as error:  # a damaged pickle raises any of KeyError, IndexError, AttributeError, …
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a complete file of torch.save: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        kind = "a dict with values other than tensors" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} has {kind}; expected a state dict, that is a dict from names to tensors")
    for key, tensor in content.items():
        if not isinstance(key, str) or not _is_copyable(tensor):
            raise ValueError(
                f"{path} has {key!r}, a {tensor.dtype} tensor on {tensor.device} with the layout {tensor.layout}; "
                "expected names that are strings, and dense tensors with data"
            )
    return {key: Weight.of(tensor) for key, tensor in content.items()}


def _is_copyable(tensor: Tensor) -> bool:
    """Return whether the tensor can be copied into a parameter: dense, with data, in a dtype of safetensors."""
    dense = tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type == "cpu"
    return dense and tensor.dtype in _DTYPES.values()


def shorten(names: Iterable[str], limit: int = 8) -> str:
    """Join at most ``limit`` names, and append the number of the others; "none" if there are no names."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest if names else "none"
