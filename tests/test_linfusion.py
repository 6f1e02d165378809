"""LinFusion's linear attention: the function against a token-by-token definition, and the processor on U-Nets."""

import copy
import math

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from tiny import TINY, run
from torch._dynamo.testing import CompileCounterWithBackend

import dit_accel
from dit_accel import LinFusionAttnProcessor, TokenLayout
from dit_accel.functional import linfusion_attention
from dit_accel.install import intercept
from dit_accel.install.installation import installed_layers
from dit_accel.mechanisms import linfusion
from dit_accel.mechanisms.registry import PROCESSORS

UNETS = pytest.mark.parametrize("family", ["sd15", "sdxl"])


def token_by_token(query, key, value, key_mask=None):
    """Compute the definition in float64 NumPy; key_mask (B, S) is True for keys that may be attended."""
    q, k, v = (x.detach().double().numpy() for x in (query, key, value))
    q, k = (np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (q, k))  # elu + 1
    out = np.zeros_like(q)
    for b, h, i in np.ndindex(*q.shape[:3]):
        keys = [j for j in range(q.shape[2]) if key_mask is None or key_mask[b, j]]
        if not keys:
            continue
        numerator = sum((q[b, h, i] @ k[b, h, j]) * v[b, h, j] for j in keys) / len(keys)
        out[b, h, i] = numerator / (q[b, h, i] @ np.mean([k[b, h, j] for j in keys], 0) + 1e-4)
    return torch.from_numpy(out)


def draw(length, dim=8, dtype=torch.float32, batch=2, heads=2):
    torch.manual_seed(length)
    return [torch.randn(batch, length, heads, dim).transpose(1, 2).to(dtype) for _ in range(3)]  # not contiguous


@pytest.mark.parametrize("length", [1, 5, 63, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_function_matches_definition(length, dtype):
    query, key, value = draw(length, dtype=dtype)
    exact = token_by_token(query, key, value)
    out = linfusion_attention(query, key, value)
    assert out.dtype == dtype and out.shape == query.shape
    rounding = exact.abs() * torch.finfo(dtype).eps + 1e-6
    assert ((out.double() - exact).abs() <= rounding).all()
    torch.testing.assert_close(linfusion.reference(query.double(), key.double(), value.double()), exact)


@pytest.mark.parametrize("dim", [1, 2, 8])
def test_short_heads_keep_the_digits_of_float32(dim):
    """Where all features of a query are far below 0, so that they are as small as the 1e-4 they are added to."""
    query, key, value = draw(40, dim, batch=1)
    leaves = [(query * 10).requires_grad_(), (key * 10).requires_grad_(), value.requires_grad_()]
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact = token_by_token(*leaves)
    out = linfusion_attention(*leaves)
    assert ((out.double() - exact).abs() <= exact.abs() * torch.finfo(torch.float32).eps + 1e-6).all()
    grad = torch.randn(out.shape)
    wanted = torch.autograd.grad(linfusion.reference(*exact_leaves), exact_leaves, grad.double())
    for x, want in zip(torch.autograd.grad(out, leaves, grad), wanted, strict=True):
        assert (x.double() - want).norm() <= 2e-6 * want.norm()


@pytest.mark.parametrize("x", [-60.0, -12.0, -1e-3, 0.0, 1e-3, 30.0])
def test_elu_features_are_exact_to_rounding(x):
    feature = linfusion._feature(torch.tensor(x)).double()
    assert feature.item() == pytest.approx(x + 1 if x > 0 else math.exp(x), rel=4e-7)

    """Sums over the keys would be 500 · 200 · 16 in float16, which ends at 65,504."""


def test_large_keys_do_not_overflow_in_half_precision():
    """Sums over the keys would reach 500 · 200 · 16; the maximum of float16 is 65,504."""
    query, key, value = (x * 50 + 100 for x in draw(500, 16, batch=1, heads=1))
    exact = linfusion.reference(query.half().double(), key.half().double(), value.half().double())
    out = linfusion_attention(query.half(), key.half(), value.half())
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=0)


def test_masked_keys_are_ignored_even_if_nan():
    query, key, value = draw(9)
    key_mask = torch.ones(2, 9, dtype=torch.bool)
    key_mask[0, 6:] = key_mask[1] = False
    exact = token_by_token(query, key, value, key_mask)
    key, value = (torch.where(key_mask[:, None, :, None], x, torch.nan) for x in (key, value))
    for function in (linfusion_attention, linfusion.reference):
        torch.testing.assert_close(function(query, key, value, key_mask=key_mask).double(), exact, atol=1e-6, rtol=0)
    assert not linfusion_attention(query, key, value, key_mask=key_mask)[1].any()


def test_gradients_match_definition():
    leaves = [x.detach().requires_grad_() for x in draw(7, dtype=torch.float64)]
    assert torch.autograd.gradcheck(linfusion_attention, leaves)
    key_mask = torch.arange(7).expand(2, 7) < torch.tensor([[5], [7]])
    assert torch.autograd.gradcheck(lambda *x: linfusion_attention(*x, key_mask=key_mask), leaves)
    single = [x.detach().float().requires_grad_() for x in leaves]
    grad = torch.randn(2, 2, 7, 8)
    expected = torch.autograd.grad(linfusion.reference(*leaves), leaves, grad.double())
    for ours, exact in zip(torch.autograd.grad(linfusion_attention(*single), single, grad), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": TokenLayout((3, 3), before=1)}, "does not support global tokens, got 1 in layout"),
        ({"layout": TokenLayout((3, 4))}, "12 tokens but query has 10"),
        ({"backend": "triton"}, "linfusion does not support this backend; available: torch"),
        ({"key_mask": torch.ones(2, 9, dtype=torch.bool)}, r"must have shape \(B, S\) = \(2, 10\)"),
    ],
)
def test_invalid_function_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        linfusion_attention(*draw(10), **options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"projection_mid_dim": 0}, ValueError, "projection_mid_dim must be at least 1"),
        ({"projection_mid_dim": 2.5}, TypeError, "projection_mid_dim must be an int"),
        ({"scale": 0.5}, ValueError, "no logits to scale"),
        ({"dense_steps": -1}, ValueError, "dense_steps"),
    ],
)
def test_invalid_processor_options_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        LinFusionAttnProcessor(**options)


