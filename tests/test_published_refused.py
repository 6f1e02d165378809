"""Published weights: files that do not fit are refused before anything changes; adapters and processors are kept."""

import copy

import pytest
import torch
from peft import LoraConfig
from published_files import (
    SMALL,
    clear_tensors,
    draw,
    fastvideo_name,
    in_shards,
    linfusion_shapes,
    model_and_inputs,
    modules_list,
    on_meta,
    self_attention,
    wan_shapes,
    wan_size,
    write,
)
from tiny import TINY, run

import dit_accel
from dit_accel import CLEARAttnProcessor, GNAAttnProcessor, SLAAttnProcessor
from dit_accel.install.installation import installed_layers
from dit_accel.weights.tensors import Weight, WeightsFile, find_weights, read_weights


def refused(model, inputs, words, *arguments, error=ValueError, **options):
    """Check that loading raises with these words, and that the model is unchanged bitwise."""
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
        ("mine", 1, None, {}, r"name does not contain the radius.*load_attention\(pipe, file, radius=16\)"),
        ("mine", 4, None, {}, r"radius=16, down_factor=4\)"),
        ("mine", 1, None, {"down_factor": 1}, "name does not contain the radius"),
        (
            "mine",
            4,
            None,
            {"radius": 3, "down_factor": 2},
            r"weights of 4×4 tiles, but down_factor=2 was passed: pass do",
        ),
        ("mine", 1, None, {"radius": 3, "down_factor": 4}, r"no spatial_weight, that is.*down_factor=4 was passed"),
        ("clear_local_3_down_4", 1, None, {}, "no spatial_weight.*down_factor=4 was in its name: pass down_factor=1"),
        ("clear_local_3", 2, None, {}, "weights of 2×2 tiles, but down_factor=1 was in its name"),
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
            "is torch.int64; expected a fl",
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
def test_unfit_clear_file_is_refused(name, factor, change, options, words, tmp_path):
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
        (False, lambda t: t | {"patch_embedding.weight": torch.ones(32, 36)}, {}, r"is \(32, 36\), but the model"),
        (False, lambda t: t | {"blocks.0.attn1.to_q.bias": torch.ones(32)}, {}, "twice, as blocks.0.self_attn.q.bias"),
        (False, None, {"topk": 0.1}, "is for sla, which has no option 'topk'"),
        (False, None, {"critical": 0}, "critical must be in"),
        (
            True,
            lambda t: without(t, "blocks.0.self_attn.q.scale"),
            {},
            r"with scale None; expected an int8 matrix and .*\(1, 1\)",
        ),
        (True, lambda t: t | {"blocks.0.ffn.0.scale": torch.ones(2, 1)}, {}, r"with scale \(2, 1\); expected an int8"),
        (True, lambda t: t | {"blocks.0.ffn.0.int8_weight": torch.ones(48, 32)}, {}, "is torch.float32"),
        (
            True,
            lambda t: without(t, "blocks.0.ffn.0.int8_weight"),
            {},
            "missing .*net.0.proj.weight; unexpected .*scale",
        ),
    ],
)
def test_unfit_turbodiffusion_file_is_refused(quantized, change, options, words, tmp_path):
    model, inputs = model_and_inputs("wan")
    tensors = draw(wan_shapes(**wan_size(model), quantized=quantized))
    path = write(tmp_path / "turbo.pth", change(tensors) if change else tensors)
    refused(model, inputs, words, path, **options)


