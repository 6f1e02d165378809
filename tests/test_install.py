"""Installing on pipelines and models: selection of layers, refusals, describe, save, load and reset."""

import copy
import json
import math
import pickle
import re
import struct

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, LatteTransformer3DModel, WanPipeline
from safetensors.torch import save_file
from tiny import TINY, run

import dit_accel
from dit_accel import CLEARAttnProcessor, GNAAttnProcessor, LLSAAttnProcessor, SLAAttnProcessor, TokenLayout
from dit_accel.install.installation import installed_layers

GNA = GNAAttnProcessor(window=3)
SLA = SLAAttnProcessor(critical=0.3, block_q=16, block_kv=8)


def wan_pipe():
    """Return a Wan 2.2 pipeline with two denoisers, without the components that these tests do not use."""
    return WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=TINY["wan"](0), transformer_2=TINY["wan"](1), boundary_ratio=0.5,
    )  # fmt: skip


def flux_and_inputs():
    torch.manual_seed(5)
    return TINY["flux"](), TINY["flux"].inputs((7, 10))


def test_all_setters_install_the_same_layers():
    for way in (
        lambda pipe: pipe.set_attn_processor(GNA),
        lambda pipe: [t.set_attn_processor(GNA) for t in (pipe.transformer, pipe.transformer_2)],
        lambda pipe: dit_accel.set_attn_processor(pipe, GNA),
    ):
        pipe = wan_pipe()
        way(pipe)
        for model in (pipe.transformer, pipe.transformer_2):
            assert {name: layer.mechanism for name, layer in installed_layers(model).items()} == {
                "blocks.0.attn1": GNA,
                "blocks.1.attn1": GNA,
            }


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["transformer_blocks.0.attn", "transformer.single_transformer_blocks.1.attn"], [0, 3]),
        (r"single_transformer_blocks\.\d", [2, 3]),
        (re.compile(r"^transformer\.transformer_blocks"), [0, 1]),
        (lambda name: name.endswith(".1.attn"), [1, 3]),
    ],
)
def test_layers_by_name_expression_or_predicate(layers, expected):
    model, _ = flux_and_inputs()
    names = [f"{kind}.{i}.attn" for kind in ("transformer_blocks", "single_transformer_blocks") for i in (0, 1)]
    dit_accel.set_attn_processor(model, GNA, layers=layers)
    assert sorted(installed_layers(model)) == sorted(names[i] for i in expected)


def test_second_mechanism_replaces_named_layers_only():
    model, inputs = flux_and_inputs()
    dense = run(model, inputs)
    model.set_attn_processor(GNA)
    dit_accel.set_attn_processor(model, SLA, layers=r"^transformer\.transformer_blocks")
    assert [layer.mechanism for layer in installed_layers(model).values()] == [SLA, SLA, GNA, GNA]
    mixed = run(model, inputs)
    dit_accel.set_attn_processor(model, GNA)
    assert not torch.equal(run(model, inputs), mixed)
    dit_accel.reset_attn_processor(model)
    assert torch.equal(run(model, inputs), dense)


def test_context_manager_restores_previous_state():
    model, inputs = flux_and_inputs()
    dense = run(model, inputs)
    with dit_accel.attention(model, GNA):
        windowed = run(model, inputs)
    assert torch.equal(run(model, inputs), dense) and not installed_layers(model)
    dit_accel.set_attn_processor(model, SLA, layers=["transformer_blocks.0.attn"])
    layer = installed_layers(model)["transformer_blocks.0.attn"]
    torch.nn.init.normal_(layer.weight)
    before = run(model, inputs)
    with pytest.raises(KeyError), dit_accel.attention(model, GNA):
        assert torch.equal(run(model, inputs), windowed)
        raise KeyError("an exception also restores")
    assert torch.equal(run(model, inputs), before)
    assert installed_layers(model) == {"transformer_blocks.0.attn": layer}


def test_reset_is_idempotent():
    model, inputs = flux_and_inputs()
    dense = run(model, inputs)
    dit_accel.reset_attn_processor(model)
    model.set_attn_processor(GNA)
    dit_accel.reset_attn_processor(model)
    dit_accel.reset_attn_processor(model)
    assert torch.equal(run(model, inputs), dense)


def test_processor_dict_may_include_those_of_diffusers():
    model, inputs = flux_and_inputs()
    dense = run(model, inputs)
    processors = dict(model.attn_processors)
    processors["transformer_blocks.1.attn.processor"] = GNA
    given = dict(processors)
    model.set_attn_processor(processors)
    assert processors == given  # diffusers' own method empties the dict
    assert list(installed_layers(model)) == ["transformer_blocks.1.attn"]
    assert not torch.equal(run(model, inputs), dense)


