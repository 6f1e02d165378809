"""Files of save_attention: round trips, and refusal of invalid files."""

from __future__ import annotations

import copy
import json
import math
import pickle
import tempfile
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from published_files import clear_tensors, write
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import TINY, run

import dit_accel
from dit_accel import CLEARAttnProcessor, GNAAttnProcessor, LLSAAttnProcessor, SLAAttnProcessor, TokenLayout
from dit_accel.common.attention_group import self_attention_layers
from dit_accel.install.installation import installed_layers

GNA = GNAAttnProcessor(window=3)
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
    """Check that loading raises with these words and the path, and that the model is unchanged bitwise."""
    dense, before, layers = run(model, inputs), copy.deepcopy(model.state_dict()), installed_layers(model)
    with pytest.raises(ValueError, match=words) as error:
        dit_accel.load_attention(model, path, **options)
    assert str(path) in str(error.value)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(run(model, inputs), dense) and installed_layers(model) == layers


def lora(up=(32, 2), down=(2, 32), **more):
    """Return a change that adds the factors of a LoRA; None omits one."""
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
def test_unpaired_lora_factors_are_refused(up, down, words, tmp_path):
    refused(*model_and_inputs(), saved(tmp_path, lora(up, down)), words)


def test_lora_is_added_to_the_weight_in_its_file(tmp_path):
    """If a file has both, the LoRA was trained on the weight in the file, not on the model's."""
    weight = torch.randn(32, 32)
    path = saved(tmp_path, lora(**{f"transformer.{QUERY}.weight": weight}))
    model, _ = model_and_inputs()
    dit_accel.load_attention(model, path)
    torch.testing.assert_close(model.get_parameter(f"{QUERY}.weight").data, weight + 2.0)
    path = saved(tmp_path, lora(**{f"transformer.{QUERY}.weight": weight[:1]}))
    refused(*model_and_inputs(), path, r"to_q.weight is torch.float32 \(1, 32\), but its LoRA has shape \(32, 32\)")


def pixart():
    """Return a model of a class without a built-in token layout."""
    torch.manual_seed(3)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=16, norm_num_groups=4,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(model.proj_out.weight)
    return model


PIXART = {
    "hidden_states": torch.linspace(-1, 1, 384).reshape(1, 4, 8, 12),
    "timestep": torch.tensor([5]),
    "encoder_hidden_states": torch.linspace(-1, 1, 96).reshape(1, 6, 16),
    "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
}
GRID = TokenLayout((4, 6))


def randomise(model):
    for layer in installed_layers(model).values():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)


def test_user_layout_is_saved_and_loaded(tmp_path):
    model = pixart()
    dense = run(model, PIXART)
    dit_accel.set_attn_processor(model, SLAAttnProcessor(critical=0.3, block_q=4, block_kv=4, tile_order=True),
                                 layout=GRID, layers=r"blocks\.[02]")  # fmt: skip
    randomise(model)
    expected = run(model, PIXART)
    path = dit_accel.save_attention(model, tmp_path)
    fresh = pixart()
    dit_accel.load_attention(fresh, path)
    assert torch.equal(run(fresh, PIXART), expected) and not torch.equal(expected, dense)
    assert "4×6" in dit_accel.describe(fresh) and "1 self-attention layers" in dit_accel.describe(fresh)
    again = pixart()
    dit_accel.load_attention(again, dit_accel.save_attention(fresh, tmp_path / "again"))
    assert torch.equal(run(again, PIXART), expected)
    other = pixart()
    dit_accel.load_attention(other, path, layout=TokenLayout((6, 4)))
    assert not torch.equal(run(other, PIXART), expected) and "6×4" in dit_accel.describe(other)


def test_each_layer_keeps_its_layout_and_no_backend_is_saved(tmp_path):
    model, grids = pixart(), {"transformer_blocks.0.attn1": GRID, "transformer_blocks.2.attn1": TokenLayout((6, 4))}
    for name, layout in grids.items():
        dit_accel.set_attn_processor(model, replace(GNA, backend="torch"), layout=layout, layers=[name])
    expected = run(model, PIXART)
    fresh = pixart()
    dit_accel.load_attention(fresh, dit_accel.save_attention(model, tmp_path))
    assert torch.equal(run(fresh, PIXART), expected)
    assert {name: layer.slot.last for name, layer in installed_layers(fresh).items()} == grids
    assert all(layer.mechanism == GNA for layer in installed_layers(fresh).values())  # the backend is this machine's