def test_incomplete_fastvideo_file_is_refused(tmp_path):
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
        (None, lambda c: None, {}, r"expected a config.json with a modules_list.*found none.*or pass layers=\[...\]"),
        (None, lambda c: {"modules_list": 3}, {}, "expected a config.json with a modules_list.*found none"),
        (
            None,
            lambda c: {"modules_list": c["modules_list"][:3]},
            {},
            "has modules 0, 1, 2, 3, but 3 names were found",
        ),
        (None, lambda c: None, {"layers": ["a"]}, "but 1 names were found"),
        (None, lambda c: None, {"layers": list("abcd")}, "self-attention modules that this UNet2D.* lacks: a, b, c, d"),
        (None, lambda c: entry(c, 1, module_name=c["modules_list"][0]["module_name"]), {}, "its modules must differ"),
        (None, lambda c: entry(c, 1, heads=7), {}, "has 7 heads in .*, but this U-Net has 2: it is for another one"),
        (lambda t: without(t, "2.to_v.weight"), None, {}, r"missing .*attn1.to_v.weight; unexpected none"),
        (lambda t: without(t, "2.to_q_.0.weight"), None, {}, r"missing .*attn1.dit_accel.to_q_.0.weight"),
        (lambda t: without(t, "2.to_k_.3.bias"), None, {}, r"missing .*attn1.dit_accel.to_k_.3.bias"),
        (lambda t: t | {"2.to_v.bias": torch.ones(64)}, None, {}, r"missing none; unexpected .*attn1.to_v.bias"),
        (lambda t: t | {"9.to_v.weight": torch.ones(64)}, None, {}, "has modules 0, 1, 2, 3, 9, but 4"),
        (lambda t: t | {"strange": torch.ones(64)}, None, {}, "unexpected strange"),
        (lambda t: t | {"0.to_q_.1.bias": torch.ones(3)}, None, {}, r"to_q_.1.bias is \(3,\), but .* needs \(32,\)"),
        (None, None, {"projection_mid_dim": 32}, "leave it out"),
        (None, None, {"radius": 32}, "is for linfusion, which has no option 'radius'; it has: .*layers"),
        (None, None, {"scale": 2.0}, "no logits to scale"),
        (None, None, {"backend": "tritn"}, "did you mean 'triton'"),
    ],
)
def test_unfit_linfusion_file_is_refused(change, config, options, words, tmp_path):
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


def test_releases_are_refused_by_other_models(tmp_path):
    for name, path in files_of_all(tmp_path).items():
        for family in ("flux", "wan", "sd15", "sd3", "wan_vace"):
            model, inputs = model_and_inputs(family)
            if name.startswith(family) and family != "wan_vace":
                assert dit_accel.load_attention(model, path).parts
                assert not torch.equal(run(model, inputs), run(model_and_inputs(family)[0], inputs))
                continue
            words = rf"{path.name} is of .* and needs a \w+, got \w+: {type(model).__name__}"
            refused(model, inputs, words, path)


