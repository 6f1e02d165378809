"""Damaged files: each one loads, or raises a ValueError with its path and leaves the model unchanged bitwise."""

from __future__ import annotations

import json
import random

import pytest
import torch
from damage import damage_bytes, damage_header, damage_tensors, damage_text, deep, read, write_tensors
from published_files import (
    clear_tensors,
    draw,
    fastvideo_name,
    in_shards,
    linfusion_shapes,
    modules_list,
    self_attention,
    wan_shapes,
    wan_size,
    write,
)
from safetensors.torch import save_file
from tiny import TINY

import dit_accel
from dit_accel import CLEARAttnProcessor, GNAAttnProcessor, SLAAttnProcessor, TokenLayout
from dit_accel.install.installation import installation_of


def own_file(folder):
    """Write a file with three mechanisms, a user-defined layout, a weight of the model itself and a LoRA."""
    model = TINY["flux"]()
    dit_accel.set_attn_processor(model, SLAAttnProcessor(critical=0.3, block_q=16, block_kv=8, scale=0.3))
    dit_accel.set_attn_processor(model, CLEARAttnProcessor(radius=(2.5, 3), down_factor=2), layers="single")
    dit_accel.set_attn_processor(
        model, GNAAttnProcessor(window=(3, 5)), layers=r"single.*\.1\.", layout=TokenLayout((70,), before=7)
    )
    path = dit_accel.save_attention(model, folder)
    tensors, metadata = read(path)
    name = "transformer.transformer_blocks.0.attn"
    tensors |= {f"{name}.to_q.lora_A": torch.ones(2, 32), f"{name}.to_q.lora_B": torch.ones(32, 2)}
    write_tensors(path, tensors | {f"{name}.to_k.weight": torch.ones(32, 32)}, metadata)
    return path


def turbo_tensors(quantized):
    return draw(wan_shapes(**wan_size(TINY["wan"]()), quantized=quantized))


def linfusion_file(folder):
    names, widths, heads = self_attention(TINY["sd15"]())
    return write(folder / "model.safetensors", draw(linfusion_shapes(widths)), modules_list(names, widths, heads))


FILES = {
    "own": ("flux", own_file),
    "clear": ("flux", lambda folder: write(folder / "clear_local_3_down_2.safetensors", clear_tensors(2))),
    "clear-pth": ("flux", lambda folder: write(folder / "clear_local_3.pth", clear_tensors())),
    "clear-shards": ("flux", lambda folder: in_shards(folder / "clear_local_3", clear_tensors())),
    "turbo": ("wan", lambda folder: write(folder / "turbo.pth", turbo_tensors(False))),
    "turbo-quant": ("wan", lambda folder: write(folder / "turbo.pth", turbo_tensors(True))),
    "fastvideo": (
        "wan",
        lambda folder: write(
            folder / "fast.safetensors", {fastvideo_name(key): x for key, x in turbo_tensors(False).items()}
        ),
    ),
    "linfusion": ("sd15", linfusion_file),
}


class Subject:
    """Valid file and its model, which must stay unchanged if a damaged copy is refused."""

    def __init__(self, kind, folder):
        family, make = FILES[kind]
        self.model = TINY[family]()
        made = make(folder)
        self.folder = made if made.is_dir() else made.parent
        self.source = made
        self.files = {path: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}
        self.main = next((p for p in self.files if p.name.endswith("index.json")), made)
        self.values = {key: value.clone() for key, value in self.model.state_dict().items()}
        dit_accel.load_attention(self.model, self.source)
        dit_accel.reset_attn_processor(self.model)

    def damage(self, rng):
        """Write a damaged copy of the file."""
        for path, data in self.files.items():
            path.write_bytes(data)
        path = rng.choice(sorted(self.files) + [self.main] * len(self.files))
        data, how = self.files[path], rng.randrange(4)
        if path.suffix == ".json":
            damaged = damage_text(data.decode(), rng).encode("utf-8", "replace") if how else damage_bytes(data, rng)
            path.write_bytes(damaged)
        elif how == 0:
            path.write_bytes(damage_bytes(data, rng))
        elif path.suffix == ".safetensors":
            tensors, metadata = read(path)
            if how == 1:
                path.write_bytes(damage_header(data, rng))
            elif how == 2 and metadata and "dit_accel" in metadata:
                write_tensors(path, tensors, metadata | {"dit_accel": damage_text(metadata["dit_accel"], rng)})
            else:
                write_tensors(path, damage_tensors(tensors, rng), metadata)
        else:
            tensors = damage_tensors(torch.load(path), rng, more_values=True)
            torch.save(tensors, path, _use_new_zipfile_serialization=rng.random() < 0.5)
            if how == 1:
                path.write_bytes(damage_bytes(path.read_bytes(), rng))

    def check(self):
        """Load the damaged copy; return a text on what went wrong or None, and whether the copy was refused."""
        wrong, refused = None, True
        try:
            dit_accel.load_attention(self.model, self.source)
            refused = False
        except (ValueError, FileNotFoundError) as error:
            if str(self.folder) not in str(error):
                wrong = f"no path in the message: {error!r}"
        except BaseException as error:
            wrong = f"{type(error).__name__}: {error}"
        left = installation_of(self.model)
        dit_accel.reset_attn_processor(self.model)
        after = self.model.state_dict()
        same = list(after) == list(self.values) and all(torch.equal(after[key], x) for key, x in self.values.items())
        if refused and left is not None:
            wrong = f"something is still installed; {wrong}"
        return wrong if same else f"the model has changed; {wrong}", refused


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_load_or_are_refused(kind, tmp_path, count=15):
    subject = Subject(kind, tmp_path)
    found, refusals = {}, 0
    for seed in range(count):
        subject.damage(random.Random(f"{kind} {seed}"))
        wrong, refused = subject.check()
        refusals += refused
        if wrong is not None:
            found[seed] = wrong
    assert not found, json.dumps(found, indent=1)
    assert refusals > count // 3


