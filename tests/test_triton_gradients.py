"""Gradients of the Triton kernels, in Triton's interpreter (tests/gpu runs them on a GPU): compared with the torch path
in float64, which test_functional_gradients.py compares with finite differences; and compiled offline.
"""

import pytest
import sweep
import torch
from test_triton_kernels import CASES, build, properties

from dit_accel import TokenLayout as L
from dit_accel import functional

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these kernels on the GPU")
TOLERANCE = {torch.float32: 4e-6, torch.float16: 3e-3}
KINDS = [(torch.float32, False), (torch.float16, True)]
TYPED = [(name, *kind) for name in CASES if "zero scale" not in name for kind in KINDS]


def gradients(name, layout, tensors, options, mask, backend, grad):
    """Gradients of query, key, value and the learned tensors."""
    learned = {"sla": ["weight", "bias"], "clear": ["pool_weight"] if "down_factor" in options else []}.get(name, [])
    leaves = [x.detach().requires_grad_() for x in tensors[: 3 + len(learned)]]
    function = getattr(functional, f"{name}_attention")
    more = dict(zip(learned, leaves[3:], strict=True))
    out = function(*leaves[:3], layout, key_mask=mask, backend=backend, **more, **options)
    return torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("case, dtype, masked", sweep.cover(TYPED, properties), ids=str)
def test_gradients_agree_with_the_torch_path(case, dtype, masked):
    name, layout, dim, options = CASES[case]
    torch.manual_seed(0)
    batch, heads = (2, 1) if masked else (1, 2)
    shape = (batch, layout.seq_len, heads, dim)
    tensors = [torch.randn(shape).to(dtype).transpose(1, 2) for _ in range(3)]
    if name == "sla":
        tensors += [(torch.randn(dim, dim) / dim**0.5).to(dtype), torch.randn(dim).to(dtype)]
    if "down_factor" in options:
        f = options["down_factor"]
        tensors.append((torch.rand(f, f) / f**2).to(dtype))
    grad = torch.randn(batch, heads, layout.seq_len, dim).to(dtype)
    mask = torch.rand(2, layout.seq_len) > 0.3 if masked else None
    exact = gradients(name, layout, [x.double() for x in tensors], options, mask, "torch", grad.double())
    if masked:  # masked keys are never read
        for x in tensors[1:3]:
            x.masked_fill_(~mask[:, None, :, None], float("nan"))
    found = gradients(name, layout, tensors, options, mask, "triton", grad)
    for x, y, of in zip(found, exact, ("query", "key", "value", "first learned", "second"), strict=False):
        assert x.shape == y.shape and x.dtype == dtype
        assert (x.double() - y).norm() <= TOLERANCE[dtype] * y.norm(), of


@pytest.mark.parametrize("case", ["gna 2-D with global tokens", "clear pooled", "sla marginal"])
@pytest.mark.parametrize("kind", ["all equal", "very large"])
def test_gradients_of_extreme_inputs_are_finite(case, kind):
    """Logits of 1e9, where float32 has a resolution of 64, and rows that are all equal."""
    name, layout, dim, options = CASES[case]
    torch.manual_seed(0)
    tensors = [torch.ones(1, 1, layout.seq_len, dim) for _ in range(3)]
    if kind == "very large":
        tensors = [torch.randn(1, 1, layout.seq_len, dim).sign() * 1e4 for _ in range(3)]
    tensors += [torch.eye(dim), torch.ones(dim)] if name == "sla" else [torch.ones(4, 4) / 16]
    grad = torch.randn(1, 1, layout.seq_len, dim)
    assert all(x.isfinite().all() for x in gradients(name, layout, tensors, options, None, "triton", grad))