def read_grid(model, arguments):
    height, width = arguments["hidden_states"].shape[-2:]
    return TokenLayout((height // 2, width // 2))


def test_function_layout_must_be_passed_again(tmp_path):
    model = pixart()
    dit_accel.set_attn_processor(model, GNA, layout=read_grid)
    expected = run(model, PIXART)
    path = dit_accel.save_attention(model, tmp_path)
    fresh = pixart()
    refused(fresh, PIXART, path, r"layout that is a function, and functions are not saved.*layout=function")
    dit_accel.load_attention(fresh, path, layout=read_grid)
    assert torch.equal(run(fresh, PIXART), expected)


def test_file_without_layout_needs_one_on_unknown_model(tmp_path):
    model = pixart()
    dit_accel.set_attn_processor(model, GNA, layout=GRID)
    expected = run(model, PIXART)

    def remove_layouts(tensors, configuration):
        for group in configuration["components"]["transformer"]["attention"]:
            del group["layout"]

    path = rewrite(dit_accel.save_attention(model, tmp_path), remove_layouts)
    fresh = pixart()
    refused(fresh, PIXART, path, r"no token layout.*PixArtTransformer2DModel.*layout=TokenLayout\(grid=")
    dit_accel.load_attention(fresh, path, layout=GRID)
    assert torch.equal(run(fresh, PIXART), expected)


def test_user_layout_overrides_the_model_family(tmp_path):
    """Flux as one row of 70 tokens, from a saved file and passed with a published one."""
    model, inputs = model_and_inputs()
    row = TokenLayout((70,), before=7)
    dit_accel.set_attn_processor(model, GNA, layout=row)
    expected = run(model, inputs)
    path = dit_accel.save_attention(model, tmp_path)
    fresh, _ = model_and_inputs()
    dit_accel.load_attention(fresh, path)
    assert torch.equal(run(fresh, inputs), expected)
    clear, _ = model_and_inputs()
    dit_accel.load_attention(clear, write(tmp_path / "clear_local_3.safetensors", clear_tensors()), layout=row)
    assert "7+70+0" not in dit_accel.describe(clear) and run(clear, inputs) is not None
    assert "7+70+0" in dit_accel.describe(clear)


def test_user_layout_survives_copy_and_pickle(tmp_path):
    model = pixart()
    dit_accel.set_attn_processor(model, GNA, layout=GRID)
    expected = run(model, PIXART)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(copied, PIXART), expected)
        assert installed_layers(copied)["transformer_blocks.0.attn1"].slot.last == GRID


@pytest.mark.parametrize("layout", ["4x6", (4, 6), 24])
def test_layout_of_another_type_is_refused(layout):
    with pytest.raises(TypeError, match=r"layout must be a TokenLayout or a function.*got"):
        dit_accel.set_attn_processor(pixart(), GNA, layout=layout)


def in_group(**changes):
    """Return a change of the first attention group: ``options`` are merged, and None removes an entry."""

    def change(tensors, configuration):
        group = configuration["components"]["transformer"]["attention"][0]
        options = changes.get("options")
        group |= changes | {"options": group["options"] | options if isinstance(options, dict) else options}
        for key in [key for key, value in changes.items() if value is None]:
            del group[key]

    return change


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"topk": 3}, "options of sla has the unknown key 'topk'; expected block_kv.*"),
        ({"backend": "torch"}, "options of sla has the unknown key 'backend'"),
        ({"critical": "a lot"}, "options of sla are not valid: critical must be a number, got 'a lot'"),
        ({"critical": 2}, r"critical must be in \(0, 1\]"),
        ({"critical": 10**400}, "critical must be a number that a float can hold"),
        ({"scale": 10**400}, "scale must be a number that a float can hold"),
        ({"scale": False}, "scale must be a number or None, got False"),
        ({"dense_steps": 1.5}, "dense_steps must be an integer, got 1.5"),
        ({"min_tokens": [1]}, r"min_tokens must be an integer, got \(1,\)"),
        ({"reference": None}, "reference must be 'whole' or 'window', got None"),
        ({"feature_map": {"a": 1}}, "feature_map must be one of"),
        ({"smooth_key": 1}, "smooth_key must be True or False, got 1"),
    ],
)
def test_invalid_options_are_refused_by_name(options, words, tmp_path):
    refused(*model_and_inputs(), saved(tmp_path, in_group(options=options)), words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (in_group(mechanism=["sla"], options={}), r"unknown mechanism \['sla'\]; expected one of sla, clear"),
        (in_group(options=[1]), r"the options of sla must be an object, got \[1\]"),
        (in_group(options={}, layers="transformer_blocks.0.attn"), "layers must be a list, got 'transformer_bl"),
        (in_group(options={}, layers=[3]), "an entry of layers must be a string, got 3"),
        (in_group(options={}, layers=[]), "component transformer has no layers"),
        (in_group(options={}, layers=["a", "a"]), "component transformer has the layer a twice"),
        (in_group(options={}, layers=None), "an attention group of component transformer lacks layers"),
        (in_group(options={}, layers=["norm_out"]), "head size of norm_out"),
        (in_group(options={}, layout={"grid": [7, 10]}), "the token layout lacks after, before, references"),
        (in_group(options={}, layout=7), "the token layout must be an object, got 7"),
        (in_group(options={}, layout={"grid": [7, -1], "before": 0, "after": 0, "references": []}), "at least 1 long"),
        (in_group(options={}, layout={"grid": [7], "before": 0, "after": 9, "references": [[0]]}), "at least 1 long"),
        (in_group(options={}, layout={"grid": [7], "before": 0.5, "after": 9, "references": []}), "before must be an"),
        (in_group(options={}, note=1), "has the unknown key 'note'; expected layers, layout, mechanism"),
        (lambda t, c: c.update(components=[]), r"components must be an object, got \[\]"),
        (lambda t, c: c.update(components={}), "components must not be empty"),
        (lambda t, c: c["components"].update(transformer=None), "component transformer must be an object, got None"),
        (lambda t, c: c["components"]["transformer"].update(attention={}), "attention must be a list"),
        (lambda t, c: c.update(format=2), "expected format 1, got 2: update dit_accel"),
        (lambda t, c: c.clear(), "the configuration lacks components, format"),
        (lambda t, c: t.update({"vae.x": torch.ones(1)}), r"belong to none of its components transformer: vae.x"),
    ],
)
def test_invalid_configurations_are_refused(change, words, tmp_path):
    refused(*model_and_inputs(), saved(tmp_path, change), words)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "dense_steps": st.integers(0, 2),
        "min_tokens": st.sampled_from([0, 60, 500]),
        "reference": st.sampled_from(["whole", "window"]),
        "scale": st.floats(0.01, 3.0),
    },
)
CHOICES = {
    SLAAttnProcessor: {
        "critical": st.floats(0.01, 0.5),
        "negligible": st.floats(0.0, 0.5),
        "block_q": st.integers(2, 64),
        "block_kv": st.integers(2, 64),
        "feature_map": st.sampled_from(["softmax", "elu"]),
        "linear_over": st.sampled_from(["marginal", "all"]),
        "smooth_key": st.booleans(),
        "tile_order": st.booleans(),
    },
    CLEARAttnProcessor: {
        "radius": st.one_of(st.just(math.inf), st.floats(0.5, 9), st.tuples(st.floats(0.5, 9), st.integers(1, 9))),
        "down_factor": st.integers(1, 3),
    },
    LLSAAttnProcessor: {
        "block_size": st.sampled_from([2, 4, 16]),
        "topk": st.integers(1, 9),
        "levels": st.sampled_from([None, 1, 2]),
        "enrich": st.booleans(),
    },
    GNAAttnProcessor: {
        "window": st.one_of(st.integers(4, 9), st.tuples(st.integers(4, 9), st.integers(4, 9))),
        "stride": st.integers(1, 3),
        "dilation": st.sampled_from([1, 2, (1, 2)]),
        "is_causal": st.sampled_from([False, True, (True, False)]),
    },
}


