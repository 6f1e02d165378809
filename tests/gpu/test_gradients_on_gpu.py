"""Gradients of the Triton kernels on a GPU: compared with float64, deterministic, and inside training wrappers."""

import pytest
import torch
import torch.nn.functional as F
from test_triton_on_gpu import CASES, error

from dit_accel import TokenLayout, functional

L = TokenLayout


def leaves_of(name, layout, dim, options, dtype, batch=2, heads=2):
    """Query, key, value and the learned tensors by name."""
    torch.manual_seed(0)
    found = {}
    for x in ("query", "key", "value"):
        found[x] = torch.randn(batch, layout.seq_len, heads, dim, device="cuda").to(dtype).transpose(1, 2)
    if name == "sla":
        found["weight"] = (torch.randn(dim, dim, device="cuda") / dim**0.5).to(dtype)
        found["bias"] = torch.randn(dim, device="cuda").to(dtype)
    if options.get("down_factor", 1) > 1:
        f = options["down_factor"]
        found["pool_weight"] = (torch.rand(f, f, device="cuda") / f**2).to(dtype)
    return found


def gradients(name, layout, options, tensors, grad, mask=None, backend=None, autocast=None):
    leaves = {key: x.detach().requires_grad_() for key, x in tensors.items()}
    function = getattr(functional, f"{name}_attention")
    qkv = [leaves[x] for x in ("query", "key", "value")]
    learned = {key: x for key, x in leaves.items() if key not in ("query", "key", "value")}
    with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
        out = function(*qkv, layout, key_mask=mask, backend=backend, **learned, **options)
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype)), strict=True))


def bands(tensors, grad, dtype):
    """Tolerance: twice the error of dense attention's gradients in this dtype for query, key and value, plus
    rounding."""
    qkv = [tensors[x] for x in ("query", "key", "value")]

    def dense(xs, g):
        xs = [x.detach().requires_grad_() for x in xs]
        return torch.autograd.grad(F.scaled_dot_product_attention(*xs), xs, g)

    exact = dense([x.double() for x in qkv], grad.double())
    plain = dense(qkv, grad)
    errors = [2 * error(x, y) + 2 * torch.finfo(dtype).eps for x, y in zip(plain, exact, strict=True)]
    return dict(zip(("query", "key", "value"), errors, strict=True)) | {"learned": max(errors)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_match_float64_and_are_deterministic(case, masked, dtype):
    name, layout, dim, options = case
    tensors = leaves_of(name, layout, dim, options, dtype)
    grad = torch.randn(2, layout.seq_len, 2, dim, device="cuda").to(dtype).transpose(1, 2)
    mask = torch.rand(2, layout.seq_len, device="cuda") > 0.3 if masked else None
    exact = gradients(name, layout, options, {k: x.double() for k, x in tensors.items()}, grad.double(), mask, "torch")
    allowed = bands(tensors, grad, dtype)
    if masked:  # masked keys are never read
        for x in ("key", "value"):
            tensors[x] = tensors[x].masked_fill(~mask[:, None, :, None], torch.nan)
    found = gradients(name, layout, options, tensors, grad, mask)
    again = gradients(name, layout, options, tensors, grad, mask)
    for key, x in found.items():
        assert torch.equal(x, again[key]), key
        assert error(x, exact[key]) <= allowed.get(key, allowed["learned"]), key


@pytest.mark.parametrize("linear_over", ["marginal", "all"])
def test_long_sequences(linear_over):
    """32,760 tokens in bfloat16, compared with the torch path in float32 for two heads."""
    layout, options = L((21, 30, 52)), {"critical": 0.1, "block_q": 128, "linear_over": linear_over}
    tensors = leaves_of("sla", layout, 128, options, torch.bfloat16, batch=1)
    grad = torch.randn(1, 2, layout.seq_len, 128, device="cuda", dtype=torch.bfloat16)
    found = gradients("sla", layout, options, tensors, grad)
    exact = gradients("sla", layout, options, {k: x.float() for k, x in tensors.items()}, grad.float(), None, "torch")
    for key, x in found.items():
        assert error(x, exact[key]) <= 0.02, key


@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[8], CASES[10], CASES[13]], ids=str)
def test_checkpointing_autocast_and_compile_agree(case):
    name, layout, dim, options = case
    tensors = leaves_of(name, layout, dim, options, torch.bfloat16)
    grad = torch.randn(2, 2, layout.seq_len, dim, device="cuda", dtype=torch.bfloat16)
    plain = gradients(name, layout, options, tensors, grad)
    mixed = gradients(name, layout, options, tensors, grad, autocast=torch.bfloat16)
    function = getattr(functional, f"{name}_attention")

    def call(*xs):
        learned = dict(zip(list(tensors)[3:], xs[3:], strict=True))
        return function(*xs[:3], layout, **learned, **options)

    def through(wrapped):
        leaves = [x.detach().requires_grad_() for x in tensors.values()]
        return torch.autograd.grad(wrapped(*leaves), leaves, grad)

    checkpointed = through(lambda *xs: torch.utils.checkpoint.checkpoint(call, *xs, use_reentrant=False))
    compiled = through(torch.compile(call, fullgraph=True))
    for (key, x), a, b in zip(plain.items(), checkpointed, compiled, strict=True):
        assert torch.equal(x, a) and torch.equal(x, b) and torch.equal(x, mixed[key]), key


@pytest.mark.parametrize("kind", ["random", "all equal", "very large"])
@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[7], CASES[8], CASES[10], CASES[13]], ids=str)
def test_no_nan_from_extreme_inputs(case, kind):
    name, layout, dim, options = case
    tensors = leaves_of(name, layout, dim, options, torch.bfloat16)
    for key in ("query", "key", "value"):
        if kind == "all equal":
            tensors[key] = torch.ones_like(tensors[key])
        elif kind == "very large":
            tensors[key] = tensors[key].sign() * 1e4
    grad = torch.randn(2, 2, layout.seq_len, dim, device="cuda", dtype=torch.bfloat16)
    for key, x in gradients(name, layout, options, tensors, grad).items():
        assert x.isfinite().all(), key


@pytest.mark.parametrize(
    "name, options", [("sla", {"critical": 0.1}), ("clear", {"radius": 8}), ("gna", {"window": 9}), ("llsa", {})]
)
def test_memory_of_a_training_step_grows_linearly(name, options):
    peaks = []
    for side in (128, 256):  # sizes for which the scratch of libraries' matrix products is small
        layout = L((side, side))
        tensors = leaves_of(name, layout, 64, options, torch.bfloat16, batch=1)
        grad = torch.randn(1, 2, layout.seq_len, 64, device="cuda", dtype=torch.bfloat16)
        gradients(name, layout, options, tensors, grad)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients(name, layout, options, tensors, grad)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 4.6 * peaks[0] + 2**20