def test_patched_methods_take_layers_and_reset():
    pipe = wan_pipe()
    pipe.set_attn_processor(GNA, layers=r"^transformer\.blocks\.0")
    assert list(installed_layers(pipe.transformer)) == ["blocks.0.attn1"] and not installed_layers(pipe.transformer_2)
    pipe.transformer_2.set_attn_processor(GNA, layers=["blocks.1.attn1"], layout=TokenLayout((3, 5, 6)))
    assert list(installed_layers(pipe.transformer_2)) == ["blocks.1.attn1"]
    pipe.reset_attn_processor()
    assert not installed_layers(pipe.transformer) and not installed_layers(pipe.transformer_2)
    pipe.transformer.set_attn_processor(GNA)
    pipe.transformer.reset_attn_processor()
    assert not installed_layers(pipe.transformer)
    with pytest.raises(TypeError, match="go with a processor of dit_accel"):
        pipe.transformer.set_attn_processor(pipe.transformer.blocks[0].attn1.processor, layers=["blocks.1.attn1"])


@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_processor_on_a_single_module_is_refused(family):
    model = TINY[family]()
    module = next(part for part in model.modules() if hasattr(part, "set_processor"))
    before = module.processor
    with pytest.raises(TypeError, match=r"to be installed on a model.*layers="):
        module.set_processor(GNA)
    assert module.processor is before
    module.processor = GNA
    with pytest.raises(TypeError, match=r"to be installed on a model.*layers="):
        run(model, TINY[family].inputs(TINY[family].size))


def test_direct_forward_call_raises():
    model, inputs = flux_and_inputs()
    model.set_attn_processor(GNA)
    run(model, inputs)
    with pytest.raises(RuntimeError, match="no token layout"):
        model.forward(**inputs)


def test_other_attention_backend_raises():
    model, inputs = flux_and_inputs()
    model.set_attn_processor(GNA)
    from diffusers.models.attention_dispatch import attention_backend

    run(model, inputs)
    model.set_attention_backend("flex")  # sets diffusers' global default as well
    try:
        with pytest.raises(RuntimeError, match="never called scaled_dot_product_attention"):
            run(model, inputs)
        dit_accel.reset_attn_processor(model)
        model.set_attention_backend("flex")
        model.set_attn_processor(GNA)  # a backend from before the install is replaced
        assert run(model, inputs).isfinite().all()
    finally:
        model.set_attention_backend("native")
    dit_accel.reset_attn_processor(model)
    model.set_attn_processor(GNA)
    with attention_backend("_native_math"):  # a global default does not bypass the installed layers
        assert run(model, inputs).isfinite().all()


def test_context_parallelism_is_refused():
    model, inputs = flux_and_inputs()
    model.set_attn_processor(GNA)
    model.attn_processors["transformer_blocks.0.attn.processor"]._parallel_config = object()
    with pytest.raises(RuntimeError, match="context parallelism"):
        run(model, inputs)


def test_processor_without_sdpa_call_is_refused():
    model = TINY["sd15"]()
    model.set_attention_slice("max")
    with pytest.raises(ValueError, match="does not use torch's scaled_dot_product_attention"):
        model.set_attn_processor(GNA)
    assert not installed_layers(model) and not model._forward_pre_hooks


def test_min_tokens_leaves_small_layers_dense():
    model = TINY["sd15"]()
    torch.manual_seed(6)
    inputs = TINY["sd15"].inputs((10, 14))
    dense = run(model, inputs)
    model.set_attn_processor(GNAAttnProcessor(window=3, min_tokens=141))
    assert torch.equal(run(model, inputs), dense)
    model.set_attn_processor(GNAAttnProcessor(window=3, min_tokens=100))
    assert not torch.equal(run(model, inputs), dense)
    shown = dit_accel.describe(model)
    assert "dense: 35 tokens < min_tokens=100" in shown and "10×14" in shown
    assert 0 < dit_accel.logit_fraction(model) < 1