class ByHand:
    """Self-attention processor that computes LinFusion's definition; ``learned`` has the names of its files."""

    def __init__(self, learned, attend=token_by_token):
        self.learned, self.attend = learned, attend

    def residual(self, name, x):
        w = {key.removeprefix(f"{name}."): value for key, value in self.learned.items() if key.startswith(f"{name}.")}
        inner = x @ w["0.weight"].T + w["0.bias"]
        inner = inner - inner.mean(-1, keepdim=True)
        inner = inner / (inner.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["1.weight"] + w["1.bias"]
        return x + torch.where(inner > 0, inner, 0.01 * inner) @ w["3.weight"].T + w["3.bias"]

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        x = hidden_states
        inputs = (attn.to_q(self.residual("to_q_", x)), attn.to_k(self.residual("to_k_", x)), attn.to_v(x))
        query, key, value = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in inputs)
        out = self.attend(query, key, value).to(x.dtype).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


def learn(model, seed=5):
    """Set random weights in the installed layers."""
    torch.manual_seed(seed)
    for layer in installed_layers(model).values():
        for name, parameter in layer.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("1.weight" in name), std=0.3)


def by_hand(model):
    """Return a copy of an installed model that uses :class:`ByHand`."""
    learned = {name: copy.deepcopy(layer.state_dict()) for name, layer in installed_layers(model).items()}
    other = copy.deepcopy(model)
    dit_accel.reset_attn_processor(other)
    for name, weights in learned.items():
        other.get_submodule(name).processor = ByHand(weights)
    return other


def unet(family, **options):
    torch.manual_seed(2)
    model, inputs = TINY[family](), TINY[family].inputs((6, 7) if family == "sd15" else TINY[family].size)
    dense = run(model, inputs)
    model.set_attn_processor(LinFusionAttnProcessor(**options))
    learn(model)
    return model, inputs, dense


@UNETS
@pytest.mark.parametrize("mid", [None, 5])
def test_unet_matches_definition(family, mid):
    model, inputs, dense = unet(family, projection_mid_dim=mid)
    layers = installed_layers(model)
    assert len(layers) == TINY[family].layers and all(name.endswith("attn1") for name in layers)
    for name, layer in layers.items():
        width = model.get_submodule(name).query_dim
        assert layer.get_parameter("to_q_.0.weight").shape == (mid or width, width)
    out = run(model, inputs)
    torch.testing.assert_close(out, run(by_hand(model), inputs), atol=1e-5, rtol=1e-5)
    assert (out - dense).abs().max() > 1e-2


