"""Published weights: what each release's files become, on small models and on the real models' keys and shapes."""

import copy
import json
import re

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from peft import LoraConfig
from published_files import (
    WAN_1_3B,
    WAN_14B,
    clear_shapes,
    draw,
    fastvideo_name,
    linfusion_shapes,
    listing,
    modules_list,
    wan_shapes,
    write,
)
from safetensors.torch import save_file
from test_install import wan_pipe
from test_linfusion import ByHand
from tiny import TINY, run

import dit_accel
from dit_accel import CLEARAttnProcessor, GNAAttnProcessor, LinFusionAttnProcessor, SLAAttnProcessor
from dit_accel.install import installed_layers
from dit_accel.load import check_fit
from dit_accel.mechanisms.linfusion import reference
from dit_accel.published import RELEASES, clear, fastvideo, linfusion, recognise, turbodiffusion
from dit_accel.published.turbodiffusion import dequantized
from dit_accel.weights import Weight, WeightsFile, find_weights, read_weights

TURBO = SLAAttnProcessor(
    critical=0.1, negligible=0.0, block_q=128, block_kv=64, linear_over="all", smooth_key=True, feature_map="softmax"
)
SMALL = {"block_q": 16, "block_kv": 8, "critical": 0.3}  # for 90 tokens


def model_and_inputs(family="flux"):
    torch.manual_seed(11)
    return TINY[family](), TINY[family].inputs(TINY[family].size)


def with_weights(model, state, processor, learned):
    """A copy of the model with these host weights, and the processor with these learned ones, put in by hand."""
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
    """Loading gives the expected model's output to the bit, and reset the old one and every weight."""
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


def clear_tensors(factor=1, seed=0):
    return draw(clear_shapes(2, 2, 32, factor), seed)


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
def test_clear(name, options, processor, suffix, tmp_path):
    tensors = clear_tensors(processor.down_factor)
    path = write(tmp_path / (name + suffix), tensors)
    model, inputs = model_and_inputs()
    report = check_load_and_reset(
        model, inputs, clear_expected(model, tensors, processor), lambda m: dit_accel.load_attention(m, path, **options)
    )
    assert report.release == "CLEAR for Flux.1" and set(report.parts[0].processors.values()) == {processor}
    assert set(report.parts[0].overwritten) == {key for key in tensors if not key.endswith("spatial_weight")}
    assert f"{processor} on 4 layers" in str(report)


def test_clear_is_named_by_its_folder_too(tmp_path):
    path = write(tmp_path / "clear_local_3_down_2" / "model.safetensors", clear_tensors(2))
    model, _ = model_and_inputs()
    report = dit_accel.load_attention(model, path.parent)
    assert next(iter(report.parts[0].processors.values())) == CLEARAttnProcessor(radius=3, down_factor=2)
    assert "radius=3, as the folder is named" in str(report)


def test_report_says_what_was_loaded(tmp_path):
    path = write(tmp_path / "clear_local_3_down_2.safetensors", clear_tensors(2))
    model, _ = model_and_inputs()
    report = dit_accel.load_attention(model, path)
    assert str(report) == repr(report)
    assert str(report).splitlines() == [
        "clear_local_3_down_2.safetensors: CLEAR for Flux.1",
        "transformer (FluxTransformer2DModel): clear(radius=3, down_factor=2) on 4 layers",
        "  4 learned tensors loaded, 28 of the model's own overwritten; reset_attn_processor puts them back",
        "  radius=3, as the file is named",
        "  down_factor=2, as the file is named",
    ]


