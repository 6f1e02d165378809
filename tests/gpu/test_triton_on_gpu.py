"""The Triton kernels on a GPU: compared with float64, fully written, deterministic, in CUDA graphs."""

import pytest
import torch
import torch.nn.functional as F
from hopper_cases import HOPPER_CASES, hopper_case

from dit_accel import TokenLayout, functional
from dit_accel.kernels.block_sparse.forward import LaunchConfig, _hopper, block_sparse_attention
from dit_accel.kernels.block_sparse.plan import window_plan
from dit_accel.kernels.windows.geometry import BallAxis

L = TokenLayout
# function, layout, head dim, options; SLA has a learned projection
CASES = [
    ("gna", L((40, 56), 5, 3), 64, {"window": (15, 17), "stride": (2, 3)}),
    ("gna", L((9, 13, 20)), 128, {"window": (3, 4, 5), "stride": (2, 3, 1), "dilation": (3, 2, 2)}),
    ("gna", L((500,), 0, 7), 40, {"window": 100, "stride": 7}),
    ("gna", L((12, 16, 24), 0, 77), 128, {"window": (6, 8, 8), "stride": (2, 8, 8)}),
    ("gna", L((6, 10, 11)), 80, {"window": (2, 5, 7), "is_causal": (True, False, False)}),
    ("clear", L((40, 56), 5, 3), 128, {"radius": 7.5}),
    ("clear", L((5, 19, 23), 5, 3), 96, {"radius": (1.5, 4.7, 6)}),
    ("clear", L((41, 55), 64), 128, {"radius": 8, "down_factor": 4}),
    ("clear", L((13, 16, 16)), 64, {"radius": 3, "down_factor": 8}),
    ("sla", L((40, 56), 5, 3), 128, {"critical": 0.1, "linear_over": "all"}),
    ("sla", L((40, 56), 5, 3), 64, {"critical": 0.1, "tile_order": True}),
    ("sla", L((13, 20, 24)), 128, {"critical": 0.2, "block_q": 128, "tile_order": True}),
    ("sla", L((40, 56)), 256, {"critical": 0.1, "feature_map": "elu"}),
    ("sla", L((40, 56), 5), 16, {"critical": 0.3, "feature_map": "relu", "block_q": 48, "block_kv": 100}),
    ("llsa", L((64, 64)), 64, {"block_size": 16, "topk": 8, "levels": 2}),
    ("llsa", L((40, 56), 5, 3), 128, {"block_size": 16, "topk": 6, "levels": 3}),
    ("llsa", L((6, 13, 20), 0, 40), 96, {"block_size": 8, "topk": 8, "levels": 1}),
    ("llsa", L((41, 55)), 64, {"block_size": 32, "topk": 3, "levels": 2, "enrich": False}),
]


def error(x, exact):
    return float((x.double() - exact).norm() / exact.norm())


def call(name, layout, tensors, options, mask=None, backend=None):
    learned = {}
    if name == "sla":
        learned = {"weight": tensors[3], "bias": tensors[4]}
    function = getattr(functional, f"{name}_attention")
    return function(*tensors[:3], layout, key_mask=mask, backend=backend, **learned, **options)


def inputs(layout, dim, dtype, batch=2, heads=2):
    torch.manual_seed(0)
    qkv = (torch.randn(batch, layout.seq_len, heads, dim, device="cuda").to(dtype).transpose(1, 2) for _ in range(3))
    weight, bias = torch.randn(dim, dim, device="cuda") / dim**0.5, torch.randn(dim, device="cuda")
    return [*qkv, weight.to(dtype), bias.to(dtype)]


def band(tensors, dtype):
    """Tolerance: twice the error of dense attention in this dtype, plus rounding."""
    exact = F.scaled_dot_product_attention(*(x.double() for x in tensors[:3]))
    return 2 * error(F.scaled_dot_product_attention(*tensors[:3]), exact) + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_agrees_with_float64_and_is_deterministic(case, masked, dtype):
    name, layout, dim, options = case
    tensors = inputs(layout, dim, dtype)
    mask = torch.rand(2, layout.seq_len, device="cuda") > 0.3 if masked else None
    exact = call(name, layout, [x.double() for x in tensors], options, mask, "torch")
    if masked:
        for x in tensors[1:3]:
            x.masked_fill_(~mask[:, None, :, None], float("nan"))
    out = call(name, layout, tensors, options, mask, "triton")
    junk = torch.full((out.numel() * 8,), float("nan"), device="cuda", dtype=dtype)
    del junk  # the next allocation contains NaN
    assert torch.equal(out, call(name, layout, tensors, options, mask, "triton"))
    assert error(out, exact) <= band(inputs(layout, dim, dtype), dtype)