def refused(source, words, family="flux"):
    with pytest.raises(ValueError, match=words) as error:
        dit_accel.load_attention(TINY[family](), source)
    assert str(source) in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["../out.safetensors", "/tmp/out.safetensors", "a/out.safetensors", "..", "a\\b.safetensors", "c:b.safetensors",
     "", "out.pth", "a\0.safetensors", 3, None, True, ["out.safetensors"], {"out": 1}],
)  # fmt: skip
def test_shards_outside_of_the_folder_are_refused(name, tmp_path):
    folder = in_shards(tmp_path / "inside", clear_tensors())
    save_file(clear_tensors(), tmp_path / "out.safetensors")
    index = next(folder.glob("*.index.json"))
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"transformer_blocks.0.attn.to_q.bias": name}}))
    refused(index, r"to_q\.bias to .*; expected the name of a safetensors file in the folder of the index")


def test_index_must_match_its_shards(tmp_path):
    folder = in_shards(tmp_path / "clear_local_3", clear_tensors())
    index = next(folder.glob("*.index.json"))
    content = json.loads(index.read_text())
    first, second, _ = sorted(set(content["weight_map"].values()))
    key = next(key for key, name in content["weight_map"].items() if name == first)
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {key: second}}))
    refused(index, rf"{second} do not match: missing in the shard {key}; also in another")
    index.write_text(json.dumps(content))
    tensors, metadata = read(folder / second)
    save_file(tensors | {key: torch.ones(32, 32)}, folder / second, metadata)
    refused(index, rf"{second} do not match: missing in the shard none; also in another shard {key}")
    index.write_text('{"weight_map": ' + deep() + "}")
    refused(index, "is not a JSON file: maximum recursion depth")


KEY = "transformer_blocks.0.attn.to_q.weight"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda x: x.to("meta"), "on meta"),
        (lambda x: x.to_sparse(), "sparse_coo"),
        (lambda x: torch.nested.nested_tensor([x, x]), "dense tensors with data"),
        (lambda x: torch.zeros(32, 32, dtype=torch.uint8).view(torch.float8_e8m0fnu), "float8_e8m0fnu"),
        (lambda x: x.to(torch.complex64), "complex64"),
    ],
)
def test_tensors_that_cannot_be_copied_are_refused(value, words, tmp_path):
    path = tmp_path / "clear_local_3.pth"
    torch.save(clear_tensors() | {KEY: value(torch.ones(32, 32))}, path)
    refused(path, f"{KEY}.*{words}")


def test_keys_that_are_not_strings_are_refused(tmp_path):
    torch.save(clear_tensors() | {1: torch.ones(2)}, tmp_path / "clear_local_3.pth")
    refused(tmp_path / "clear_local_3.pth", "has 1, a torch.float32 tensor.*names that are strings")


def test_malformed_quantized_weights_are_refused(tmp_path):
    tensors = turbo_tensors(True)
    ones = {"patch_embedding.int8_weight": torch.ones(32, 4, 1, 2, 2, dtype=torch.int8)}
    del tensors["patch_embedding.weight"]
    path = write(tmp_path / "turbo.pth", tensors | ones | {"patch_embedding.scale": torch.ones(1, 1, 1, 1, 1)})
    refused(path, r"patch_embedding.int8_weight is torch.int8 \(32, 4, 1, 2, 2\).*expected an int8 matrix", "wan")
    name = "blocks.0.ffn.0"
    path = write(tmp_path / "turbo.pth", turbo_tensors(True) | {f"{name}.weight": torch.ones(48, 32)})
    refused(path, rf"has {name}.weight twice, as itself and as {name}.int8_weight", "wan")
    path = write(tmp_path / "turbo.pth", turbo_tensors(True) | {f"{name}.scale": torch.ones(1, 1).int()})
    refused(path, rf"{name}.int8_weight is .*a floating-point {name}.scale of shape", "wan")