def test_unknown_and_damaged_files_are_refused(tmp_path):
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
    content = good.read_bytes()
    good.write_bytes(content[: len(content) // 2])
    refused(model, inputs, "is not a complete file of torch.save|is damaged", good)
    good.write_bytes(b"")
    refused(model, inputs, "is not a complete file of torch.save|is damaged", good)
    torch.save([1, 2], tmp_path / "list.pth")
    refused(model, inputs, "has list; expected a state dict", tmp_path / "list.pth")
    torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "nested.pth")
    refused(model, inputs, "a dict with values other than tensors; expected a state dict", tmp_path / "nested.pth")
    torch.save({"a": Harmful()}, tmp_path / "code.pth")
    refused(model, inputs, "which dit_accel does not load: they can run code", tmp_path / "code.pth")
    assert not Harmful.ran


class Harmful:
    ran = False

    def __reduce__(self):
        return (setattr, (Harmful, "ran", True))


def test_legacy_torch_save_file_is_read(tmp_path):
    tensors = clear_tensors()
    torch.save(tensors, tmp_path / "clear_local_3.bin", _use_new_zipfile_serialization=False)
    found = read_weights(tmp_path / "clear_local_3.bin").weights
    assert found.keys() == tensors.keys() and torch.equal(found[Q].read(), tensors[Q])


def test_folder_needs_exactly_one_weights_file(tmp_path, monkeypatch):
    model, inputs = model_and_inputs()
    refused(model, inputs, "no attention file at", tmp_path, error=FileNotFoundError)
    refused(model, inputs, "no attention file at", "nowhere.safetensors", error=FileNotFoundError)
    refused(model, inputs, "no attention file at", "not/here.safetensors", error=FileNotFoundError)
    refused(model, inputs, "no attention file at", "owner/name/folder", error=FileNotFoundError)
    write(tmp_path / "clear_local_3.safetensors", clear_tensors())
    assert find_weights(tmp_path).name == "clear_local_3.safetensors"
    write(tmp_path / "clear_local_8.pth", clear_tensors())
    refused(model, inputs, r"several weights files, clear_local_3.safetensors, clear_local_8.pth: give", tmp_path)
    write(tmp_path / "dit_accel.safetensors", clear_tensors())
    assert find_weights(tmp_path).name == "dit_accel.safetensors"
    folder = in_shards(tmp_path / "shards", clear_tensors())
    next(folder.glob("*00002*")).unlink()
    refused(model, inputs, "is not a complete safetensors file", folder)
    next(folder.glob("*index*")).write_text("{}")
    refused(model, inputs, "is not an index of safetensors shards", folder)
    next(folder.glob("*index*")).write_text("{")
    refused(model, inputs, "is not a JSON file", folder)


def test_hub_names_are_downloaded(tmp_path, monkeypatch):
    """``owner/repository/file`` and the config.json in its folder are downloaded; the hub itself is replaced."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    write(tmp_path / "ckpt" / "clear_local_3.safetensors", clear_tensors())
    downloads = []

    def download(repository, file):
        downloads.append((repository, file))
        if not (tmp_path / file).is_file():
            raise EntryNotFoundError(f"no {file}")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model, _ = model_and_inputs()
    report = dit_accel.load_attention(model, "Huage001/CLEAR/ckpt/clear_local_3.safetensors")
    assert report.parts[0].processors["transformer_blocks.0.attn"] == CLEARAttnProcessor(radius=3)
    assert downloads == [("Huage001/CLEAR", f"ckpt/{name}") for name in ("clear_local_3.safetensors", "config.json")]
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded from the hub: no dit_accel.safetensors"):
        dit_accel.load_attention(model, "Huage001/CLEAR")


def test_conflicting_model_state_is_refused(tmp_path):
    files = files_of_all(tmp_path)
    model, inputs = model_and_inputs()
    model.set_attn_processor(GNAAttnProcessor(window=3))
    refused(model, inputs, r"is for clear, but gna is installed on .*reset_attn_processor", files["flux"])
    for family in ("flux", "wan", "sd15"):
        model, inputs = model_and_inputs(family)
        model.fuse_qkv_projections()
        refused(model, inputs, r"are fused: call unfuse_qkv_projections\(\) first", files[family])
        model.unfuse_qkv_projections()
        assert dit_accel.load_attention(model, files[family]).parts
        model, inputs = model_and_inputs(family)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        refused(model, inputs, r"an adapter wraps \(.*base_layer.*unload or fuse the LoRA first", files[family])
    model, inputs = model_and_inputs("sd15")
    model.set_attention_slice("max")
    refused(model, inputs, "LinFusion supports only .* of U-Nets.*got SlicedAttnProcessor", files["sd15"])
    with pytest.raises(ValueError, match=r"attn\.to_\w.\w+, which is offloaded.*load the attention first"):
        dit_accel.load_attention(on_meta(TINY["flux"].build), files["flux"])
    model, _ = model_and_inputs()
    model.transformer_blocks[0].attn.to_q.weight = torch.nn.Parameter(torch.zeros(32, 32).char(), requires_grad=False)
    with pytest.raises(ValueError, match=rf"{Q}, which is quantized: load the attention first"):
        dit_accel.load_attention(model, files["flux"])


def test_lora_added_after_load_survives_reset(tmp_path):
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


def test_own_file_refuses_options(tmp_path):
    model, inputs = model_and_inputs()
    model.set_attn_processor(SLAAttnProcessor(**SMALL))
    path = dit_accel.save_attention(model, tmp_path)
    dit_accel.reset_attn_processor(model)
    refused(model, inputs, "has its own options; expected no others, got critical", path, critical=0.5)
    report = dit_accel.load_attention(model, path)
    assert report.parts[0].model == "FluxTransformer2DModel" and len(report.parts[0].learned) == 8
    assert str(report).splitlines()[:2] == [
        "dit_accel.safetensors: written by dit_accel.save_attention",
        f"transformer (FluxTransformer2DModel): {SLAAttnProcessor(**SMALL)} on 4 layers",
    ]


@pytest.mark.parametrize("before", ["nothing", "set", "loaded"])
def test_failed_load_restores_the_model(before, tmp_path, monkeypatch):
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
    monkeypatch.setattr("dit_accel.weights.load.read_weights", lambda path: WeightsFile(path, broken))
    refused(model, inputs, "the disk is gone", path, error=OSError)
    assert next(count) == 21
    dit_accel.reset_attn_processor(model)
    assert torch.equal(run(model, inputs), dense)