@pytest.mark.parametrize("linear_over", ["marginal", "all"])
@pytest.mark.parametrize("size", [0.01, 3.0])
def test_float16_gradients_of_small_relu_features_are_finite(size, linear_over):
    """A gradient divided by Σ φ(q) φ(k) may overflow float16."""
    layout, dim = L((40,), 0, 3), 8
    options = {"critical": 0.3, "block_q": 8, "block_kv": 8, "feature_map": "relu", "linear_over": linear_over}
    torch.manual_seed(0)
    tensors = [(torch.randn(1, 2, layout.seq_len, dim) * x).half() for x in (size, size, 1)]
    tensors += [(torch.randn(dim, dim) / dim**0.5).half(), torch.randn(dim).half()]
    grad = torch.randn(1, 2, layout.seq_len, dim).half()
    exact = gradients("sla", layout, [x.double() for x in tensors], options, None, "torch", grad.double())
    found = gradients("sla", layout, tensors, options, None, "triton", grad)
    for x, y in zip(found, exact, strict=True):
        assert (x.double() - y).norm() <= TOLERANCE[torch.float16] * y.norm()


BUILD = """
import sys, torch, offline_gpu
from kernels.block_linear import backward as l
from kernels.block_linear import forward as s
from kernels.block_sparse import backward as b
from kernels.block_sparse.plan import BlockPlan, window_plan
from kernels.tiling import Tiling
from kernels.windows.geometry import BallAxis, NeighborhoodAxis
built = []
def offline(module, name):
    kernel = getattr(module, name)
    class Launch:
        def __getitem__(self, grid):
            return lambda *a, **k: built.append(kernel.warmup(*a, grid=grid, **k))
    setattr(module, name, Launch())
for name in ("preprocess_bwd_kernel", "block_sparse_bwd_dq_kernel", "block_sparse_bwd_dkv_kernel"):
    offline(b, name)
offline(l, "linear_rows_bwd_kernel")
for name in ("block_state_fwd_kernel", "finish_state_fwd_kernel", "marginal_norm_fwd_kernel"):
    offline(s, name)
b.check_inputs = lambda query: None
if sys.argv[1].startswith("gfx"):
    s.exact_products = lambda: "ieee"  # as where torch is built for AMD
q = torch.empty(1, 2, 16 * 32 + 8, 64, dtype=torch.bfloat16)
lse, key_mask = torch.empty(1, 2, 520), torch.ones(1, 520, dtype=torch.bool)
pooled = (torch.empty(1, 2, 70, 64, dtype=q.dtype),) * 2
def window(*axes, limit=1.0):
    return window_plan(axes, limit, 64, 32, q.device)
lists, counts = torch.zeros(2, 8, 3, dtype=torch.int32), torch.full((2, 8), 3, dtype=torch.int32)
boxes = Tiling.of((512,), (64,)), Tiling.of((512,), (32,))
variants = {
    "clear": (window(BallAxis(16, 4, 1.0), BallAxis(32, 4, 1.0), limit=16.0), {}),
    "pooled": (
        window(BallAxis(16, 3, 1.0), BallAxis(32, 4, 0.7), limit=9.0),
        {"pooled": (*pooled, None), "key_mask": key_mask},
    ),
    "gna": (window(NeighborhoodAxis(16, 5, 2, 1, False), NeighborhoodAxis(32, 6, 1, 3, True)), {}),
    "sla": (BlockPlan(*boxes, lists, None, counts), {"added": (q, q, q), "linear_delta": lse, "bias": q[0, 0, 0]}),
}
with offline_gpu.target(sys.argv[1]):
    for name in sys.argv[2:]:
        plan, options = variants[name]
        lead = 0 if name == "gna" else 8  # without tokens off the grid, and with
        x = q[:, :, : 512 + lead]
        b.block_sparse_attention_backward(x, x, lse, x, x, x, plan, scale=0.1, before=(lead, lead), **options)
        if name == "sla":
            weight, state = torch.empty(64, 64), torch.empty(2, 8, 64, 64, dtype=q.dtype)
            sums = s.LinearState(state, torch.empty(2, 8, 64), torch.empty(2))
            marginal = torch.empty(2, 8, 16, dtype=q.dtype)
            l.linear_backward(q, q, q, q, sums, weight, "softmax", *boxes, 8, None, marginal)
print(len(built), sorted(built[-1].asm))
"""


@pytest.mark.parametrize("target", sweep.keep(["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"], lambda x: x == "sm_90"))
def test_kernels_build_for(target):
    printed = build(BUILD, target, *(("clear", "pooled", "gna", "sla") if target == "sm_90" else ("sla",)))
    assert printed.startswith("16 " if target == "sm_90" else "7 "), printed
    assert ("hsaco" if target.startswith("gfx") else "cubin") in printed
