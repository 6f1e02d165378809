"""Random damage to the files that load_attention reads, reproducible by seed."""

from __future__ import annotations

import copy
import json
import struct

import torch
from safetensors import safe_open
from safetensors.torch import save_file

STRANGE = [
    None, True, False, 0, 1, -1, 3, 2.5, -0.0, 1e308, float("inf"), float("nan"), 10**20, 10**400, "", "x", "sla",
    "a/../b", "\0", "ⅷ", [], {}, [None], [[]], [1, "a"], {"a": 1}, {"grid": [1]}, "function",
]  # fmt: skip


def deep(levels=20_000):
    return "[" * levels + "]" * levels


def _paths(content, path=()):
    """Yield the paths of all values in nested lists and dicts."""
    yield path
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from _paths(content[key], (*path, key))


def damage_json(content, rng):
    """Return a copy with one to three values replaced, removed, renamed, repeated or nested."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        paths = [path for path in _paths(content) if path]
        if not paths:
            return content
        *outer, key = rng.choice(paths)
        inside = content
        for step in outer:
            inside = inside[step]
        how = rng.randrange(6)
        if how == 0:
            inside[key] = copy.deepcopy(rng.choice(STRANGE))
        elif how == 1:
            del inside[key]
        elif how == 2 and isinstance(inside, dict):
            inside[rng.choice(["", "x", "backend", "layers", "options", f"{key}x"])] = inside.pop(key)
        elif how == 3 and isinstance(inside, list):
            inside.append(copy.deepcopy(inside[key]))
        elif how == 4:
            inside[key] = rng.choice([[inside[key]], {"a": inside[key]}])
        else:
            other = content
            for step in rng.choice(paths):
                other = other[step]
            inside[key] = copy.deepcopy(other)
    return content


def damage_text(text, rng):
    """Return a JSON text with damaged values, cut off, with one other character, or replaced."""
    how = rng.randrange(8)
    if how == 0:
        return text[: rng.randrange(len(text))]
    if how == 1:
        at = rng.randrange(len(text))
        return text[:at] + rng.choice('{}[]",:0x\\ \0') + text[at + 1 :]
    if how == 2:
        return rng.choice(["", "null", "[]", "{}", '"a"', "1", deep(), '{"format": 1, "components": ' + deep() + "}"])
    return json.dumps(damage_json(json.loads(text), rng))


def damage_bytes(data, rng):
    """Return bytes that were changed, cut off, removed or inserted, mostly near the ends, where the headers are."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        end = rng.choice([8, 64, 1000, len(data)])
        at = min(rng.randrange(end), len(data) - 1)
        at = len(data) - 1 - at if rng.random() < 0.4 else at
        how = rng.randrange(5)
        if how == 0:
            del data[max(at, 0) :]
        elif how == 1:
            del data[max(at, 0) : at + rng.choice([1, 4, 100])]
        elif how == 2:
            data[at:at] = rng.randbytes(rng.choice([1, 8]))
        elif data:
            data[max(at, 0)] = rng.choice([0, 255, rng.randrange(256)])
        if not data:
            break
    return bytes(data)


def damage_header(data, rng):
    """Damage the JSON header of a safetensors file and write its correct length."""
    (length,) = struct.unpack("<Q", data[:8])
    header = damage_text(data[8 : 8 + length].decode(), rng).encode("utf-8", "replace")
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def damage_tensors(tensors, rng, more_values=False):
    """Return tensors with keys renamed or missing, other shapes or dtypes; for pickles, also values of other types."""
    tensors = dict(tensors)
    for _ in range(rng.choice([1, 1, 2])):
        if not tensors:
            break
        key = rng.choice(list(tensors))
        value = tensors.pop(key)
        how = rng.randrange(7 if more_values else 5)
        if how == 0:
            tensors[_damage_key(key, rng)] = value
        elif how == 1 and torch.is_tensor(value):
            shape = rng.choice([(), (0,), (1,), (3, 3), (1, 1, 1, 0, 1, 0, 1), (*value.shape, 1), value.shape[1:]])
            tensors[key] = torch.zeros(shape, dtype=value.dtype)
        elif how == 2 and torch.is_tensor(value):
            kinds = [torch.int64, torch.int8, torch.bool, torch.bfloat16, torch.float64, torch.complex64]
            tensors[key] = value.to(rng.choice(kinds[: None if more_values else -1]))
        elif how == 3:
            tensors[key] = value
            tensors[_damage_key(key, rng)] = value.clone() if torch.is_tensor(value) else value
        elif how >= 5:
            tensors[key] = _strange_value(value, rng)
    return tensors


def _damage_key(key, rng):
    parts = key.split(".")
    i = rng.randrange(len(parts))
    parts[i] = rng.choice(["", "x", "0", "9", "-1", "00", "٣", "1" * 5000, "lora_A", "lora_B", "weight", "scale",
                           "int8_weight", parts[i] + "x", *parts])  # fmt: skip
    return ".".join(parts)


def _strange_value(value, rng):
    if not torch.is_tensor(value) or value.is_nested or value.is_meta or value.layout != torch.strided:
        return value  # already unusual
    around = {"a": value}
    around["itself"] = around
    ring = [value]
    ring.append(ring)
    return rng.choice([
        1, None, "x", [value], {"a": {"b": value}}, around, ring, torch.Size([2]), torch.float32, value.to_sparse(),
        value.to("meta"), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), torch.nn.Parameter(value.float()),
        value.float().expand(2, *value.shape), set(), (value, value), torch.zeros(3).to(torch.float8_e8m0fnu),
    ])  # fmt: skip


def read(path):
    """Return the tensors and the metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def write_tensors(path, tensors, metadata=None):
    """Write a safetensors file or a pickle, depending on the suffix."""
    if path.suffix == ".safetensors":
        save_file({key: x.contiguous() for key, x in tensors.items()}, path, metadata)
    else:
        torch.save(tensors, path)
