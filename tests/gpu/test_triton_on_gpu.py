"""The Triton kernels on a GPU: against float64, written whole, the same twice, in CUDA graphs."""

import pytest
import torch
import torch.nn.functional as F

from dit_accel import TokenLayout, functional
from dit_accel.kernels.block_plan import BlockPlan, window_plan
from dit_accel.kernels.block_sparse_triton import Config, LinearBranch, _hopper, block_sparse_attention
from dit_accel.kernels.tiling import Tiling
from dit_accel.kernels.window import BallAxis, NeighborhoodAxis

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
    ("sla", L((40, 56), 5, 3), 128, {"critical": 0.1, "linear_over": "all"}),
    ("sla", L((40, 56), 5, 3), 64, {"critical": 0.1, "tile_order": True}),
    ("sla", L((13, 20, 24)), 128, {"critical": 0.2, "block_q": 128, "tile_order": True}),
    ("sla", L((40, 56)), 256, {"critical": 0.1, "feature_map": "elu"}),
    ("sla", L((40, 56), 5), 16, {"critical": 0.3, "feature_map": "relu", "block_q": 48, "block_kv": 100}),
]


def error(x, exact):
    return float((x.double() - exact).norm() / exact.norm())


def call(name, layout, tensors, options, mask=None, backend=None):
    learned = {}
    if name == "sla":
        learned = {"weight": tensors[3], "bias": tensors[4]}
    function = getattr(functional, f"{name}_attention")
    return function(*tensors[:3], layout, key_padding_mask=mask, backend=backend, **learned, **options)


def inputs(layout, dim, dtype, batch=2, heads=2):
    torch.manual_seed(0)
    qkv = (torch.randn(batch, layout.seq_len, heads, dim, device="cuda").to(dtype).transpose(1, 2) for _ in range(3))
    weight, bias = torch.randn(dim, dim, device="cuda") / dim**0.5, torch.randn(dim, device="cuda")
    return [*qkv, weight.to(dtype), bias.to(dtype)]


def band(tensors, dtype):
    """Twice what dense attention in this dtype errs, and rounding."""
    exact = F.scaled_dot_product_attention(*(x.double() for x in tensors[:3]))
    return 2 * error(F.scaled_dot_product_attention(*tensors[:3]), exact) + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_agrees_with_float64_and_with_itself(case, masked, dtype):
    name, layout, dim, options = case
    tensors = inputs(layout, dim, dtype)
    mask = torch.rand(2, layout.seq_len, device="cuda") > 0.3 if masked else None
    exact = call(name, layout, [x.double() for x in tensors], options, mask, "torch")
    if masked:
        for x in tensors[1:3]:
            x.masked_fill_(~mask[:, None, :, None], float("nan"))
    out = call(name, layout, tensors, options, mask, "triton")
    junk = torch.full((out.numel() * 8,), float("nan"), device="cuda", dtype=dtype)
    del junk  # what the next call allocates holds NaN
    assert torch.equal(out, call(name, layout, tensors, options, mask, "triton"))
    assert error(out, exact) <= band(inputs(layout, dim, dtype), dtype)


LONG = {
    "clear": {"radius": 6},
    "gna": {"window": (5, 12, 12), "stride": (1, 4, 4)},
    "sla": {"critical": 0.02, "block_q": 128},
}


@pytest.mark.parametrize("name, options", LONG.items())
def test_long_sequences(name, options):
    layout = L((21, 45, 80), 0, 0)  # 75,600
    tensors = inputs(layout, 128, torch.bfloat16, batch=1, heads=1)
    exact = call(name, layout, [x.float() for x in tensors], options, backend="torch")
    assert error(call(name, layout, tensors, options), exact.double()) <= 5e-3


@pytest.mark.parametrize("case", [CASES[3], CASES[5], CASES[8], CASES[9]], ids=str)
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


def lists(grid, q_box, k_box, n):
    """n different key boxes for each query box of two times two heads, in ascending order."""
    q, kv = Tiling.of(grid, q_box), Tiling.of(grid, k_box)
    tiles = torch.rand(4, q.n_tiles, kv.n_tiles, device="cuda").topk(n).indices.sort().values.int()
    return BlockPlan(q, kv, tiles, None, torch.full((4, q.n_tiles), n, dtype=torch.int32, device="cuda"))


