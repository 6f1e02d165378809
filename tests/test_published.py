"""Published weights: files of each release on small models, compared with weights set by hand."""

import copy
import re

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from published_files import (
    SMALL,
    TURBO,
    clear_tensors,
    draw,
    fastvideo_name,
    find_here,
    in_shards,
    linfusion_shapes,
    model_and_inputs,
    modules_list,
    self_attention,
    wan_shapes,
    wan_size,
    write,
)
from test_install import wan_pipe
from test_linfusion import ByHand
from tiny import TINY, run

import dit_accel
from dit_accel import CLEARAttnProcessor, LinFusionAttnProcessor, SLAAttnProcessor
from dit_accel.install.installation import installed_layers
from dit_accel.mechanisms.linfusion import reference
from dit_accel.weights.published.turbodiffusion import dequantize
from dit_accel.weights.tensors import Weight, WeightsFile


def with_weights(model, state, processor, learned):
    """Return a copy of the model with these weights, and with the processor and its learned parameters set by hand."""
    other = copy.deepcopy(model)
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected and len(missing) + len(state) == len(other.state_dict())
    other.set_attn_processor(processor)
    layers = installed_layers(other)
    assert learned.keys() == layers.keys()
    for name, values in learned.items():
        for key, value in values.items():
            with torch.no_grad():
                layers[name].get_parameter(key).copy_(value)
    return other


def check_load_and_reset(model, inputs, expected, load):
    """Check that loading gives the expected model's output bitwise, and that reset restores output and weights."""
    dense, before = run(model, inputs), copy.deepcopy(model.state_dict())
    report = load(model)
    out = run(model, inputs)
    assert torch.equal(out, run(expected, inputs)) and (out - dense).abs().max() > 1e-3
    assert [len(part.learned) for part in report.parts] == [
        sum(len(list(layer.parameters())) for layer in installed_layers(model).values())
    ]
    dit_accel.reset_attn_processor(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(run(model, inputs), dense)
    return report


# --- CLEAR -----------------------------------------------------------------------------------------------------------


def clear_expected(model, tensors, processor):
    state = {key: x for key, x in tensors.items() if not key.endswith("spatial_weight")}
    learned = {}
    for key, x in tensors.items():
        name = re.sub(r"\.(to_\w+|processor)\b.*", "", key)
        pooling = learned.setdefault(name, {})
        if key.endswith("spatial_weight"):
            side = x.shape[3]
            rows = [[x[0, 0, 0, i, 0, j, 0] for j in range(side)] for i in range(side)]
            pooling["pool_weight"] = torch.tensor(rows)
    return with_weights(model, state, processor, learned)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("name", "options", "processor"),
    [
        ("clear_local_8", {}, CLEARAttnProcessor(radius=8)),
        ("clear_local_3", {}, CLEARAttnProcessor(radius=3)),
        ("clear_local_3_down_4", {}, CLEARAttnProcessor(radius=3, down_factor=4)),
        ("mine", {"radius": 2.5, "down_factor": 2}, CLEARAttnProcessor(radius=2.5, down_factor=2)),
        ("mine", {"radius": 2.5}, CLEARAttnProcessor(radius=2.5)),
        ("pooled", {"radius": 2.5}, CLEARAttnProcessor(radius=2.5, down_factor=2)),
        ("clear_local_8", {"radius": 3}, CLEARAttnProcessor(radius=3)),
        ("clear_local_3", {"train_tokens": 50}, CLEARAttnProcessor(radius=3, train_tokens=50)),
    ],
)
def test_clear_file_loads_and_resets(name, options, processor, suffix, tmp_path):
    tensors = clear_tensors(processor.down_factor)
    path = write(tmp_path / (name + suffix), tensors)
    model, inputs = model_and_inputs()
    report = check_load_and_reset(
        model, inputs, clear_expected(model, tensors, processor), lambda m: dit_accel.load_attention(m, path, **options)
    )
    assert report.release == "CLEAR for Flux.1" and set(report.parts[0].processors.values()) == {processor}
    assert set(report.parts[0].overwritten) == {key for key in tensors if not key.endswith("spatial_weight")}
    assert f"{processor} on 4 layers" in str(report)