def test_the_models_dtype_is_kept(tmp_path):
    tensors = clear_tensors()
    path = write(tmp_path / "clear_local_3.safetensors", tensors)
    model = TINY["flux"]().bfloat16()
    before = copy.deepcopy(model.state_dict())
    dit_accel.load_attention(model, path)
    for key, x in tensors.items():
        assert torch.equal(model.get_parameter(key), x.bfloat16())
    dit_accel.reset_attn_processor(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_another_file_over_the_first_and_saved_again(tmp_path):
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


def wan_size(model):
    config = model.config
    return {
        "dim": config.num_attention_heads * config.attention_head_dim, "heads": config.num_attention_heads,
        "ffn": config.ffn_dim, "layers": config.num_layers, "channels": config.in_channels,
        "out": config.out_channels, "text": config.text_dim, "freq": config.freq_dim, "image": config.image_dim,
    }  # fmt: skip


def wide_wan():
    """Wide enough for more than one block of 128×128, and none that is full at the edge."""
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=72, in_channels=4, out_channels=4, text_dim=24,
        freq_dim=32, ffn_dim=160, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()  # fmt: skip


def block_by_block(weight, scale):
    out = torch.empty(weight.shape)
    for n in range(0, weight.shape[0], 128):
        for k in range(0, weight.shape[1], 128):
            out[n : n + 128, k : k + 128] = weight[n : n + 128, k : k + 128].float() * scale[n // 128, k // 128]
    return out


def wan_expected(model, tensors, processor):
    """By diffusers' own conversion of Wan's keys."""
    given, learned = {}, {}
    for key, x in tensors.items():
        module, _, name = key.rpartition(".")
        if "proj_l" in key:
            learned.setdefault(f"blocks.{key.split('.')[1]}.attn1", {})[name] = x
        elif name == "int8_weight":
            given[f"{module}.weight"] = block_by_block(x, tensors[f"{module}.scale"])
        elif name != "scale":
            given[key] = x.reshape(len(x), -1, 1, 2, 2) if key == "patch_embedding.weight" else x
    state = convert_wan_transformer_to_diffusers(given)
    assert state.keys() == dict(model.named_parameters()).keys()
    return with_weights(model, state, processor, learned)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("family", ["wan", "wan_i2v", "wide"])
def test_turbodiffusion(family, quantized, tmp_path):
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


def test_dequantization_takes_each_block_of_128_by_its_scale():
    tensors = draw({"m.int8_weight": ((300, 200), torch.int8), "m.scale": ((3, 2), torch.float32), "m.bias": (300,)})
    file = WeightsFile(find_here(), {key: Weight.of(x) for key, x in tensors.items()})
    found = dequantized(file).weights
    assert found.keys() == {"m.weight", "m.bias"} and found["m.weight"].shape == (300, 200)
    assert torch.equal(found["m.weight"].read(), block_by_block(tensors["m.int8_weight"], tensors["m.scale"]))


def find_here():
    return find_weights(__file__)


def in_shards(folder, tensors):
    """The tensors in three safetensors files with their index, as diffusers writes large models."""
    folder.mkdir()
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-00003.safetensors" for i in range(3)]
    weight_map = {key: names[i % 3] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: x for key, x in tensors.items() if weight_map[key] == name}, folder / name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel"}))
    return folder


@pytest.mark.parametrize("names", ["fastvideo", "diffusers"])
def test_fastvideo_in_shards(names, tmp_path):
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


def test_fastvideo_projections_alone_leave_the_models_own_weights(tmp_path):
    model, inputs = model_and_inputs("wan")
    tensors = {key: x for key, x in draw(wan_shapes(**wan_size(model))).items() if "proj_l" in key}
    path = write(tmp_path / "proj_l.safetensors", {fastvideo_name(key): x for key, x in tensors.items()})
    learned = {f"blocks.{i}.attn1": {} for i in range(2)}
    for key, x in tensors.items():
        learned[f"blocks.{key.split('.')[1]}.attn1"][key.rpartition(".")[2]] = x
    expected = with_weights(model, {}, TURBO, learned)
    report = check_load_and_reset(model, inputs, expected, lambda m: dit_accel.load_attention(m, path))
    assert not report.parts[0].overwritten and "must be TurboDiffusion's already" in str(report)


def test_the_denoiser_of_a_pipeline_is_named(tmp_path):
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


def self_attention(model):
    """As the authors list it: names, widths and heads of the modules."""
    found = [(n, m) for n, m in model.named_modules() if hasattr(m, "to_q") and not m.is_cross_attention]
    names = [name for name, _ in found]
    return names, [m.to_q.weight.shape[0] for _, m in found], [m.heads for _, m in found]


def linfusion_expected(model, tensors, names):
    """The definition, on a copy with the file's attention weights."""
    other = copy.deepcopy(model)
    for i, name in enumerate(names):
        mine = {key.removeprefix(f"{i}."): x for key, x in tensors.items() if key.startswith(f"{i}.")}
        attn = other.get_submodule(name)
        attn.load_state_dict({key: x for key, x in mine.items() if "_." not in key})
        attn.processor = ByHand({key: x for key, x in mine.items() if "_." in key}, reference)
    return other


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("mid", [None, 6])
@pytest.mark.parametrize("named_by", ["config", "layers"])
def test_linfusion(family, mid, named_by, tmp_path):
    model, inputs = model_and_inputs(family)
    inputs = TINY[family].inputs((6, 7)) if family == "sd15" else inputs
    names, widths, heads = self_attention(model)
    order = list(reversed(range(len(names))))  # not the model's own
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


# --- the real models' keys and shapes --------------------------------------------------------------------------------


def on_meta(build):
    with torch.device("meta"):
        return build()


def fits(release, model, shapes, name, options=None, config=None):
    """Plan and check of a listing, which has no data; and one weight more or less, or larger, does not fit."""
    weights = listing(shapes)
    assert recognise(weights) is release
    assert [r for r in RELEASES if r.recognises(weights)] == [release]

    def plan_of(weights):
        file = WeightsFile(find_here().with_name(name), weights, {}, config)
        plan = release.plan(model, file, options or {})
        check_fit(model, plan, file.path)
        return plan

    plan = plan_of(weights)
    keys = [key for key in weights if not key.endswith((".scale", ".int8_weight"))]
    for key in (keys[0], keys[len(keys) // 2], keys[-1]):
        with pytest.raises(ValueError, match=r"missing|named"):
            plan_of({other: x for other, x in weights.items() if other != key})
        shape = weights[key].shape
        with pytest.raises(ValueError, match=r"the model needs|spatial_weight must be"):
            plan_of(weights | {key: Weight((*shape[:-1], shape[-1] + 1), torch.bfloat16, weights[key].read)})
        with pytest.raises(ValueError, match=r"expected floating-point numbers"):
            plan_of(weights | {key: Weight(shape, torch.int8, weights[key].read)})
    return plan


@pytest.mark.parametrize(("radius", "factor"), [(8, 1), (16, 1), (32, 1), (8, 4), (16, 4)])
def test_real_clear_files_fit_flux_dev(radius, factor):
    model = on_meta(lambda: FluxTransformer2DModel(guidance_embeds=True))
    assert len(model.transformer_blocks) == 19 and len(model.single_transformer_blocks) == 38
    name = f"clear_local_{radius}{f'_down_{factor}' if factor > 1 else ''}.safetensors"
    plan = fits(clear, model, clear_shapes(factor=factor), name)
    assert set(plan.processors.values()) == {CLEARAttnProcessor(radius=radius, down_factor=factor)}
    assert len(plan.processors) == 57 and len(plan.required) == 19 * 8 + 38 * 6
    assert len(plan.weights) == len(plan.required) + (57 if factor > 1 else 0)


WANS = {
    "2.1 1.3B": (WAN_1_3B, {}),
    "2.1 14B": (WAN_14B, {}),
    "2.1 I2V 14B": ({**WAN_14B, "channels": 36, "image": 1280}, {"image_dim": 1280, "added_kv_proj_dim": 5120}),
    "2.2 A14B": ({**WAN_14B, "channels": 36}, {}),
}


def real_wan(name):
    size, further = WANS[name]
    return size, on_meta(
        lambda: WanTransformer3DModel(
            num_attention_heads=size["heads"], attention_head_dim=128, in_channels=size.get("channels", 16),
            ffn_dim=size["ffn"], num_layers=size["layers"], **further,
        )
    )  # fmt: skip


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", WANS)
def test_real_turbodiffusion_files_fit_wan(name, quantized):
    size, model = real_wan(name)
    shapes = wan_shapes(**size, quantized=quantized)
    plan = fits(turbodiffusion, model, shapes, "TurboWan.pth")
    assert set(plan.processors.values()) == {TURBO} and len(plan.processors) == size["layers"]
    assert plan.required == dict(model.named_parameters()).keys()
    assert len(plan.weights) == len(plan.required) + 2 * size["layers"]
    plain = {key: torch.empty(shape, device="meta") for key, (shape, _) in wan_shapes(**size, sla=False).items()}
    theirs = {id(x): key for key, x in convert_wan_transformer_to_diffusers(dict(plain)).items()}
    assert all(turbodiffusion.diffusers_name(key) == theirs[id(x)] for key, x in plain.items())


@pytest.mark.parametrize("name", ["2.1 1.3B", "2.1 14B", "2.2 A14B"])
def test_real_fastvideo_files_fit_wan(name):
    size, model = real_wan(name)
    shapes = {fastvideo_name(key): x for key, x in wan_shapes(**size).items()}
    plan = fits(fastvideo, model, shapes, "diffusion_pytorch_model.safetensors")
    assert set(plan.processors.values()) == {TURBO} and len(plan.processors) == size["layers"]
    assert plan.required == dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("patch_embedding.proj.weight", "patch_embedding.weight"),
        ("condition_embedder.image_embedder.ff.fc_in.bias", "condition_embedder.image_embedder.ff.net.0.proj.bias"),
        ("condition_embedder.image_embedder.ff.fc_out.bias", "condition_embedder.image_embedder.ff.net.2.bias"),
        ("condition_embedder.image_embedder.norm1.bias", "condition_embedder.image_embedder.norm1.bias"),
        ("blocks.12.attn2.add_k_proj.weight", "blocks.12.attn2.add_k_proj.weight"),
        ("blocks.12.attn2.to_out.0.weight", "blocks.12.attn2.to_out.0.weight"),
    ],
)
def test_fastvideo_names_beyond_its_conversion_of_text_to_video(theirs, ours):
    _, model = real_wan("2.1 I2V 14B")
    assert fastvideo.diffusers_name(theirs) == ours and ours in dict(model.named_parameters())


UNET = {  # configurations of the real U-Nets: self-attention modules, and how the U-Net is built
    "1.5": (16, {"cross_attention_dim": 768}),
    "2.1": (16, {
        "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
    }),
    "XL": (70, {
        "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True, "transformer_layers_per_block": (1, 2, 10), "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }),
}  # fmt: skip


@pytest.mark.parametrize("mid_scale", [None, 16])
@pytest.mark.parametrize("version", UNET)
def test_real_linfusion_files_fit_stable_diffusion(version, mid_scale):
    count, options = UNET[version]
    model = on_meta(lambda: UNet2DConditionModel(**options))
    names, widths, heads = self_attention(model)
    assert len(names) == count and "mid_block.attentions.0.transformer_blocks.0.attn1" in names
    mid = mid_scale and widths[0] // mid_scale
    config = modules_list(names, widths, heads, mid)
    plan = fits(linfusion, model, linfusion_shapes(widths, mid), "diffusion_pytorch_model.safetensors", {}, config)
    assert list(plan.processors) == names
    assert [p.projection_mid_dim for p in plan.processors.values()] == [mid or width for width in widths]
    assert len(plan.weights) == 17 * count and len(plan.required) == 5 * count


# --- what does not fit -----------------------------------------------------------------------------------------------


def refused(model, inputs, words, *arguments, error=ValueError, **options):
    """Refused with these words, and the model as it was to the bit."""
    dense, before, layers = run(model, inputs), copy.deepcopy(model.state_dict()), installed_layers(model)
    with pytest.raises(error, match=words):
        dit_accel.load_attention(model, *arguments, **options)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(run(model, inputs), dense) and installed_layers(model) == layers


def without(tensors, *keys):
    return {key: x for key, x in tensors.items() if key not in keys}


Q = "transformer_blocks.0.attn.to_q.weight"
POOL = "single_transformer_blocks.1.attn.processor.spatial_weight"


@pytest.mark.parametrize(
    ("name", "factor", "change", "options", "words"),
    [
        ("mine", 1, None, {}, r"says the radius.*load_attention\(pipe, file, radius=16\)"),
        ("mine", 4, None, {}, r"radius=16, down_factor=4\)"),
        ("mine", 1, None, {"down_factor": 1}, "says the radius"),
        (
            "mine",
            4,
            None,
            {"radius": 3, "down_factor": 2},
            r"weights of 4×4 patches, but you gave down_factor=2: give do",
        ),
        ("mine", 1, None, {"radius": 3, "down_factor": 4}, r"no spatial_weight, that is.*you gave down_factor=4"),
        ("clear_local_3_down_4", 1, None, {}, "no spatial_weight.*its name says down_factor=4: give down_factor=1"),
        ("clear_local_3", 2, None, {}, "weights of 2×2 patches, but its name says down_factor=1"),
        ("clear_local_3", 1, None, {"radios": 3}, "is for clear, which has no option 'radios'; it has: .*radius"),
        ("clear_local_0", 1, None, {}, "radius must be greater than 0"),
        ("clear_local_3", 1, lambda t: without(t, Q), {}, f"missing {Q}; unexpected none"),
        ("clear_local_3_down_4", 4, lambda t: without(t, POOL), {}, "missing .*blocks.1.attn.dit_accel.pool_weight"),
        ("clear_local_3", 1, lambda t: t | {Q: torch.ones(32, 31)}, {}, r"to_q.weight is \(32, 31\).*needs \(32, 32\)"),
        (
            "clear_local_3",
            1,
            lambda t: t | {Q: torch.ones(32, 32, dtype=torch.int64)},
            {},
            "is torch.int64; expected fl",
        ),
        ("clear_local_3", 1, lambda t: t | {Q.replace("0", "7"): torch.ones(2)}, {}, "missing none; unexpected tra.*7"),
        ("clear_local_3", 1, lambda t: t | {"norm_out.linear.weight": torch.ones(2)}, {}, "no release that is known"),
        (
            "clear_local_3_down_4",
            4,
            lambda t: t | {POOL: torch.ones(1, 1, 1, 2, 1, 2, 1)},
            {},
            "with one f in all layers",
        ),
        ("clear_local_3_down_4", 4, lambda t: t | {POOL: torch.ones(4, 4)}, {}, r"must be \(1, 1, 1, f, 1, f, 1\)"),
    ],
)
def test_clear_that_does_not_fit(name, factor, change, options, words, tmp_path):
    tensors = clear_tensors(factor)
    path = write(tmp_path / f"{name}.safetensors", change(tensors) if change else tensors)
    refused(*model_and_inputs(), words, path, **options)


PROJ = "blocks.1.self_attn.attn_op.local_attn.proj_l.bias"


@pytest.mark.parametrize(
    ("quantized", "change", "options", "words"),
    [
        (False, lambda t: without(t, PROJ), {}, "missing blocks.1.attn1.dit_accel.bias; unexpected none"),
        (False, lambda t: without(t, "blocks.0.ffn.2.bias"), {}, "missing blocks.0.ffn.net.2.bias"),
        (False, lambda t: without(t, "head.modulation"), {}, "missing scale_shift_table"),
        (False, lambda t: t | {"blocks.0.strange.weight": torch.ones(2)}, {}, "unexpected blocks.0.strange.weight"),
        (False, lambda t: t | {"blocks.2.norm3.bias": torch.ones(32)}, {}, "unexpected blocks.2.norm2.bias"),
        (False, lambda t: t | {"patch_embedding.weight": torch.ones(32, 36)}, {}, r"is \(32, 36\), the model needs"),
        (False, lambda t: t | {"blocks.0.attn1.to_q.bias": torch.ones(32)}, {}, "twice, as blocks.0.self_attn.q.bias"),
        (False, None, {"topk": 0.1}, "is for sla, which has no option 'topk'"),
        (False, None, {"critical": 0}, "critical must be in"),
        (
            True,
            lambda t: without(t, "blocks.0.self_attn.q.scale"),
            {},
            r"with scale None; expected int8 with .*\(1, 1\)",
        ),
        (True, lambda t: t | {"blocks.0.ffn.0.scale": torch.ones(2, 1)}, {}, r"with scale \(2, 1\); expected int8"),
        (True, lambda t: t | {"blocks.0.ffn.0.int8_weight": torch.ones(48, 32)}, {}, "is torch.float32"),
        (
            True,
            lambda t: without(t, "blocks.0.ffn.0.int8_weight"),
            {},
            "missing .*net.0.proj.weight; unexpected .*scale",
        ),
    ],
)
def test_turbodiffusion_that_does_not_fit(quantized, change, options, words, tmp_path):
    model, inputs = model_and_inputs("wan")
    tensors = draw(wan_shapes(**wan_size(model), quantized=quantized))
    path = write(tmp_path / "turbo.pth", change(tensors) if change else tensors)
    refused(model, inputs, words, path, **options)


def test_fastvideo_in_part_is_refused(tmp_path):
    model, inputs = model_and_inputs("wan")
    tensors = {fastvideo_name(key): x for key, x in draw(wan_shapes(**wan_size(model))).items()}
    path = write(tmp_path / "a.safetensors", without(tensors, "blocks.1.to_q.weight"))
    refused(model, inputs, "missing blocks.1.attn1.to_q.weight; unexpected none", path)
    projections = {key: x for key, x in tensors.items() if "proj_l" in key}
    path = write(tmp_path / "b.safetensors", projections | {"blocks.1.to_q.weight": tensors["blocks.1.to_q.weight"]})
    refused(model, inputs, "missing blocks.0.attn1.norm_k.weight", path)
    path = write(tmp_path / "c.safetensors", without(projections, "blocks.1.attn1.attn_impl.proj_l.bias"))
    refused(model, inputs, "missing blocks.1.attn1.dit_accel.bias", path)


def entry(config, i, **changes):
    config["modules_list"][i].update(changes)
    return config


@pytest.mark.parametrize(
    ("change", "config", "options", "words"),
    [
        (None, lambda c: None, {}, r"no config.json with a modules_list.*or give layers=\[...\]"),
        (None, lambda c: {"modules_list": 3}, {}, "no config.json with a modules_list"),
        (
            None,
            lambda c: {"modules_list": c["modules_list"][:3]},
            {},
            "has modules 0, 1, 2, 3, but 3 of them are named",
        ),
        (None, lambda c: None, {"layers": ["a"]}, "but 1 of them are named"),
        (None, lambda c: None, {"layers": list("abcd")}, "self-attention modules that this UNet2D.* lacks: a, b, c, d"),
        (None, lambda c: entry(c, 1, module_name=c["modules_list"][0]["module_name"]), {}, "named twice"),
        (None, lambda c: entry(c, 1, heads=7), {}, "has 7 heads in .*, this U-Net 2: it is for another one"),
        (lambda t: without(t, "2.to_v.weight"), None, {}, r"missing .*attn1.to_v.weight; unexpected none"),
        (lambda t: without(t, "2.to_q_.0.weight"), None, {}, r"missing .*attn1.dit_accel.to_q_.0.weight"),
        (lambda t: without(t, "2.to_k_.3.bias"), None, {}, r"missing .*attn1.dit_accel.to_k_.3.bias"),
        (lambda t: t | {"2.to_v.bias": torch.ones(64)}, None, {}, r"missing none; unexpected .*attn1.to_v.bias"),
        (lambda t: t | {"9.to_v.weight": torch.ones(64)}, None, {}, "has modules 0, 1, 2, 3, 9, but 4"),
        (lambda t: t | {"strange": torch.ones(64)}, None, {}, "unexpected strange"),
        (lambda t: t | {"0.to_q_.1.bias": torch.ones(3)}, None, {}, r"to_q_.1.bias is \(3,\), the model needs \(32,\)"),
        (None, None, {"projection_mid_dim": 32}, "leave it out"),
        (None, None, {"radius": 32}, "is for linfusion, which has no option 'radius'; it has: .*layers"),
        (None, None, {"scale": 2.0}, "no logits to scale"),
        (None, None, {"backend": "tritn"}, "did you mean 'triton'"),
    ],
)
def test_linfusion_that_does_not_fit(change, config, options, words, tmp_path):
    model, inputs = model_and_inputs("sd15")
    names, widths, heads = self_attention(model)
    tensors = draw(linfusion_shapes(widths))
    given = modules_list(names, widths, heads)
    path = write(
        tmp_path / "model.safetensors", change(tensors) if change else tensors, config(given) if config else given
    )
    refused(model, inputs, words, path, **options)


def files_of_all(tmp_path):
    wan, unet = TINY["wan"](), TINY["sd15"]()
    names, widths, heads = self_attention(unet)
    turbo = draw(wan_shapes(**wan_size(wan)))
    fast = {fastvideo_name(key): x for key, x in turbo.items()}
    lin = draw(linfusion_shapes(widths))
    return {
        "flux": write(tmp_path / "clear_local_3.safetensors", clear_tensors()),
        "wan": write(tmp_path / "turbo.pth", turbo),
        "wan again": write(tmp_path / "fast.safetensors", fast),
        "sd15": write(tmp_path / "lin.safetensors", lin, modules_list(names, widths, heads)),
    }


def test_each_release_is_refused_by_the_other_models(tmp_path):
    for name, path in files_of_all(tmp_path).items():
        for family in ("flux", "wan", "sd15", "sd3", "wan_vace"):
            model, inputs = model_and_inputs(family)
            if name.startswith(family) and family != "wan_vace":
                assert dit_accel.load_attention(model, path).parts
                assert not torch.equal(run(model, inputs), run(model_and_inputs(family)[0], inputs))
                continue
            words = rf"{path.name} is of .* and needs a \w+, got \w+: {type(model).__name__}"
            refused(model, inputs, words, path)


def test_files_that_are_not_known_or_not_whole(tmp_path):
    model, inputs = model_and_inputs()
    path = write(tmp_path / "a.safetensors", {"x": torch.ones(2), "y": torch.ones(2)})
    refused(
        model,
        inputs,
        r"not written by dit_accel.save_attention.*no release that is known here: x, y\. Known: CLE",
        path,
    )
    refused(model, inputs, "no release that is known here: none", write(tmp_path / "empty.safetensors", {}))
    good = write(tmp_path / "clear_local_3.pth", clear_tensors())
    whole = good.read_bytes()
    good.write_bytes(whole[: len(whole) // 2])
    refused(model, inputs, "is not a whole file of torch.save|is damaged", good)
    good.write_bytes(b"")
    refused(model, inputs, "is not a whole file of torch.save|is damaged", good)
    torch.save([1, 2], tmp_path / "list.pth")
    refused(model, inputs, "holds list; expected a state dict", tmp_path / "list.pth")
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "nested.pth")
    refused(model, inputs, "a dict of more than tensors; expected a state dict", tmp_path / "nested.pth")
    torch.save({"a": Harmful()}, tmp_path / "code.pth")
    refused(model, inputs, "dit_accel loads no code from a file", tmp_path / "code.pth")
    assert not Harmful.ran


class Harmful:
    ran = False

    def __reduce__(self):
        return (setattr, (Harmful, "ran", True))


def test_an_old_file_of_torch_save_is_read(tmp_path):
    tensors = clear_tensors()
    torch.save(tensors, tmp_path / "clear_local_3.bin", _use_new_zipfile_serialization=False)
    found = read_weights(tmp_path / "clear_local_3.bin").weights
    assert found.keys() == tensors.keys() and torch.equal(found[Q].read(), tensors[Q])


def test_folders(tmp_path, monkeypatch):
    model, inputs = model_and_inputs()
    refused(model, inputs, "no attention file at", tmp_path, error=FileNotFoundError)
    refused(model, inputs, "no attention file at", "nowhere.safetensors", error=FileNotFoundError)
    refused(model, inputs, "no attention file at", "not/here.safetensors", error=FileNotFoundError)
    refused(model, inputs, "no attention file at", "owner/name/folder", error=FileNotFoundError)
    write(tmp_path / "clear_local_3.safetensors", clear_tensors())
    assert find_weights(tmp_path).name == "clear_local_3.safetensors"
    write(tmp_path / "clear_local_8.pth", clear_tensors())
    refused(model, inputs, r"several files of weights, clear_local_3.safetensors, clear_local_8.pth: give", tmp_path)
    write(tmp_path / "dit_accel.safetensors", clear_tensors())
    assert find_weights(tmp_path).name == "dit_accel.safetensors"
    folder = in_shards(tmp_path / "shards", clear_tensors())
    next(folder.glob("*00002*")).unlink()
    refused(model, inputs, "is not a whole safetensors file", folder)
    next(folder.glob("*index*")).write_text("{}")
    refused(model, inputs, "is not an index of safetensors shards", folder)
    next(folder.glob("*index*")).write_text("{")
    refused(model, inputs, "is not a JSON file", folder)


def test_hub_names(tmp_path, monkeypatch):
    """``owner/repository/file``, with the config.json beside it, if any; nothing here goes to the hub."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    write(tmp_path / "ckpt" / "clear_local_3.safetensors", clear_tensors())
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        if not (tmp_path / file).is_file():
            raise EntryNotFoundError(f"no {file}")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model, _ = model_and_inputs()
    report = dit_accel.load_attention(model, "Huage001/CLEAR/ckpt/clear_local_3.safetensors")
    assert report.parts[0].processors["transformer_blocks.0.attn"] == CLEARAttnProcessor(radius=3)
    assert asked == [("Huage001/CLEAR", f"ckpt/{name}") for name in ("clear_local_3.safetensors", "config.json")]
    with pytest.raises(FileNotFoundError, match=r"could not be had from the hub: no dit_accel.safetensors"):
        dit_accel.load_attention(model, "Huage001/CLEAR")


def test_what_is_on_the_model_already_may_be_in_the_way(tmp_path):
    files = files_of_all(tmp_path)
    model, inputs = model_and_inputs()
    model.set_attn_processor(GNAAttnProcessor(window=3))
    refused(model, inputs, r"is for clear, but gna is installed on .*reset_attn_processor", files["flux"])
    for family in ("flux", "wan", "sd15"):
        model, inputs = model_and_inputs(family)
        model.fuse_qkv_projections()
        refused(model, inputs, r"has fused into one: call unfuse_qkv_projections\(\) first", files[family])
        model.unfuse_qkv_projections()
        assert dit_accel.load_attention(model, files[family]).parts
        model, inputs = model_and_inputs(family)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        refused(model, inputs, r"an adapter is around \(.*base_layer.*unload or fuse the LoRA first", files[family])
    model, inputs = model_and_inputs("sd15")
    model.set_attention_slice("max")
    refused(model, inputs, "LinFusion is for the self-attention of U-Nets.*has SlicedAttnProcessor", files["sd15"])
    with pytest.raises(ValueError, match=r"attn\.to_\w.\w+, which is offloaded.*load the attention first"):
        dit_accel.load_attention(on_meta(TINY["flux"].build), files["flux"])
    model, _ = model_and_inputs()
    model.transformer_blocks[0].attn.to_q.weight = torch.nn.Parameter(torch.zeros(32, 32).char(), requires_grad=False)
    with pytest.raises(ValueError, match=rf"{Q}, which is quantized: load the attention first"):
        dit_accel.load_attention(model, files["flux"])


def test_a_lora_after_the_load_is_kept_apart_from_it(tmp_path):
    model, inputs = model_and_inputs()
    dense = run(model, inputs)
    dit_accel.load_attention(model, files_of_all(tmp_path)["flux"])
    out = run(model, inputs)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    adapted = run(model, inputs)
    assert not torch.equal(adapted, out)
    dit_accel.reset_attn_processor(model)
    assert not torch.equal(run(model, inputs), adapted)
    model.delete_adapters("default")
    assert torch.equal(run(model, inputs), dense)


def test_own_files_take_no_options(tmp_path):
    model, inputs = model_and_inputs()
    model.set_attn_processor(SLAAttnProcessor(**SMALL))
    path = dit_accel.save_attention(model, tmp_path)
    dit_accel.reset_attn_processor(model)
    refused(model, inputs, "carries its options, and takes none, got critical", path, critical=0.5)
    report = dit_accel.load_attention(model, path)
    assert report.parts[0].model == "FluxTransformer2DModel" and len(report.parts[0].learned) == 8
    assert str(report).splitlines()[:2] == [
        "dit_accel.safetensors: written by dit_accel.save_attention",
        f"transformer (FluxTransformer2DModel): {SLAAttnProcessor(**SMALL)} on 4 layers",
    ]


@pytest.mark.parametrize("before", ["nothing", "set", "loaded"])
def test_a_load_that_breaks_off_leaves_everything_as_it_was(before, tmp_path, monkeypatch):
    model, inputs = model_and_inputs()
    dense = run(model, inputs)
    if before == "set":
        dit_accel.set_attn_processor(model, CLEARAttnProcessor(radius=2), layers=["transformer_blocks.0.attn"])
    if before == "loaded":
        dit_accel.load_attention(model, write(tmp_path / "clear_local_2_down_2.safetensors", clear_tensors(2)))
    path = write(tmp_path / "clear_local_3_down_4.pth", clear_tensors(4, seed=1))
    count = iter(range(100))

    def read(self):
        if next(count) == 20:
            raise OSError("the disk is gone")
        return self.tensor

    weights = read_weights(path).weights

    class Breaking:
        def __init__(self, tensor):
            self.tensor = tensor

        __call__ = read

    broken = {key: Weight(x.shape, x.dtype, Breaking(x.read())) for key, x in weights.items()}
    monkeypatch.setattr("dit_accel.load.read_weights", lambda path: WeightsFile(path, broken))
    refused(model, inputs, "the disk is gone", path, error=OSError)
    assert next(count) == 21
    dit_accel.reset_attn_processor(model)
    assert torch.equal(run(model, inputs), dense)


def test_linfusion_on_a_part_of_a_unet(tmp_path):
    """A file of two modules leaves the others dense."""
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
