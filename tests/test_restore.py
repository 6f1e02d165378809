"""What is brought back: by leaving a context, by reset, after fusing; and one model used by several threads."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import SD3Transformer2DModel
from test_install import GNA, SLA, flux_and_inputs, rewrite, saved_sla
from tiny import TEXT, TINY, run, sd3_inputs

import dit_accel
from dit_accel import GNAAttnProcessor, TokenLayout
from dit_accel.install.installation import installed_layers

TALL, WIDE = (TokenLayout(grid, before=TEXT) for grid in ((7, 10), (10, 7)))
KEY = "transformer_blocks.0.attn.to_q.weight"


def file_with_host_weights(folder, size=1.0):
    """SLA on all layers and another query projection in the first."""
    path = saved_sla(folder)
    rewrite(path, lambda tensors, _: tensors.update({f"transformer.{KEY}": size * torch.randn(32, 32)}))
    return path


def copies_of_weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_weights_equal(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert [name for name, value in after.items() if not torch.equal(value, before[name])] == []


def test_leaving_a_context_restores_the_layout():
    model, inputs = flux_and_inputs()
    dit_accel.set_attn_processor(model, GNA, layout=WIDE)
    expected = run(model, inputs)
    with dit_accel.attention(model, GNA, layout=TALL):
        inside = run(model, inputs)
    assert not torch.equal(inside, expected)
    assert torch.equal(run(model, inputs), expected)


def test_two_layouts_by_hand_stay_with_their_layers():
    model, inputs = flux_and_inputs()
    double, single = r"\.transformer_blocks", r"single_transformer_blocks"
    outputs = []
    for first, second in ((TALL, TALL), (TALL, WIDE), (WIDE, WIDE)):
        dit_accel.set_attn_processor(model, GNA, layers=double, layout=first)
        dit_accel.set_attn_processor(model, GNA, layers=single, layout=second)
        outputs.append(run(model, inputs))
    assert not torch.equal(outputs[1], outputs[0]) and not torch.equal(outputs[1], outputs[2])
    read = {name: layer.slot.last for name, layer in installed_layers(model).items()}
    assert len(set(read.values())) == 1 and len(model._dit_accel.hooks) == 1  # hooks without layers are gone


def test_weights_loaded_inside_a_context_leave_with_it(tmp_path):
    path = file_with_host_weights(tmp_path)
    model, inputs = flux_and_inputs()
    dense, before = run(model, inputs), copies_of_weights(model)
    with dit_accel.attention(model, SLA):
        dit_accel.load_attention(model, path)
        loaded = run(model, inputs)
        assert not torch.equal(model.state_dict()[KEY], before[KEY])
    assert torch.equal(run(model, inputs), dense)
    assert_weights_equal(model, before)
    dit_accel.load_attention(model, path)
    other = file_with_host_weights(tmp_path / "other", size=2.0)
    with dit_accel.attention(model, SLA):
        dit_accel.load_attention(model, other)
        assert not torch.equal(run(model, inputs), loaded)
    assert torch.equal(run(model, inputs), loaded)
    dit_accel.reset_attn_processor(model)
    assert_weights_equal(model, before)


@pytest.mark.parametrize("then", ["nothing", "set", "load"])
def test_reset_inside_a_context_is_undone_after_it(then, tmp_path):
    path = file_with_host_weights(tmp_path)
    model, inputs = flux_and_inputs()
    dense, before = run(model, inputs), copies_of_weights(model)
    dit_accel.load_attention(model, path)
    layers, loaded = installed_layers(model), run(model, inputs)
    with dit_accel.attention(model, GNA):
        dit_accel.reset_attn_processor(model)
        assert torch.equal(run(model, inputs), dense)
        if then == "set":
            model.set_attn_processor(GNA)
        elif then == "load":
            dit_accel.load_attention(model, file_with_host_weights(tmp_path / "other", size=2.0))
    assert torch.equal(run(model, inputs), loaded) and installed_layers(model) == layers
    dit_accel.reset_attn_processor(model)
    assert torch.equal(run(model, inputs), dense)
    assert_weights_equal(model, before)


def sd3_that_fuses():
    torch.manual_seed(3)
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=12, out_channels=4,
        pos_embed_max_size=16,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("again", [False, True])
def test_unfusing_after_a_reset_gives_the_host_back(again):
    model, inputs = sd3_that_fuses(), sd3_inputs((7, 10))
    dense, originals = run(model, inputs), dict(model.attn_processors)
    model.set_attn_processor(GNA)
    sparse = run(model, inputs)
    model.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match="were replaced after dit_accel was installed"):
        run(model, inputs)
    if again:  # over the fused processors
        model.set_attn_processor(GNA)
        torch.testing.assert_close(run(model, inputs), sparse)
        model.unfuse_qkv_projections()
        assert torch.equal(run(model, inputs), sparse)
    dit_accel.reset_attn_processor(model)
    if not again:
        model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), dense) and model.attn_processors == originals


def test_reset_puts_weights_back_below_a_fused_lora(tmp_path):
    from peft import LoraConfig

    model, inputs = flux_and_inputs()
    before = copies_of_weights(model)
    dit_accel.load_attention(model, file_with_host_weights(tmp_path))
    torch.manual_seed(4)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    reference = TINY["flux"]()
    torch.manual_seed(4)
    reference.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    expected = run(reference, inputs)
    model.fuse_lora()
    dit_accel.reset_attn_processor(model)
    torch.testing.assert_close(run(model, inputs), expected)
    model.unfuse_lora()
    base = KEY.replace(".weight", ".base_layer.weight")
    torch.testing.assert_close(model.state_dict()[base], before[KEY], atol=1e-6, rtol=0)


def test_reset_warns_of_a_merged_lora_that_it_drops(tmp_path, caplog):
    from peft import LoraConfig

    model, inputs = flux_and_inputs()
    dense, before = run(model, inputs), copies_of_weights(model)
    dit_accel.load_attention(model, file_with_host_weights(tmp_path))
    model.to(torch.bfloat16).float()  # not a change of its own
    dit_accel.reset_attn_processor(model)
    assert "changed afterwards" not in caplog.text
    dit_accel.load_attention(model, file_with_host_weights(tmp_path / "again"))
    with torch.no_grad():
        for name, value in before.items():
            if name != KEY:
                model.get_parameter(name).copy_(value)
    model.add_adapter(LoraConfig(r=2, target_modules=["transformer_blocks.0.attn.to_q"], init_lora_weights=False))
    model.fuse_lora()
    model.unload_lora()
    dit_accel.reset_attn_processor(model)
    assert "changed afterwards" in caplog.text and KEY in caplog.text
    assert torch.equal(run(model, inputs), dense)
    assert_weights_equal(model, before)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_model_with_a_layout_by_hand_can_be_copied(way):
    model, inputs = flux_and_inputs()
    dit_accel.set_attn_processor(model, GNA, layout=WIDE)
    expected = run(model, inputs)
    other = way(model)
    dit_accel.reset_attn_processor(model)
    assert torch.equal(run(other, inputs), expected)
    dit_accel.reset_attn_processor(other)
    assert torch.equal(run(other, inputs), run(model, inputs))


def test_whether_steps_count_follows_the_layers():
    model, _ = flux_and_inputs()
    model.set_attn_processor(GNAAttnProcessor(window=3, dense_steps=2))
    with dit_accel.attention(model, GNA):
        assert not model._dit_accel.steps.counts
    assert model._dit_accel.steps.counts


def test_no_layers_at_all_are_refused():
    model, _ = flux_and_inputs()
    with pytest.raises(ValueError, match="layers= is empty"):
        dit_accel.set_attn_processor(model, GNA, layers=[])


def together(model, blocks, calls):
    """The result of each call in a thread of its own; no block runs before all threads have begun their forward."""
    barrier = threading.Barrier(len(calls))
    arrived = threading.local()

    def wait(*_):
        if not getattr(arrived, "once", False):
            arrived.once = True
            barrier.wait(60)

    handle = blocks[0].register_forward_pre_hook(wait)
    try:
        with ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(lambda call: call(), calls))
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_threads_share_a_model_each_with_its_own_layout(family):
    model = TINY[family]()
    model.set_attn_processor(GNA)
    blocks = model.transformer_blocks if family == "flux" else model.blocks
    given = [TINY[family].inputs(size) for size in (TINY[family].size, TINY[family].other_size)]
    expected = [run(model, inputs) for inputs in given]
    found = together(model, blocks, [lambda x=inputs: run(model, x) for inputs in given])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_threads_share_compiled_blocks():
    torch._dynamo.reset()
    model = TINY["wan"]()
    model.set_attn_processor(GNA)
    given = [TINY["wan"].inputs(size) for size in (TINY["wan"].size, TINY["wan"].other_size)]
    expected = [run(model, inputs) for inputs in given]
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert all(torch.equal(run(model, inputs), out) for inputs, out in zip(given, expected, strict=True))
    found = together(model, [model.patch_embedding], [lambda x=inputs: run(model, x) for inputs in given])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_threads_count_their_denoising_steps_apart():
    model, inputs = flux_and_inputs()
    model.set_attn_processor(GNAAttnProcessor(window=3, dense_steps=1))
    first, second, lower = ({**inputs, "timestep": torch.full((2,), t)} for t in (1.0, 0.5, 0.4))
    expected = [run(model, first), run(model, second)]  # dense, sparse
    run(model, first)
    with ThreadPoolExecutor(1) as pool:  # the first step of another generation
        dense = pool.submit(run, model, lower).result()
    assert torch.equal(run(model, second), expected[1])
    dit_accel.reset_attn_processor(model)
    assert torch.equal(run(model, lower), dense)


def test_threads_train_one_checkpointed_model():
    model = TINY["flux"]().train()
    model.set_attn_processor(GNA)
    model.enable_gradient_checkpointing()
    function = model._gradient_checkpointing_func
    given = [TINY["flux"].inputs(size) for size in ((7, 10), (10, 7))]

    def gradient(inputs):
        x = inputs["hidden_states"].clone().requires_grad_()
        out = model(**{**inputs, "hidden_states": x}, return_dict=False)[0]
        return torch.autograd.grad(out.square().sum(), x)[0]

    expected = [gradient(inputs) for inputs in given]
    found = together(model, model.transformer_blocks, [lambda x=inputs: gradient(x) for inputs in given])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert model._gradient_checkpointing_func is function


def test_flux_under_inference_mode_equals_no_grad():
    model, inputs = flux_and_inputs()
    model.set_attn_processor(GNA)
    expected = run(model, inputs)
    with torch.inference_mode():
        again = {name: value.clone() for name, value in inputs.items()}  # inference tensors
        assert torch.equal(run(model, again), expected)
        again["img_ids"][:] = TINY["flux"].inputs((10, 7))["img_ids"]  # changed in place: read anew
        changed = run(model, again)
    assert torch.equal(changed, run(model, {**inputs, "img_ids": again["img_ids"].clone()}))