def test_dense_steps_keep_first_steps_dense():
    model, inputs = flux_and_inputs()
    timesteps = [1.0, 1.0, 0.7, 0.4, 0.1]  # guidance calls the model twice in the first step

    def generation():
        return [run(model, {**inputs, "timestep": torch.full((2,), t)}) for t in timesteps]

    dense = generation()
    model.set_attn_processor(GNA)
    sparse = generation()
    model.set_attn_processor(GNAAttnProcessor(window=3, dense_steps=2))
    for _ in range(2):
        for i, out in enumerate(generation()):
            assert torch.equal(out, (dense if i < 3 else sparse)[i])
    model.train()  # training has random timesteps, so dense_steps is ignored
    assert torch.equal(run(model, {**inputs, "timestep": torch.full((2,), 1.0)}), sparse[0])


def test_dense_steps_count_across_two_denoisers():
    pipe = wan_pipe()
    pipe.set_attn_processor(GNAAttnProcessor(window=3, dense_steps=2))
    inputs = TINY["wan"].inputs((3, 5, 6))
    dense = []
    for model, timestep in [(pipe.transformer, 900), (pipe.transformer, 700), (pipe.transformer_2, 400)] * 2:
        run(model, {**inputs, "timestep": torch.full((2,), timestep)})
        dense.append(installed_layers(model)["blocks.0.attn1"].dense)
    assert dense == [True, True, False] * 2


def test_clear_train_tokens_set_the_paper_scale():
    """The scale is sqrt(log(S, S_train) / D): here S = 77, S_train = 50, D = 16; with pooled tokens, 10·S."""
    model, inputs = flux_and_inputs()
    for pooling, tokens in ((1, 77), (2, 770)):
        scale = math.sqrt(math.log(tokens, 50) / 16)
        model.set_attn_processor(CLEARAttnProcessor(radius=3.0, down_factor=pooling, scale=scale))
        expected = run(model, inputs)
        model.set_attn_processor(CLEARAttnProcessor(radius=3.0, down_factor=pooling, train_tokens=50))
        torch.testing.assert_close(run(model, inputs), expected, atol=1e-6, rtol=1e-6)
        model.set_attn_processor(CLEARAttnProcessor(radius=3.0, down_factor=pooling))
        assert not torch.allclose(run(model, inputs), expected, atol=1e-4)


def test_unknown_model_needs_a_layout():
    latte = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, patch_size=2,
        sample_size=8, cross_attention_dim=16, caption_channels=16, video_length=3,
    ).eval()  # fmt: skip
    with pytest.raises(ValueError, match=r"has no token layout for LatteTransformer3DModel;.*layout="):
        dit_accel.set_attn_processor(latte, GNA)
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 8, 8),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
    }
    torch.nn.init.normal_(latte.proj_out.weight)
    dense = run(latte, inputs)
    spatial = [name for name in ("transformer_blocks.0.attn1",)]
    dit_accel.set_attn_processor(latte, GNA, layers=spatial, layout=TokenLayout((4, 4)))
    changed = run(latte, inputs)
    assert not torch.equal(changed, dense)
    dit_accel.set_attn_processor(latte, GNA, layers=spatial, layout=lambda model, a: TokenLayout((16,)))
    assert not torch.equal(run(latte, inputs), changed)
    dit_accel.set_attn_processor(latte, GNA, layers=spatial, layout=TokenLayout((5, 4)))
    with pytest.raises(ValueError, match="16"):
        run(latte, inputs)
    dit_accel.reset_attn_processor(latte)
    assert torch.equal(run(latte, inputs), dense)


def test_invalid_install_targets_are_refused():
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(TypeError, match="expected a diffusers pipeline or model, got str"):
        dit_accel.set_attn_processor("flux", GNA)
    with pytest.raises(TypeError, match="expected an attention processor of dit_accel"):
        dit_accel.set_attn_processor(TINY["flux"](), object())
    with pytest.raises(ValueError, match="no self-attention layers"):
        dit_accel.set_attn_processor(torch.nn.Linear(2, 2), GNA, layout=TokenLayout((4,)))
    with pytest.raises(ValueError, match="has no token layout for AutoencoderKL;"):
        dit_accel.set_attn_processor(vae, GNA)
    with pytest.raises(ValueError, match=r"did you mean transformer_blocks\.0\.attn"):
        dit_accel.set_attn_processor(TINY["flux"](), GNA, layers=["transformer_blocks.0.atn"])
    with pytest.raises(ValueError, match="selects no self-attention layer"):
        dit_accel.set_attn_processor(TINY["flux"](), GNA, layers="nothing_like_it")