def test_untrained_processor_is_plain_linear_attention():
    torch.manual_seed(3)
    model, inputs = TINY["sd15"](), TINY["sd15"].inputs((6, 7))
    state = torch.get_rng_state()
    model.set_attn_processor(LinFusionAttnProcessor(projection_mid_dim=6))
    assert torch.equal(torch.get_rng_state(), state)
    again = TINY["sd15"]()
    again.set_attn_processor(LinFusionAttnProcessor(projection_mid_dim=6))
    for layer, other in zip(installed_layers(model).values(), installed_layers(again).values(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(layer.parameters(), other.parameters(), strict=True))
        assert layer.get_parameter("to_q_.0.weight").any() and not layer.get_parameter("to_q_.3.weight").any()
    plain = copy.deepcopy(model)
    dit_accel.reset_attn_processor(plain)
    zero = {f"{n}.{i}.{p}": torch.zeros(()) for n in ("to_q_", "to_k_") for i in (0, 1, 3) for p in ("weight", "bias")}
    for name in installed_layers(model):
        width = plain.get_submodule(name).query_dim
        learned = {
            key: torch.zeros((width, width) if key.endswith(("0.weight", "3.weight")) else width) for key in zero
        }
        plain.get_submodule(name).processor = ByHand(learned)
    torch.testing.assert_close(run(model, inputs), run(plain, inputs), atol=1e-5, rtol=1e-5)


@UNETS
def test_reset_restores_bitwise(family):
    model, inputs = TINY[family](), TINY[family].inputs(TINY[family].size)
    dense, before, processors = run(model, inputs), copy.deepcopy(model.state_dict()), dict(model.attn_processors)
    model.set_attn_processor(LinFusionAttnProcessor())
    assert any(".dit_accel.to_q_." in key for key in model.state_dict())
    assert not torch.equal(run(model, inputs), dense)
    dit_accel.reset_attn_processor(model)
    assert torch.equal(run(model, inputs), dense)
    assert all(model.attn_processors[key] is value for key, value in processors.items())
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def test_dense_layers_and_steps_use_original_inputs():
    model, inputs, dense = unet("sd15", min_tokens=10**6)
    assert torch.equal(run(model, inputs), dense)
    model.set_attn_processor(LinFusionAttnProcessor(dense_steps=1))
    learn(model)
    assert torch.equal(run(model, inputs), dense)
    assert not torch.equal(run(model, {**inputs, "timestep": inputs["timestep"] / 2}), dense)


def test_checkpointing_keeps_all_gradients():
    def gradients(checkpoint):
        model, inputs, _ = unet("sd15")
        model.train()
        if checkpoint:
            model.enable_gradient_checkpointing()
        model(**inputs, return_dict=False)[0].square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if "attn1" in name}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(grad is not None and grad.any() for grad in plain.values()) and len(plain) == 4 * (5 + 12)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], atol=1e-6, rtol=1e-5)


def test_layer_gradients_match_definition():
    model, inputs, _ = unet("sd15")
    other = by_hand(model)
    hand = {name: attn.processor for name, attn in other.named_modules() if name.endswith("attn1")}
    learned = []
    for processor in hand.values():
        processor.attend = linfusion.reference
        learned += [x.requires_grad_() for x in processor.learned.values()]
    other(**inputs, return_dict=False)[0].square().mean().backward()
    model(**inputs, return_dict=False)[0].square().mean().backward()
    ours = [p for layer in installed_layers(model).values() for p in layer.state_dict(keep_vars=True).values()]
    for parameter, exact in zip(ours, learned, strict=True):
        torch.testing.assert_close(parameter.grad, exact.grad, atol=1e-6, rtol=1e-3)


def test_order_of_lora_and_install_does_not_matter():
    def adapted(model):
        torch.manual_seed(9)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))

    before, inputs = TINY["sd15"](), TINY["sd15"].inputs((6, 7))
    adapted(before)
    before.set_attn_processor(LinFusionAttnProcessor())
    learn(before)
    after = TINY["sd15"]()
    after.set_attn_processor(LinFusionAttnProcessor())
    learn(after)
    without = run(after, inputs)
    adapted(after)
    out = run(after, inputs)
    assert torch.equal(run(before, inputs), out) and not torch.equal(out, without)
    torch.testing.assert_close(run(by_hand(after), inputs), out, atol=1e-5, rtol=1e-5)
    after.delete_adapters("default")
    assert torch.equal(run(after, inputs), without)


