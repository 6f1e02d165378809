"""Installed attention with LoRA, IP-Adapters, offloading, autocast and complete pipelines."""

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from test_families import NARROW, WIDE
from tiny import TINY, flux_inputs, run, unet_inputs

import dit_accel
from dit_accel.install.installation import installed_layers

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)


def add_lora(model):
    torch.manual_seed(11)
    model.add_adapter(LORA)


@pytest.mark.parametrize("family", TINY)
def test_order_of_lora_and_install_does_not_matter(family):
    torch.manual_seed(10)
    inputs = TINY[family].inputs(TINY[family].size)
    plain, before, after = (TINY[family]() for _ in range(3))
    plain.set_attn_processor(NARROW["gna"])
    add_lora(before)
    with_lora_dense = run(before, inputs)
    before.set_attn_processor(NARROW["gna"])
    after.set_attn_processor(NARROW["gna"])
    add_lora(after)
    expected = run(before, inputs)
    torch.testing.assert_close(run(after, inputs), expected, atol=1e-6, rtol=1e-6)
    assert not torch.equal(expected, run(plain, inputs)) and not torch.equal(expected, with_lora_dense)
    for model in (before, after):
        dit_accel.reset_attn_processor(model)
        assert torch.equal(run(model, inputs), with_lora_dense)
    before.delete_adapters("default")
    torch.testing.assert_close(run(before, inputs), run(TINY[family](), inputs), atol=1e-6, rtol=1e-6)


def image_projection(cross, clip):
    return {
        "proj.weight": torch.randn(4 * cross, clip) * 0.3, "proj.bias": torch.randn(4 * cross),
        "norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross),
    }  # fmt: skip


def flux_adapter(model):
    torch.manual_seed(12)
    width, cross = model.inner_dim, model.config.joint_attention_dim
    weights = {}
    for i in range(model.config.num_layers):
        for part in "kv":
            weights[f"{i}.to_{part}_ip.weight"] = torch.randn(width, cross)
            weights[f"{i}.to_{part}_ip.bias"] = torch.randn(width)
    model._load_ip_adapter_weights(
        [{"image_proj": image_projection(cross, 20), "ip_adapter": weights}], low_cpu_mem_usage=False
    )


def unet_adapter(model):
    torch.manual_seed(12)
    cross, weights, key = model.config.cross_attention_dim, {}, 1
    for name in model.attn_processors:
        if not name.endswith("attn2.processor"):
            continue
        width = model.get_submodule(name.removesuffix(".processor")).inner_dim
        weights[f"{key}.to_k_ip.weight"] = torch.randn(width, cross)
        weights[f"{key}.to_v_ip.weight"] = torch.randn(width, cross)
        key += 2
    model._load_ip_adapter_weights(
        [{"image_proj": image_projection(cross, 20), "ip_adapter": weights}], low_cpu_mem_usage=False
    )


def adapter_case(family):
    torch.manual_seed(13)
    embeds = [torch.randn(2, 1, 20)]
    if family == "flux":
        return flux_adapter, {**flux_inputs((7, 10)), "joint_attention_kwargs": {"ip_adapter_image_embeds": embeds}}
    return unet_adapter, {**unet_inputs((10, 14)), "added_cond_kwargs": {"image_embeds": embeds}}


def run_with_adapter(model, inputs):
    copied = {key: dict(value) if isinstance(value, dict) else value for key, value in inputs.items()}
    return run(model, copied)


