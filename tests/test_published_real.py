"""Published weights: files with the keys and shapes of the real releases fit models of the real configurations."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from published_files import (
    TURBO,
    WAN_1_3B,
    WAN_14B,
    clear_shapes,
    fastvideo_name,
    find_here,
    linfusion_shapes,
    listing,
    modules_list,
    on_meta,
    self_attention,
    wan_shapes,
)

from dit_accel import CLEARAttnProcessor
from dit_accel.weights.plan_checks import check_fit
from dit_accel.weights.published import RELEASES, clear, fastvideo, linfusion, recognise, turbodiffusion
from dit_accel.weights.tensors import Weight, WeightsFile

sweep = pytest.mark.sweep


def fits(release, model, shapes, name, options=None, config=None):
    """Plan and check a listing without data; a missing weight, another shape or an int8 dtype must not fit."""
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
        with pytest.raises(ValueError, match=r"missing|names were found"):
            plan_of({other: x for other, x in weights.items() if other != key})
        shape = weights[key].shape
        with pytest.raises(ValueError, match=r"but the model needs|spatial_weight must be"):
            plan_of(weights | {key: Weight((*shape[:-1], shape[-1] + 1), torch.bfloat16, weights[key].read)})
        with pytest.raises(ValueError, match=r"expected a floating-point dtype"):
            plan_of(weights | {key: Weight(shape, torch.int8, weights[key].read)})
    return plan


@pytest.mark.parametrize(
    ("radius", "factor"),
    [(32, 1), (16, 4), *(pytest.param(*case, marks=sweep) for case in ((8, 1), (16, 1), (8, 4)))],
)
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


@pytest.mark.parametrize(
    "name, quantized",
    [
        ("2.1 1.3B", True),
        ("2.1 I2V 14B", False),
        *(pytest.param(name, True, marks=sweep) for name in ("2.1 14B", "2.1 I2V 14B")),
        *(pytest.param(name, False, marks=sweep) for name in ("2.1 1.3B", "2.1 14B", "2.2 A14B")),
        ("2.2 A14B", True),
    ],
)
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


@pytest.mark.parametrize("name", ["2.1 1.3B", *(pytest.param(name, marks=sweep) for name in ("2.1 14B", "2.2 A14B"))])
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
def test_fastvideo_names_of_image_to_video(theirs, ours):
    _, model = real_wan("2.1 I2V 14B")
    assert fastvideo.diffusers_name(theirs) == ours and ours in dict(model.named_parameters())


UNET = {  # real U-Nets: number of self-attention modules, and configuration
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


@pytest.mark.parametrize(
    "version, mid_scale",
    [
        ("1.5", None),
        ("2.1", 16),
        pytest.param("1.5", 16, marks=sweep),
        pytest.param("2.1", None, marks=sweep),
        pytest.param("XL", None, marks=sweep),
        ("XL", 16),
    ],
)
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