def window(*axes, limit=1.0, keys=64):
    return window_plan(axes, limit, 128, keys, torch.device("cuda"))


N, B = NeighborhoodAxis, BallAxis
# the plan, tokens before and after the grid, key heads of two, matrices of the linear branch a head, pooled tokens
HOPPER_CASES = {
    "short last box": (lambda: lists((1000,), (128,), (64,), 5), (0, 0), 2, 0, 0),
    "boxes of 128, one step": (lambda: lists((1000,), (128,), (128,), 1), (0, 0), 1, 0, 0),
    "ragged boxes of 128": (lambda: lists((30, 30), (8, 16), (8, 16), 3), (0, 0), 2, 0, 0),
    "linear branch": (lambda: lists((1000,), (128,), (64,), 6), (0, 0), 2, 1, 0),
    "linear branch by box, text": (lambda: lists((6, 12, 20), (2, 8, 8), (2, 4, 8), 7), (7, 13), 2, 90, 0),
    "full boxes": (lambda: window(N(6, 4, 2, 1, False), N(16, 8, 8, 1, False), N(24, 8, 8, 1, False)), (0, 0), 1, 0, 0),
    "run, causal run": (lambda: window(N(40, 15, 2, 1, False), N(56, 17, 3, 1, True), keys=128), (5, 3), 2, 0, 0),
    "circle": (lambda: window(B(40, 8, 1.0), B(56, 8, 1.0), limit=56.25), (5, 300), 1, 0, 0),
    "circle, boxes of 128": (lambda: window(B(41, 8, 1.0), B(55, 8, 1.0), limit=56.25, keys=128), (200, 0), 2, 0, 0),
    "ellipsoid, pooled": (lambda: window(B(5, 2, 1.0), B(19, 5, 0.3), B(23, 6, 0.2), limit=7.3), (5, 3), 1, 0, 70),
}


@pytest.mark.parametrize("processors", [132, 3])
@pytest.mark.parametrize("dim", [128, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", HOPPER_CASES)
def test_hopper_kernel_errs_no_more_than_the_plain_one(case, dtype, dim, processors, monkeypatch):
    """On few processors each program takes many tiles, one after the other."""
    hopper = _hopper(torch.device("cuda", 0))
    if hopper is None:
        pytest.skip("a kernel for Hopper GPUs")
    monkeypatch.setattr(hopper, "_processors", lambda device: processors)
    torch.manual_seed(0)
    plan, (before, after), kv_heads, n_states, n_pooled = (x() if callable(x) else x for x in HOPPER_CASES[case])
    length = before + plan.q.n_tokens + after
    q = torch.randn(2, length, 2, dim, device="cuda").to(dtype).transpose(1, 2)
    k, v = (torch.randn(2, length, kv_heads, dim, device="cuda").to(dtype).transpose(1, 2) for _ in range(2))
    pooled = [torch.randn(2, kv_heads, n_pooled, dim, device="cuda").to(dtype) for _ in range(2)]
    linear = None
    if n_states:
        n_states = min(n_states, plan.q.n_tiles)
        state = (torch.randn(4, n_states, dim, dim, device="cuda") / 8).to(dtype)
        norm, eps = torch.rand(4, n_states, dim, device="cuda"), torch.rand(4, device="cuda")
        linear = LinearBranch(state, norm, eps, torch.randn(dim, device="cuda").to(dtype), "softmax")

    def attend(to=None, config=None):
        def cast(x):
            return x if to is None else x.to(to)

        return block_sparse_attention(
            cast(q), cast(k), cast(v), plan, scale=dim**-0.5, before=(before, before),
            extra=(*map(cast, pooled), None) if n_pooled else None, return_lse=True, config=config,
            linear=linear and LinearBranch(cast(state), norm, eps, cast(linear.bias), "softmax"),
        )  # fmt: skip

    exact, exact_lse = attend(torch.float32)
    plain, _ = attend(config=Config(64, 64, 4, 2))
    out, lse = attend()
    junk = torch.full((out.numel() * 8,), float("nan"), device="cuda", dtype=dtype)
    del junk
    again, _ = attend()
    assert torch.equal(out, again)
    assert not torch.equal(out, plain)  # else the plain kernel computed both
    assert error(out, exact.double()) <= 1.2 * error(plain, exact.double())
    torch.testing.assert_close(lse, exact_lse, atol=2e-5, rtol=1e-5)