def test_shuffled_position_ids_are_refused():
    model, inputs = flux_and_inputs()
    inputs["img_ids"] = inputs["img_ids"][torch.randperm(70)]
    model.set_attn_processor(GNA)
    with pytest.raises(ValueError, match="row-major"):
        run(model, inputs)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: SLAAttnProcessor(critical=0.0), ValueError),
        (lambda: SLAAttnProcessor(critical=1.5), ValueError),
        (lambda: SLAAttnProcessor(critical=0.95, negligible=0.1), ValueError),
        (lambda: SLAAttnProcessor(feature_map="exp"), ValueError),
        (lambda: SLAAttnProcessor(linear_over="some"), ValueError),
        (lambda: CLEARAttnProcessor(radius=0), ValueError),
        (lambda: CLEARAttnProcessor(radius=float("nan")), ValueError),
        (lambda: CLEARAttnProcessor(radius=-1.0), ValueError),
        (lambda: CLEARAttnProcessor(radius=3, down_factor=0), ValueError),
        (lambda: CLEARAttnProcessor(radius=3, train_tokens=1), ValueError),
        (lambda: CLEARAttnProcessor(radius=3, train_tokens=100, scale=0.1), ValueError),
        (lambda: CLEARAttnProcessor(), TypeError),
        (lambda: LLSAAttnProcessor(block_size=1), ValueError),
        (lambda: LLSAAttnProcessor(levels=0), ValueError),
        (lambda: LLSAAttnProcessor(topk=0), ValueError),
        (lambda: GNAAttnProcessor(window=4, stride=5), ValueError),
        (lambda: GNAAttnProcessor(window=0), ValueError),
        (lambda: GNAAttnProcessor(window="3"), (TypeError, ValueError)),
        (lambda: GNAAttnProcessor(window=3, dense_steps=-1), ValueError),
        (lambda: GNAAttnProcessor(window=3, dense_steps=1.5), TypeError),
        (lambda: GNAAttnProcessor(window=3, min_tokens=-1), ValueError),
        (lambda: GNAAttnProcessor(window=3, reference="half"), ValueError),
        (lambda: GNAAttnProcessor(window=3, scale=float("inf")), ValueError),
        (lambda: GNAAttnProcessor(window=3, wndow=3), TypeError),
    ],
)
def test_invalid_processor_options_are_refused(make, error):
    with pytest.raises(error):
        make()


def test_processors_compare_hash_and_pickle():
    a, b = GNAAttnProcessor(window=[3, 4]), GNAAttnProcessor(window=(3, 4))
    assert a == b and hash(a) == hash(b) and pickle.loads(pickle.dumps(a)) == copy.deepcopy(a) == a
    assert str(a) == "gna(window=(3, 4))"


def test_wrong_number_of_axes_for_a_layer_is_refused():
    model, inputs = flux_and_inputs()
    model.set_attn_processor(GNAAttnProcessor(window=(3, 3, 3)))
    with pytest.raises(ValueError, match="ax"):
        run(model, inputs)


def test_describe_lists_layers_and_layouts():
    pipe = wan_pipe()
    assert re.search(r"transformer: all layers +dense", dit_accel.describe(pipe))
    dit_accel.set_attn_processor(pipe, GNA, layers=r"transformer\.blocks\.0")
    shown = dit_accel.describe(pipe)
    assert "not run yet" in shown and "transformer: blocks.0.attn1" in shown
    assert "transformer: 1 self-attention layers" in shown and "transformer_2: all layers" in shown
    run(pipe.transformer, TINY["wan"].inputs((3, 5, 6)))
    assert "3×5×6" in dit_accel.describe(pipe)


def randomise(model):
    for layer in installed_layers(model).values():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("processor", [SLA, CLEARAttnProcessor(radius=2.0, down_factor=2), GNA])
def test_save_and_load_restore_bitwise(processor, tmp_path):
    model, inputs = flux_and_inputs()
    model.set_attn_processor(processor)
    randomise(model)
    expected = run(model, inputs)
    path = dit_accel.save_attention(model, tmp_path / "new" / "folder")
    assert path.name == "dit_accel.safetensors" and [p.name for p in path.parent.iterdir()] == [path.name]
    other = TINY["flux"]()
    dit_accel.load_attention(other, path.parent)
    assert torch.equal(run(other, inputs), expected)
    dit_accel.load_attention(other, path)  # the file itself, over the same mechanism
    assert torch.equal(run(other, inputs), expected)