FEW = [
    ("gna", L((1,)), 64, {"window": 1}),
    ("gna", L((3,), 1), 16, {"window": 2}),
    ("clear", L((1, 1), 0, 1), 128, {"radius": 2, "down_factor": 2}),
    ("clear", L((1, 3)), 40, {"radius": (1, 2)}),
    ("sla", L((1,)), 80, {"critical": 1.0, "negligible": 0.0, "linear_over": "all"}),
    ("sla", L((2,), 0, 1), 64, {"critical": 1.0, "negligible": 0.0, "linear_over": "all", "feature_map": "elu"}),
    ("sla", L((3,)), 80, {"critical": 0.5, "negligible": 0.0, "block_q": 2, "block_kv": 2}),
    ("llsa", L((1,)), 64, {"block_size": 16, "topk": 8}),
    ("llsa", L((3,), 1), 40, {"block_size": 2, "topk": 1, "levels": 2}),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_one_to_three_tokens(case, heads, dtype):
    """Triton specializes sizes of 1 to constants. Forward and gradients."""
    name, layout, dim, options = case
    tensors = inputs(layout, dim, dtype, batch=1, heads=heads)
    grad = torch.randn_like(tensors[0])
    found = []
    for to, backend in ((dtype, "triton"), (torch.float64, "torch")):
        leaves = [x.to(to).requires_grad_() for x in tensors[: 5 if name == "sla" else 3]]
        out = call(name, layout, leaves, options, None, backend)
        found.append([out, *torch.autograd.grad(out, leaves, grad.to(to))])
    tolerance = 1e-2 if dtype == torch.float16 else 1e-4
    for x, exact in zip(*found, strict=True):
        torch.testing.assert_close(x.double(), exact, atol=tolerance, rtol=tolerance)


LONG = {
    "clear": {"radius": 6},
    "gna": {"window": (5, 12, 12), "stride": (1, 4, 4)},
    "sla": {"critical": 0.02, "block_q": 128},
    "llsa": {},
}


@pytest.mark.parametrize("name, options", LONG.items())
def test_long_sequences(name, options):
    layout = L((21, 45, 80), 0, 0)  # 75,600
    tensors = inputs(layout, 128, torch.bfloat16, batch=1, heads=1)
    exact = call(name, layout, [x.float() for x in tensors], options, backend="torch")
    assert error(call(name, layout, tensors, options), exact.double()) <= 5e-3


@pytest.mark.parametrize("case", [CASES[3], CASES[5], CASES[8], CASES[9], CASES[13]], ids=str)
def test_in_a_cuda_graph(case):
    name, layout, dim, options = case
    tensors = inputs(layout, dim, torch.bfloat16)
    expected = call(name, layout, tensors, options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(name, layout, tensors, options)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_log_sum_exp_and_grouped_heads():
    torch.manual_seed(0)
    q = torch.randn(2, 4, 500, 64, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(2, 2, 500, 64, device="cuda", dtype=torch.float16) for _ in range(2))
    plan = window_plan((BallAxis(25, 25, 0.0), BallAxis(20, 20, 0.0)), 1.0, 128, 64, q.device)
    out, lse = block_sparse_attention(q, k, v, plan, scale=0.125, return_lse=True)
    logits = q.double() @ k.double().repeat_interleave(2, 1).mT * 0.125
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=2e-3, rtol=1e-3)
    assert error(out, torch.softmax(logits, -1) @ v.double().repeat_interleave(2, 1)) < 1e-3


@pytest.mark.parametrize("processors", [132, 3])
@pytest.mark.parametrize("dim", [128, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", HOPPER_CASES)
def test_hopper_kernel_is_as_accurate_as_the_portable_one(case, dtype, dim, processors, monkeypatch):
    """With few programs, each processes many tiles."""
    hopper = _hopper(torch.device("cuda", 0))
    if hopper is None:
        pytest.skip("a kernel for Hopper GPUs")
    monkeypatch.setattr(hopper, "_processors", lambda device: processors)
    attend = hopper_case(case, dim, dtype, "cuda")
    exact, exact_lse = attend(torch.float32)
    plain, _ = attend(config=LaunchConfig(64, 64, 4, 2))
    out, lse = attend()
    junk = torch.full((out.numel() * 8,), float("nan"), device="cuda", dtype=dtype)
    del junk
    again, _ = attend()
    assert torch.equal(out, again)
    assert not torch.equal(out, plain)  # else the plain kernel computed both
    assert error(out, exact.double()) <= 1.2 * error(plain, exact.double())
    torch.testing.assert_close(lse, exact_lse, atol=2e-5, rtol=1e-5)
