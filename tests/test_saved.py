"""Files of save_attention: what is saved comes back, and what does not fit together is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import TINY, run

import dit_accel
from dit_accel import SLAAttnProcessor
from dit_accel.install import installed_layers

SLA = SLAAttnProcessor(critical=0.3, block_q=16, block_kv=8)
QUERY = "transformer_blocks.0.attn.to_q"


def model_and_inputs(family="flux"):
    torch.manual_seed(5)
    return TINY[family](), TINY[family].inputs(TINY[family].size)


def rewrite(path, change):
    """Change the tensors and the configuration of a file in place."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        configuration = json.loads(file.metadata()["dit_accel"])
    change(tensors, configuration)
    save_file(tensors, path, metadata={"dit_accel": json.dumps(configuration)})
    return path


def saved(folder, change=lambda tensors, configuration: None, processor=SLA, family="flux"):
    model = TINY[family]()
    model.set_attn_processor(processor)
    return rewrite(dit_accel.save_attention(model, folder), change)


def refused(model, inputs, path, words, **options):
    """Refused with these words and the path, and the model as it was to the bit."""
    dense, before, layers = run(model, inputs), copy.deepcopy(model.state_dict()), installed_layers(model)
    with pytest.raises(ValueError, match=words) as error:
        dit_accel.load_attention(model, path, **options)
    assert str(path) in str(error.value)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(run(model, inputs), dense) and installed_layers(model) == layers


def lora(up=(32, 2), down=(2, 32), **more):
    """A change that adds the factors of a LoRA; None leaves one out."""
    given = {"lora_A": down, "lora_B": up}
    factors = {f"transformer.{QUERY}.{name}": torch.ones(shape) for name, shape in given.items() if shape}
    return lambda tensors, configuration: tensors.update(factors | more)


@pytest.mark.parametrize(
    ("up", "down", "words"),
    [
        ((32, 2), None, rf"{QUERY}.*\(32, 2\)"),
        (None, (2, 32), rf"{QUERY}.*\(2, 32\)"),
        ((32, 3), (2, 32), r"\(2, 32\) and \(32, 3\)"),
        ((32,), (2, 32), r"\(2, 32\) and \(32,\)"),
    ],
)
def test_lora_factors_that_do_not_pair_are_refused(up, down, words, tmp_path):
    refused(*model_and_inputs(), saved(tmp_path, lora(up, down)), words)


def test_lora_is_added_to_the_weight_of_its_own_file(tmp_path):
    """A file with both: the LoRA was trained on that weight and not on the model's."""
    weight = torch.randn(32, 32)
    path = saved(tmp_path, lora(**{f"transformer.{QUERY}.weight": weight}))
    model, _ = model_and_inputs()
    dit_accel.load_attention(model, path)
    torch.testing.assert_close(model.get_parameter(f"{QUERY}.weight").data, weight + 2.0)
    path = saved(tmp_path, lora(**{f"transformer.{QUERY}.weight": weight[:1]}))
    refused(*model_and_inputs(), path, r"to_q.weight is torch.float32 \(1, 32\), and its LoRA makes a \(32, 32\)")