def test_pipeline_file_loads_on_pipeline_and_model(tmp_path):
    pipe, inputs = wan_pipe(), TINY["wan"].inputs((3, 5, 6))
    pipe.set_attn_processor(SLA)
    for model in (pipe.transformer, pipe.transformer_2):
        randomise(model)
    expected = [run(model, inputs) for model in (pipe.transformer, pipe.transformer_2)]
    path = dit_accel.save_attention(pipe, tmp_path)
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert {key.split(".")[0] for key in header if key != "__metadata__"} == {"transformer", "transformer_2"}
    fresh = wan_pipe()
    dit_accel.load_attention(fresh, tmp_path)
    assert torch.equal(run(fresh.transformer_2, inputs), expected[1])
    bare = TINY["wan"](1)
    dit_accel.load_attention(bare, tmp_path, component="transformer_2")
    assert torch.equal(run(bare, inputs), expected[1])
    dit_accel.load_attention(bare, tmp_path)
    assert torch.equal(
        installed_layers(bare)["blocks.0.attn1"].weight, installed_layers(pipe.transformer)["blocks.0.attn1"].weight
    )


def saved_sla(tmp_path):
    model, _ = flux_and_inputs()
    model.set_attn_processor(SLA)
    return dit_accel.save_attention(model, tmp_path)


def rewrite(path, change):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def test_unfit_file_is_refused_unchanged(tmp_path):
    path = saved_sla(tmp_path / "good")
    model, inputs = flux_and_inputs()
    dense = run(model, inputs)

    def refused(words, error=ValueError, where=path):
        with pytest.raises(error, match=words):
            dit_accel.load_attention(model, where)
        assert torch.equal(run(model, inputs), dense) and not installed_layers(model)

    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("not a complete safetensors file")
    path.write_bytes(b"hello, this is no safetensors file at all")
    refused("not a complete safetensors file")
    key = "transformer.transformer_blocks.0.attn.dit_accel.weight"
    for change, words in (
        (lambda t, m: t.pop(key), r"missing transformer_blocks.0.attn.dit_accel.weight; unexpected none"),
        (lambda t, m: t.update({"transformer.strange": torch.ones(1)}), "missing none; unexpected strange"),
        (lambda t, m: t.update({key: torch.zeros(32, 32)}), "another model or head size"),
        (lambda t, m: m.update(dit_accel=m["dit_accel"].replace('"sla"', '"magic"')), "mechanism 'magic'; expected"),
        (lambda t, m: m.update(dit_accel=m["dit_accel"].replace('"format": 1', '"format": 9')), "update dit_accel"),
        (lambda t, m: m.pop("dit_accel"), "was not written by dit_accel"),
        (lambda t, m: m.update(dit_accel=m["dit_accel"].replace("blocks.1.attn", "blocks.7.attn")), "lacks"),
    ):
        path.write_bytes(whole)
        rewrite(path, change)
        refused(words)
    refused("no attention file", FileNotFoundError, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"does not fit|lacks"):
        dit_accel.load_attention(TINY["sd3"](), saved_sla(tmp_path / "again"))


def test_load_refuses_another_installed_mechanism(tmp_path):
    path = saved_sla(tmp_path)
    model, inputs = flux_and_inputs()
    model.set_attn_processor(GNA)
    expected = run(model, inputs)
    with pytest.raises(ValueError, match="is for sla, but gna is installed"):
        dit_accel.load_attention(model, path)
    assert torch.equal(run(model, inputs), expected)


def test_reset_restores_overwritten_weights(tmp_path):
    path = saved_sla(tmp_path)
    model, inputs = flux_and_inputs()
    dense, before = run(model, inputs), copy.deepcopy(model.state_dict())
    key = "transformer_blocks.0.attn.to_q.weight"
    rewrite(path, lambda t, m: t.update({f"transformer.{key}": torch.randn(32, 32)}))
    dit_accel.load_attention(model, path)
    assert not torch.equal(model.state_dict()[key], before[key])
    again = dit_accel.save_attention(model, tmp_path / "again")
    other = TINY["flux"]()
    dit_accel.load_attention(other, again)
    assert torch.equal(run(other, inputs), run(model, inputs))
    dit_accel.reset_attn_processor(model)
    assert torch.equal(run(model, inputs), dense)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_failed_save_keeps_the_previous_file(tmp_path, monkeypatch):
    model, _ = flux_and_inputs()
    with pytest.raises(ValueError, match="nothing to save"):
        dit_accel.save_attention(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    model.set_attn_processor(SLA)
    path = dit_accel.save_attention(model, tmp_path)
    whole = path.read_bytes()

    def broken(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(whole[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr("dit_accel.weights.save.save_file", broken)
    with pytest.raises(OSError, match="No space"):
        dit_accel.save_attention(model, tmp_path)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]