def test_learned_modules_follow_the_input_device():
    """Group offloading does not move the learned modules, which stay on the CPU."""
    model = TINY["sd15"]()
    model.set_attn_processor(LinFusionAttnProcessor())
    layer = next(iter(installed_layers(model).values()))
    module = next(getattr(layer, name) for name in layer.input_projections.values())
    x = torch.ones(2, 5, module[0].in_features, device="meta")
    assert intercept._brought_along(module, x).device.type == "meta"
    assert all(p.device.type == "cpu" for p in module.parameters())
    here = torch.ones(2, 5, module[0].in_features)
    assert torch.equal(intercept._brought_along(module, here), module(here))


@pytest.mark.parametrize("kind", ["sequential", "block_level", "leaf_level"])
@pytest.mark.parametrize("order", ["install first", "offload first"])
def test_offloading_keeps_the_output(kind, order):
    model, plain = TINY["sd15"](), TINY["sd15"]()
    inputs = TINY["sd15"].inputs((8, 8))

    def install(model):
        model.set_attn_processor(LinFusionAttnProcessor())

    def offload(model):
        if kind == "sequential":
            cpu_offload(model, "cpu")
        else:
            options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
            apply_group_offloading(model, torch.device("cpu"), offload_type=kind, **options)

    install(plain)
    for act in (install, offload) if order == "install first" else (offload, install):
        act(model)
    assert torch.equal(run(model, inputs), run(plain, inputs))


def test_saved_weights_load_bitwise(tmp_path):
    model, inputs, _ = unet("sdxl", projection_mid_dim=5)
    path = dit_accel.save_attention(model, tmp_path)
    other = TINY["sdxl"]()
    report = dit_accel.load_attention(other, path)
    assert torch.equal(run(other, inputs), run(model, inputs))
    assert len(report.parts[0].learned) == 12 * TINY["sdxl"].layers and not report.parts[0].overwritten


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    model, inputs, _ = unet("sd15")
    expected = run(model, inputs)
    counter = CompileCounterWithBackend("eager")  # aot_eager takes twice as long for the same graph
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        torch.testing.assert_close(run(compiled, inputs), expected, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.sweep
def test_compiles_by_repeated_blocks():
    torch._dynamo.reset()
    model, inputs, _ = unet("sd15")
    expected = run(model, inputs)
    model.compile_repeated_blocks(fullgraph=True, backend=CompileCounterWithBackend("aot_eager"))
    torch.testing.assert_close(run(model, inputs), expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_autocast_sums_in_float32():
    model, inputs, _ = unet("sd15")
    expected = run(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(model, inputs)
    assert out.isfinite().all() and 0 < (out - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("family", ["flux", "sd3", "wan"])
def test_other_models_are_refused_unchanged(family):
    model = TINY[family]()
    torch.manual_seed(1)
    inputs = TINY[family].inputs(TINY[family].size)
    dense = run(model, inputs)
    with pytest.raises(ValueError, match=r"LinFusion supports only the self-attention of U-Nets.*got \w+Processor"):
        model.set_attn_processor(LinFusionAttnProcessor())
    assert torch.equal(run(model, inputs), dense) and not installed_layers(model)


def test_fused_projections_are_refused():
    model = TINY["sd15"]()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"FusedAttnProcessor2_0.*unfuse_qkv_projections"):
        model.set_attn_processor(LinFusionAttnProcessor())
    model.unfuse_qkv_projections()
    model, inputs, _ = unet("sd15")
    model.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match="were replaced after dit_accel was installed"):
        run(model, inputs)


def test_describe_and_logit_fraction():
    model, inputs, _ = unet("sd15")
    run(model, inputs)
    assert "linfusion()" in dit_accel.describe(model) and "torch" in dit_accel.describe(model)
    assert dit_accel.logit_fraction(model) == 0.0
    assert [name for name, kind in PROCESSORS.items() if kind.any_host] == ["sla", "clear", "llsa", "gna"]


def test_unet_attention_mask_matches_key_mask():
    """A U-Net's attention_mask for self-attention gives the same as the function with key_mask."""
    model, *_ = unet("sd15")
    attn = model.get_submodule(next(iter(installed_layers(model))))
    x = torch.randn(2, 12, attn.query_dim)
    key_mask = torch.arange(12).expand(2, 12) < torch.tensor([[7], [12]])
    attn.dit_accel.slot.layout = TokenLayout((3, 4))
    out = attn(x, attention_mask=torch.where(key_mask, 0.0, -10000.0)[:, None])
    hand = ByHand(attn.dit_accel.state_dict(), lambda q, k, v: token_by_token(q, k, v, key_mask))
    torch.testing.assert_close(out, hand(attn, x), atol=1e-5, rtol=1e-5)