@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_order_of_ip_adapter_and_install_does_not_matter(family):
    load, inputs = adapter_case(family)
    before, after = TINY[family](), TINY[family]()
    load(before)
    dense = run_with_adapter(before, inputs)
    state = {key: value.clone() for key, value in before.state_dict().items()}
    before.set_attn_processor(NARROW["gna"])
    assert list(before.state_dict()) == list(state)
    expected = run_with_adapter(before, inputs)
    assert not torch.equal(expected, dense)
    after.set_attn_processor(NARROW["gna"])
    load(after)
    torch.testing.assert_close(run_with_adapter(after, inputs), expected, atol=1e-6, rtol=1e-6)
    without = {key: value for key, value in inputs.items() if not key.endswith("kwargs")}
    if family == "flux":  # the image prompt changes the output
        assert not torch.equal(run(TINY[family](), without), dense)
    before.set_attn_processor(WIDE["gna"])
    torch.testing.assert_close(run_with_adapter(before, inputs), dense, atol=1e-5, rtol=1e-5)
    for model in (before, after):
        dit_accel.reset_attn_processor(model)
        assert torch.equal(run_with_adapter(model, inputs), dense)
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("order", ["install first", "offload first"])
@pytest.mark.parametrize("kind", ["model", "sequential", "group block_level", "group leaf_level"])
def test_offloading_keeps_the_output(kind, order):
    model = TINY["flux"]()
    torch.manual_seed(14)
    inputs = TINY["flux"].inputs((7, 10))

    def install():
        model.set_attn_processor(NARROW["sla"])
        for layer in installed_layers(model).values():
            torch.manual_seed(15)
            torch.nn.init.normal_(layer.weight)

    def offload():
        if kind == "model":
            cpu_offload_with_hook(model, "cpu")
        elif kind == "sequential":
            cpu_offload(model, "cpu")
        else:
            options = {"num_blocks_per_group": 1} if "block" in kind else {}
            apply_group_offloading(model, torch.device("cpu"), offload_type=kind.split()[1], **options)

    plain = TINY["flux"]()
    plain.set_attn_processor(NARROW["sla"])
    for layer in installed_layers(plain).values():
        torch.manual_seed(15)
        torch.nn.init.normal_(layer.weight)
    for act in (install, offload) if order == "install first" else (offload, install):
        act()
    assert torch.equal(run(model, inputs), run(plain, inputs))


def wan_pipeline():
    torch.manual_seed(16)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=TINY["wan"](0), transformer_2=TINY["wan"](1), boundary_ratio=0.5,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pipeline_with_guidance_and_two_denoisers():
    pipe = wan_pipeline()
    torch.manual_seed(17)
    call = {
        "prompt_embeds": torch.randn(2, 9, 24), "negative_prompt_embeds": torch.randn(2, 9, 24), "guidance_scale": 3.0,
        "height": 64, "width": 96, "num_frames": 5, "num_inference_steps": 3, "output_type": "latent",
    }  # fmt: skip

    def draw():
        return pipe(**call, generator=torch.Generator().manual_seed(0)).frames

    dense = draw()
    for name, processor in NARROW.items():
        with dit_accel.attention(pipe, processor):
            assert not torch.equal(draw(), dense), name
        with dit_accel.attention(pipe, WIDE[name]):
            torch.testing.assert_close(draw(), dense, atol=2e-4, rtol=2e-4)
    assert torch.equal(draw(), dense)


def test_autocast_stays_close_to_float32():
    model = TINY["flux"]()
    torch.manual_seed(18)
    inputs = TINY["flux"].inputs((7, 10))
    exact = run(model, inputs)
    for processor in WIDE.values():
        with dit_accel.attention(model, processor), torch.autocast("cpu", torch.bfloat16):
            out = run(model, inputs)
        assert (out.float() - exact).abs().max() < 0.1


def test_bfloat16_model_returns_bfloat16():
    model = TINY["wan"]().to(torch.bfloat16)
    inputs = TINY["wan"].inputs((3, 5, 6))
    inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    for processor in NARROW.values():
        model.set_attn_processor(processor)
        out = run(model, inputs)
        assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_only_key_masks_of_the_model_are_accepted():
    """A U-Net passes its attention_mask to self-attention as an additive bias over the keys."""
    model = TINY["sd15"]()
    torch.manual_seed(19)
    keep = torch.ones(2, 140)
    keep[1, 100:] = 0
    layer_input = torch.randn(2, 140, 32)
    attn = model.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1")
    bias = ((1 - keep) * -10000.0)[:, None]
    expected = attn(layer_input, attention_mask=bias)
    model.set_attn_processor(WIDE["gna"])
    attn.dit_accel.slot.layout = dit_accel.TokenLayout((10, 14))
    torch.testing.assert_close(attn(layer_input, attention_mask=bias), expected, atol=1e-5, rtol=1e-5)
    for mask, words in (
        (torch.randn(2, 140, 140), "masks that hide whole keys"),
        (bias / 20000, "neither 0 nor a mask"),
    ):
        with pytest.raises(ValueError, match=words):
            attn(layer_input, attention_mask=mask)