@st.composite
def processors(draw):
    kind = draw(st.sampled_from(list(CHOICES)))
    return kind(**draw(OPTIONS), **draw(st.fixed_dictionaries(CHOICES[kind])))


LAYOUTS = st.sampled_from([None, None, TokenLayout((70,), before=7), TokenLayout((10, 7), before=7)])


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    layers=st.dictionaries(st.tuples(st.integers(0, 1), st.integers(0, 3)), processors(), min_size=1, max_size=6),
    layout=LAYOUTS,
    dtype=st.sampled_from([None, torch.float64]),
)
def test_save_load_round_trip(layers, layout, dtype):
    """Each layer of two denoisers has its own options; processors, parameters and outputs are equal after loading."""
    pipe, fresh = (Pair(TINY["flux"](0), TINY["flux"](1)) for _ in range(2))
    for (i, j), processor in layers.items():
        name, model = list(pipe.components.items())[i]
        chosen = self_attention_layers(model)[j]
        dit_accel.set_attn_processor(pipe, processor, layers=[f"{name}.{chosen}"], layout=layout)
    for model in pipe.components.values():
        randomise(model)
    with tempfile.TemporaryDirectory() as folder:
        dit_accel.load_attention(fresh, dit_accel.save_attention(pipe, folder, dtype))
    for first, second in zip(pipe.components.values(), fresh.components.values(), strict=True):
        ours, theirs = installed_layers(first), installed_layers(second)
        assert {name: layer.mechanism for name, layer in ours.items()} == {
            name: layer.mechanism for name, layer in theirs.items()
        }
        assert all(torch.equal(first.state_dict()[key], value) for key, value in second.state_dict().items())
        inputs = TINY["flux"].inputs((7, 10))
        for timestep in (0.9, 0.5):
            step = {**inputs, "timestep": torch.full((2,), timestep)}
            assert outcome(second, step) == outcome(first, step)


class Pair(DiffusionPipeline):
    """Pipeline with two denoisers, named as in Wan 2.2."""

    def __init__(self, transformer, transformer_2):
        super().__init__()
        self.register_modules(transformer=transformer, transformer_2=transformer_2)


def outcome(model, inputs):
    """Return the output as bytes, or the message of a ValueError: some layouts do not support some options."""
    try:
        return run(model, inputs).numpy().tobytes()
    except ValueError as error:
        return str(error)