def test_clear_options_come_from_folder_name(tmp_path):
    path = write(tmp_path / "clear_local_3_down_2" / "model.safetensors", clear_tensors(2))
    model, _ = model_and_inputs()
    report = dit_accel.load_attention(model, path.parent)
    assert next(iter(report.parts[0].processors.values())) == CLEARAttnProcessor(radius=3, down_factor=2)
    assert "radius=3, from the name of the folder" in str(report)


def test_report_lists_loaded_tensors(tmp_path):
    path = write(tmp_path / "clear_local_3_down_2.safetensors", clear_tensors(2))
    model, _ = model_and_inputs()
    report = dit_accel.load_attention(model, path)
    assert str(report) == repr(report)
    assert str(report).splitlines() == [
        "clear_local_3_down_2.safetensors: CLEAR for Flux.1",
        "transformer (FluxTransformer2DModel): clear(radius=3, down_factor=2) on 4 layers",
        "  4 learned tensors loaded, 28 of the model's own overwritten; reset_attn_processor puts them back",
        "  radius=3, from the name of the file",
        "  down_factor=2, from the name of the file",
    ]


def test_loading_keeps_the_model_dtype(tmp_path):
    tensors = clear_tensors()
    path = write(tmp_path / "clear_local_3.safetensors", tensors)
    model = TINY["flux"]().bfloat16()
    before = copy.deepcopy(model.state_dict())
    dit_accel.load_attention(model, path)
    for key, x in tensors.items():
        assert torch.equal(model.get_parameter(key), x.bfloat16())
    dit_accel.reset_attn_processor(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_second_file_replaces_first_and_saves(tmp_path):
    model, inputs = model_and_inputs()
    dense = run(model, inputs)
    dit_accel.load_attention(model, write(tmp_path / "clear_local_3_down_2.safetensors", clear_tensors(2)))
    tensors = clear_tensors(seed=1)
    dit_accel.load_attention(model, write(tmp_path / "clear_local_4.safetensors", tensors))
    out = run(model, inputs)
    fresh, _ = model_and_inputs()
    assert torch.equal(out, run(clear_expected(fresh, tensors, CLEARAttnProcessor(radius=4)), inputs))
    saved = dit_accel.save_attention(model, tmp_path / "saved")
    report = dit_accel.load_attention(fresh, saved)
    assert torch.equal(run(fresh, inputs), out)
    assert "dit_accel.save_attention" in str(report) and len(report.parts[0].overwritten) == len(tensors)
    for loaded in (model, fresh):
        dit_accel.reset_attn_processor(loaded)
        assert torch.equal(run(loaded, inputs), dense)


# --- TurboDiffusion and FastVideo ------------------------------------------------------------------------------------


def wide_wan():
    """Return a model with weights of several 128×128 blocks, some of them incomplete."""
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=72, in_channels=4, out_channels=4, text_dim=24,
        freq_dim=32, ffn_dim=160, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()  # fmt: skip


def dequantize_by_blocks(weight, scale):
    out = torch.empty(weight.shape)
    for n in range(0, weight.shape[0], 128):
        for k in range(0, weight.shape[1], 128):
            out[n : n + 128, k : k + 128] = weight[n : n + 128, k : k + 128].float() * scale[n // 128, k // 128]
    return out


def wan_expected(model, tensors, processor):
    """Return the expected model, with keys converted by diffusers' function for Wan."""
    given, learned = {}, {}
    for key, x in tensors.items():
        module, _, name = key.rpartition(".")
        if "proj_l" in key:
            learned.setdefault(f"blocks.{key.split('.')[1]}.attn1", {})[name] = x
        elif name == "int8_weight":
            given[f"{module}.weight"] = dequantize_by_blocks(x, tensors[f"{module}.scale"])
        elif name != "scale":
            given[key] = x.reshape(len(x), -1, 1, 2, 2) if key == "patch_embedding.weight" else x
    state = convert_wan_transformer_to_diffusers(given)
    assert state.keys() == dict(model.named_parameters()).keys()
    return with_weights(model, state, processor, learned)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("family", ["wan", "wan_i2v", "wide"])
def test_turbodiffusion_file_loads_and_resets(family, quantized, tmp_path):
    model, inputs = model_and_inputs("wan" if family == "wide" else family)
    if family == "wide":
        model = wide_wan()
    tensors = draw(wan_shapes(**wan_size(model), quantized=quantized))
    path = write(tmp_path / f"TurboWan2.1{'-quant' * quantized}.pth", tensors)
    for options, processor in (
        ({}, TURBO),
        (SMALL, SLAAttnProcessor(negligible=0.0, linear_over="all", smooth_key=True, **SMALL)),
    ):
        report = check_load_and_reset(
            model,
            inputs,
            wan_expected(model, tensors, processor),
            lambda m, options=options: dit_accel.load_attention(m, path, **options),
        )
        assert set(report.parts[0].processors.values()) == {processor}
        assert set(report.parts[0].overwritten) == dict(model.named_parameters()).keys()
    assert "TurboDiffusion for Wan" in str(report)
    assert ("int8 weights dequantized" in str(report)) == quantized


def test_dequantization_scales_each_128_block():
    tensors = draw({"m.int8_weight": ((300, 200), torch.int8), "m.scale": ((3, 2), torch.float32), "m.bias": (300,)})
    file = WeightsFile(find_here(), {key: Weight.of(x) for key, x in tensors.items()})
    found = dequantize(file).weights
    assert found.keys() == {"m.weight", "m.bias"} and found["m.weight"].shape == (300, 200)
    assert torch.equal(found["m.weight"].read(), dequantize_by_blocks(tensors["m.int8_weight"], tensors["m.scale"]))


@pytest.mark.parametrize("names", ["fastvideo", "diffusers"])
def test_fastvideo_shards_load_and_reset(names, tmp_path):
    model, inputs = model_and_inputs("wan")
    tensors = draw(wan_shapes(**wan_size(model)))
    expected = wan_expected(model, tensors, TURBO)
    if names == "fastvideo":
        converted = {fastvideo_name(key): x for key, x in tensors.items()}
        weight = converted["patch_embedding.weight"]
        converted["patch_embedding.weight"] = weight.reshape(len(weight), -1, 1, 2, 2)
        assert "blocks.1.self_attn_residual_norm.norm.bias" in converted and "blocks.0.to_out.weight" in converted
    else:
        state = expected.state_dict()
        converted = {key.replace(".dit_accel.", ".attn_impl.proj_l."): x for key, x in state.items()}
    assert len(converted) == len(tensors) and "blocks.0.attn1.attn_impl.proj_l.weight" in converted
    folder = in_shards(tmp_path / "transformer", converted)
    report = check_load_and_reset(model, inputs, expected, lambda m: dit_accel.load_attention(m, folder))
    assert "FastVideo" in report.release and report.path.name.endswith("index.json")


def test_fastvideo_projections_alone_keep_other_weights(tmp_path):
    model, inputs = model_and_inputs("wan")
    tensors = {key: x for key, x in draw(wan_shapes(**wan_size(model))).items() if "proj_l" in key}
    path = write(tmp_path / "proj_l.safetensors", {fastvideo_name(key): x for key, x in tensors.items()})
    learned = {f"blocks.{i}.attn1": {} for i in range(2)}
    for key, x in tensors.items():
        learned[f"blocks.{key.split('.')[1]}.attn1"][key.rpartition(".")[2]] = x
    expected = with_weights(model, {}, TURBO, learned)
    report = check_load_and_reset(model, inputs, expected, lambda m: dit_accel.load_attention(m, path))
    assert not report.parts[0].overwritten and "must already have TurboDiffusion's" in str(report)


def test_pipeline_with_two_denoisers_needs_component(tmp_path):
    pipe, inputs = wan_pipe(), model_and_inputs("wan")[1]
    paths = []
    for seed in range(2):
        tensors = draw(wan_shapes(**wan_size(pipe.transformer)), seed)
        paths.append(write(tmp_path / f"{seed}.pth", tensors))
    dense = [run(model, inputs) for model in (pipe.transformer, pipe.transformer_2)]
    with pytest.raises(ValueError, match=r"has transformer, transformer_2: say which one with component="):
        dit_accel.load_attention(pipe, paths[0])
    with pytest.raises(ValueError, match=r"component='unet' names a denoiser.*this pipeline has transformer, transfo"):
        dit_accel.load_attention(pipe, paths[0], component="unet")
    with pytest.raises(ValueError, match="a model was given and no pipeline"):
        dit_accel.load_attention(pipe.transformer, paths[0], component="transformer")
    report = dit_accel.load_attention(pipe, paths[1], component="transformer_2")
    assert report.parts[0].component == "transformer_2" and not installed_layers(pipe.transformer)
    assert torch.equal(run(pipe.transformer, inputs), dense[0])
    assert torch.equal(run(pipe.transformer_2, inputs), run(wan_expected(TINY["wan"](1), tensors, TURBO), inputs))
    dit_accel.load_attention(pipe, paths[0], component="transformer")
    dit_accel.reset_attn_processor(pipe)
    assert all(
        torch.equal(run(m, inputs), out) for m, out in zip((pipe.transformer, pipe.transformer_2), dense, strict=True)
    )


# --- LinFusion -------------------------------------------------------------------------------------------------------


def linfusion_expected(model, tensors, names):
    """Return a copy with the file's attention weights that computes the definition."""
    other = copy.deepcopy(model)
    for i, name in enumerate(names):
        module = {key.removeprefix(f"{i}."): x for key, x in tensors.items() if key.startswith(f"{i}.")}
        attn = other.get_submodule(name)
        attn.load_state_dict({key: x for key, x in module.items() if "_." not in key})
        attn.processor = ByHand({key: x for key, x in module.items() if "_." in key}, reference)
    return other


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("mid", [None, 6])
@pytest.mark.parametrize("named_by", ["config", "layers"])
def test_linfusion_file_loads_and_resets(family, mid, named_by, tmp_path):
    model, inputs = model_and_inputs(family)
    inputs = TINY[family].inputs((6, 7)) if family == "sd15" else inputs
    names, widths, heads = self_attention(model)
    order = list(reversed(range(len(names))))  # differs from the model's
    names, widths, heads = ([x[i] for i in order] for x in (names, widths, heads))
    tensors = draw(linfusion_shapes(widths, mid))
    config = modules_list(names, widths, heads, mid) if named_by == "config" else None
    path = write(tmp_path / "diffusion_pytorch_model.safetensors", tensors, config)
    options = {} if config else {"layers": names}
    dense, before = run(model, inputs), copy.deepcopy(model.state_dict())
    report = dit_accel.load_attention(model, tmp_path if config else path, **options)
    out = run(model, inputs)
    torch.testing.assert_close(
        out, run(linfusion_expected(TINY[family](), tensors, names), inputs), atol=1e-5, rtol=1e-5
    )
    assert (out - dense).abs().max() > 1e-2
    assert list(report.parts[0].processors) == names
    assert [p.projection_mid_dim for p in report.parts[0].processors.values()] == [mid or width for width in widths]
    assert len(report.parts[0].learned) == 12 * len(names) and len(report.parts[0].overwritten) == 5 * len(names)
    assert "LinFusion" in str(report) and ("config.json" in str(report)) == (named_by == "config")
    saved = dit_accel.save_attention(model, tmp_path / "saved")
    other = TINY[family]()
    dit_accel.load_attention(other, saved)
    assert torch.equal(run(other, inputs), out)
    dit_accel.reset_attn_processor(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(run(model, inputs), dense)


def test_linfusion_on_some_layers_keeps_others_dense(tmp_path):
    """A file with two modules keeps the other layers dense."""
    model, inputs = model_and_inputs("sd15")
    inputs = TINY["sd15"].inputs((6, 7))
    names, widths, _ = self_attention(model)
    tensors = draw(linfusion_shapes(widths[1:3]))
    path = write(tmp_path / "part.safetensors", tensors)
    expected = run(linfusion_expected(model, tensors, names[1:3]), inputs)
    dit_accel.load_attention(model, path, layers=names[1:3], min_tokens=1)
    assert list(installed_layers(model)) == names[1:3]
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)
    wanted = LinFusionAttnProcessor(projection_mid_dim=widths[1], min_tokens=1)
    assert installed_layers(model)[names[1]].mechanism == wanted
