"""Each mechanism on tiny random models of each family: install, reset, layouts, training, copies and saving."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tiny import TEXT, TINY, flux_inputs, run, wan_inputs
from torch.overrides import TorchFunctionMode

import dit_accel
from dit_accel import TokenLayout
from dit_accel.install.installation import installed_layers
from dit_accel.mechanisms import clear, gna, llsa, sla

NARROW = {
    "sla": dit_accel.SLAAttnProcessor(critical=0.3, negligible=0.2, block_q=16, block_kv=8),
    "clear": dit_accel.CLEARAttnProcessor(radius=2.5),
    "llsa": dit_accel.LLSAAttnProcessor(block_size=4, topk=2),
    "gna": dit_accel.GNAAttnProcessor(window=3, stride=2),
}
WIDE = {
    "sla": dit_accel.SLAAttnProcessor(critical=1.0, negligible=0.0),
    "clear": dit_accel.CLEARAttnProcessor(radius=1000.0),
    "llsa": dit_accel.LLSAAttnProcessor(topk=10**6, enrich=False),
    "gna": dit_accel.GNAAttnProcessor(window=1000),
}
REFERENCE = {"sla": sla.reference, "clear": clear.reference, "llsa": llsa.reference, "gna": gna.reference}
# expected layouts: number of tokens -> (grid, tokens before, tokens after)
LAYOUTS = {
    "flux": {77: ((7, 10), TEXT, 0)},
    "sd3": {77: ((7, 10), 0, TEXT), 70: ((7, 10), 0, 0)},
    "sd15": {140: ((10, 14), 0, 0), 35: ((5, 7), 0, 0)},
    "sdxl": {54: ((6, 9), 0, 0)},
    "wan": {90: ((3, 5, 6), 0, 0)},
    "wan_i2v": {90: ((3, 5, 6), 0, 0)},
    "wan_vace": {90: ((3, 5, 6), 0, 0)},
}
families = pytest.mark.parametrize("family", TINY)
mechanisms = pytest.mark.parametrize("name", NARROW)
# each family and each mechanism at least once; all pairs in test_layouts_match_reference
PAIRS = {
    ("flux", "sla"), ("flux", "llsa"), ("sd3", "clear"), ("sd15", "gna"), ("sd15", "sla"), ("sdxl", "sla"),
    ("wan", "llsa"), ("wan_i2v", "gna"), ("wan_vace", "clear"),
}  # fmt: skip
pairs = pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=() if (family, name) in PAIRS else pytest.mark.sweep)
        for name in NARROW
        for family in TINY
    ],
)


def model_and_inputs(family, seed=0, **options):
    torch.manual_seed(seed + 1)
    return TINY[family](seed), TINY[family].inputs(TINY[family].size, **options)


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pairs
def test_reset_restores_bitwise(family, name):
    model, inputs = model_and_inputs(family)
    dense, before = run(model, inputs), {key: value.clone() for key, value in model.state_dict().items()}
    processors, attributes, hook_count = dict(model.attn_processors), set(model.__dict__), hooks(model)
    model.set_attn_processor(NARROW[name])
    assert len(installed_layers(model)) == TINY[family].layers
    changed = run(model, inputs)
    assert changed.isfinite().all() and (changed - dense).abs().max() > 1e-4
    dit_accel.reset_attn_processor(model)
    assert torch.equal(run(model, inputs), dense)
    assert all(model.attn_processors[key] is value for key, value in processors.items())
    assert hooks(model) == hook_count and set(model.__dict__) == attributes
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


@pairs
def test_unlimited_options_match_dense_attention(family, name):
    model, inputs = model_and_inputs(family)
    dense = run(model, inputs)
    dit_accel.set_attn_processor(model, WIDE[name])
    torch.testing.assert_close(run(model, inputs), dense, atol=1e-5, rtol=1e-5)


def query_key_value(query, key, value, *_, **__):
    return query, key, value


class ReferenceInstead(TorchFunctionMode):
    """Replace each self-attention with a length in ``layouts`` by the reference mechanism."""

    def __init__(self, name, layouts):
        super().__init__()
        self.name, self.layouts, self.calls = name, layouts, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, key, value = query_key_value(*args, **(kwargs or {}))
            known = self.layouts.get(query.shape[2]) if query.shape[2] == key.shape[2] else None
            if known is not None:
                self.calls += 1
                return self.reference(query, key, value, TokenLayout(*known))
        return func(*args, **(kwargs or {}))

    def reference(self, query, key, value, layout):
        options = NARROW[self.name].fit(layout).options()
        options.pop("train_tokens", None)  # an option of the processor only
        return REFERENCE[self.name](query, key, value, layout, **options)


@families
@mechanisms
def test_layouts_match_reference(family, name):
    model, inputs = model_and_inputs(family)
    with ReferenceInstead(name, LAYOUTS[family]) as mode:
        expected = run(model, inputs)
    assert mode.calls == TINY[family].layers
    model.set_attn_processor(NARROW[name])
    torch.testing.assert_close(run(model, inputs), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", ["sd15", "wan", "wan_i2v"])
def test_cross_attention_is_never_replaced(family, monkeypatch):
    """Text is as long as the grid; a mechanism that records its calls must be called only for self-attention."""
    if family == "sd15":
        model, inputs = TINY[family](), TINY[family].inputs((10, 14), text=140)
    elif family == "wan":
        model, inputs = TINY[family](), wan_inputs((3, 5, 6), text=90)
    else:  # 512 text tokens and a grid of 512
        model, inputs = TINY[family](), TINY[family].inputs((2, 16, 16))
    keys = []

    def attend(self, q, k, v, layout, **_):
        keys.append(k)
        return F.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(dit_accel.GNAAttnProcessor, "attend", attend)
    cross, softmax = [], F.scaled_dot_product_attention

    class RecordOthers(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is softmax and not any(query_key_value(*args, **(kwargs or {}))[1] is key for key in keys):
                cross.append(args)
            return func(*args, **(kwargs or {}))

    dense = run(model, inputs)
    model.set_attn_processor(NARROW["gna"])
    with RecordOthers():
        out = run(model, inputs)
    assert len(keys) == TINY[family].layers and len(cross) >= TINY[family].layers
    torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)
    names = set(installed_layers(model))
    assert names and not any(name.endswith("attn2") for name in names)


@families
def test_inference_mode_matches_no_grad(family):
    """Inputs may be created in inference mode; gradients outside of it still work afterwards."""
    model, inputs = model_and_inputs(family)
    model.set_attn_processor(NARROW["gna"])
    expected = run(model, inputs)
    with torch.inference_mode():
        _, inside = model_and_inputs(family)
        for given in (inputs, inside):
            assert torch.equal(model(**copy.copy(given), return_dict=False)[0], expected)
    model(**copy.copy(inputs), return_dict=False)[0].sum().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_options_are_capped_to_short_axes():
    model = TINY["wan"]()
    inputs = wan_inputs((1, 5, 6))
    for processor in NARROW.values():
        dit_accel.set_attn_processor(model, processor)
        assert run(model, inputs).isfinite().all()
    dit_accel.set_attn_processor(model, dit_accel.GNAAttnProcessor(window=(3, 3, 3), stride=(2, 2, 2)))
    run(model, inputs)
    assert "window (3, 3, 3) → (1, 3, 3)" in dit_accel.describe(model)
    assert "stride (2, 2, 2) → (1, 2, 2)" in dit_accel.describe(model)


@families
def test_checkpointing_over_two_sizes_keeps_gradients(family):
    tiny = TINY[family]
    torch.manual_seed(3)
    first, second = tiny.inputs(tiny.size), tiny.inputs(tiny.other_size)

    def gradients(checkpoint):
        model = tiny().train()
        model.set_attn_processor(NARROW["clear"] if family != "sd3" else NARROW["gna"])
        if checkpoint:
            model.enable_gradient_checkpointing()
        loss = sum(model(**copy.copy(inputs), return_dict=False)[0].square().mean() for inputs in (first, second))
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() and len(plain) > 10
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["flux", "sd15", "sdxl", "wan", "wan_i2v", "wan_vace"])
def test_fusing_before_install_keeps_the_output(family):
    model, inputs = model_and_inputs(family)
    model.set_attn_processor(NARROW["gna"])
    expected = run(model, inputs)
    dit_accel.reset_attn_processor(model)
    model.fuse_qkv_projections()
    dense = run(model, inputs)
    model.set_attn_processor(NARROW["gna"])
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)
    dit_accel.reset_attn_processor(model)
    assert torch.equal(run(model, inputs), dense)


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_fusing_after_install_keeps_the_output(family):
    model, inputs = model_and_inputs(family)
    model.set_attn_processor(NARROW["gna"])
    expected = run(model, inputs)
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)


def test_replaced_processors_raise_at_the_next_call():
    model, inputs = model_and_inputs("sd15")
    model.set_attn_processor(NARROW["gna"])
    expected = run(model, inputs)
    model.fuse_qkv_projections()  # a U-Net sets new processors on every layer
    with pytest.raises(RuntimeError, match="were replaced after dit_accel was installed"):
        run(model, inputs)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), expected)


@mechanisms
def test_processors_and_models_copy_and_pickle(name):
    processor = NARROW[name]
    assert copy.deepcopy(processor) == processor == pickle.loads(pickle.dumps(processor))
    model, inputs = model_and_inputs("flux")
    dense = run(model, inputs)
    model.set_attn_processor(processor)
    expected = run(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, inputs), expected)
        dit_accel.reset_attn_processor(other)
        assert torch.equal(run(other, inputs), dense) and hooks(other) == 0
    assert torch.equal(run(model, inputs), expected)  # resetting a copy does not change the original
    installed = model.attn_processors["transformer_blocks.0.attn.processor"]
    assert type(pickle.loads(pickle.dumps(installed))) is type(installed) is type(copy.deepcopy(installed))


@families
def test_save_pretrained_writes_a_plain_model(family, tmp_path):
    model, inputs = model_and_inputs(family)
    dense = run(model, inputs)
    model.save_pretrained(tmp_path / "before")
    model.set_attn_processor(NARROW["sla"])
    model.save_pretrained(tmp_path / "installed")
    again = type(model).from_pretrained(tmp_path / "installed")
    torch.testing.assert_close(run(again, inputs), dense, atol=1e-6, rtol=1e-6)
    dit_accel.reset_attn_processor(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_kontext_references_are_dense_or_windowed():
    model = TINY["flux"]()
    torch.manual_seed(4)
    inputs = flux_inputs((6, 8), references=((6, 8),))
    model.set_attn_processor(dit_accel.GNAAttnProcessor(window=3))
    whole = run(model, inputs)
    layout = next(iter(installed_layers(model).values())).slot.last
    assert layout == TokenLayout((6, 8), before=TEXT, after=48, references=((6, 8),))

    class WindowReference(ReferenceInstead):
        def reference(self, query, key, value, layout):
            return gna.reference(query, key, value, layout, **self.options)

    for reference, layout, options, out in (
        ("whole", ((6, 8), TEXT, 48), {"window": 3}, whole),
        ("window", ((2, 6, 8), TEXT, 0), {"window": (2, 3, 3)}, None),
    ):
        dit_accel.set_attn_processor(model, dit_accel.GNAAttnProcessor(window=3, reference=reference))
        out = run(model, inputs)
        dit_accel.reset_attn_processor(model)
        with WindowReference("gna", {TEXT + 96: layout}) as mode:
            mode.options = options
            torch.testing.assert_close(out, run(model, inputs), atol=2e-5, rtol=2e-5)
        windowed = out
    for window in ([3], (3, 3)):
        dit_accel.set_attn_processor(model, dit_accel.GNAAttnProcessor(window=window, reference="window"))
        torch.testing.assert_close(run(model, inputs), windowed, atol=1e-6, rtol=1e-6)
    dit_accel.set_attn_processor(model, dit_accel.CLEARAttnProcessor(radius=2.5, reference="window"))
    assert run(model, inputs).isfinite().all()
    with pytest.raises(ValueError, match="with the size of the image"):
        run(model, flux_inputs((6, 8), references=((4, 8),)))


@families
@pytest.mark.parametrize("name", ["gna", "sla"])
def test_batch_rows_are_independent(family, name):
    model, inputs = model_and_inputs(family, batch=2)
    model.set_attn_processor(NARROW[name])
    both = run(model, inputs)

    def batched(value):
        return (
            isinstance(value, torch.Tensor)
            and value.ndim
            and value.shape[0] == 2
            and value is not inputs.get("control_hidden_states_scale")
        )

    for row in range(2):
        one = {key: value[row : row + 1] if batched(value) else value for key, value in inputs.items()}
        if "added_cond_kwargs" in one:
            one["added_cond_kwargs"] = {key: value[row : row + 1] for key, value in one["added_cond_kwargs"].items()}
        torch.testing.assert_close(run(model, one), both[row : row + 1], atol=1e-5, rtol=1e-5)
