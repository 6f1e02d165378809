"""The Triton path of SLA, CLEAR and GNA, in Triton's interpreter (tests/gpu runs it on a GPU): compared with the torch
path in float64, which test_functional_agreement.py compares with an independent oracle; and compiled offline.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sweep
import torch

from dit_accel import TokenLayout, functional
from dit_accel.kernels.block_sparse import forward as block_sparse_triton
from dit_accel.kernels.block_sparse.backward import block_sparse_attention_backward
from dit_accel.kernels.block_sparse.forward import LaunchConfig, LinearBranch, block_sparse_attention, check_inputs
from dit_accel.kernels.block_sparse.plan import BlockPlan, window_plan
from dit_accel.kernels.tiling import Tiling
from dit_accel.kernels.windows.geometry import BallAxis, NeighborhoodAxis

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these kernels on the GPU")
L = TokenLayout
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
CASES = {
    "gna 2-D with global tokens": ("gna", L((9, 13), 5, 3), 64, {"window": (5, 7), "stride": (2, 3)}),
    "gna dilated": ("gna", L((9, 13)), 16, {"window": (3, 4), "stride": (2, 3), "dilation": (3, 2)}),
    "gna causal 3-D": ("gna", L((4, 6, 7), 2), 80, {"window": (2, 3, 5), "is_causal": (True, False, True)}),
    "gna 1-D": ("gna", L((200,), 0, 7), 64, {"window": 50, "stride": 7}),
    "clear 2-D with global tokens": ("clear", L((9, 13), 5, 3), 64, {"radius": 3.5}),
    "clear ellipse": ("clear", L((9, 13), 5, 3), 64, {"radius": (3.5, 2.2)}),
    "clear pooled": ("clear", L((9, 13), 5, 3), 64, {"radius": 3.5, "down_factor": 4}),
    "clear 3-D": ("clear", L((3, 7, 9), 5), 16, {"radius": (1.5, 2.7, 4)}),
    "clear 1-D": ("clear", L((131,), 5, 3), 40, {"radius": 7}),
    "clear negative scale": ("clear", L((9, 13), 5, 3), 64, {"radius": 3.5, "scale": -0.2}),
    "clear zero scale": ("clear", L((9, 13), 5, 3), 64, {"radius": 3.5, "scale": 0.0}),
    "sla marginal": ("sla", L((7, 11), 5, 3), 64, {"critical": 0.3, "block_q": 16, "block_kv": 8}),
    "sla all, short block": (
        "sla",
        L((400,)),
        64,
        {"critical": 0.3, "block_q": 128, "block_kv": 64, "linear_over": "all"},
    ),
    "sla odd blocks": (
        "sla",
        L((300,)),
        40,
        {"critical": 0.5, "block_q": 100, "block_kv": 96, "feature_map": "relu"},
    ),
    "sla tiles": (
        "sla",
        L((7, 14), 3),  # no tile of which all tokens are padding: its selection is undefined
        32,
        {"critical": 0.3, "negligible": 0.2, "block_q": 16, "block_kv": 16, "tile_order": True},
    ),
}


def call(name, layout, tensors, options, mask, backend):
    learned = {"weight": tensors[3], "bias": tensors[4]} if name == "sla" else {}
    function = getattr(functional, f"{name}_attention")
    return function(*tensors[:3], layout, key_mask=mask, backend=backend, **learned, **options)


def properties(case, dtype, masked):
    """Properties of a case: mechanism and branch, axes, global tokens, padding of the head dim, and kind of inputs."""
    name, layout, dim, options = CASES[case]
    branch = options.get("linear_over", "down_factor" in options)
    return (name, branch), len(layout.grid), layout.before + layout.after > 0, dim & (dim - 1) == 0, (dtype, masked)


KINDS = [(torch.float32, False), (torch.float16, False), (torch.float16, True)]


@pytest.mark.parametrize(
    "case, dtype, masked", sweep.cover([(case, *kind) for case in CASES for kind in KINDS], properties), ids=str
)
def test_forward_agrees_with_the_torch_path(case, dtype, masked):
    name, layout, dim, options = CASES[case]
    torch.manual_seed(0)
    batch, heads = (2, 1) if masked else (1, 2)
    tensors = [torch.randn(batch, layout.seq_len, heads, dim).to(dtype).transpose(1, 2) for _ in range(3)]
    tensors += [(torch.randn(dim, dim) / dim**0.5).to(dtype), torch.randn(dim).to(dtype)]
    mask = torch.rand(2, layout.seq_len) > 0.3 if masked else None
    exact = call(name, layout, [x.double() for x in tensors], options, mask, "torch")
    if masked:  # masked keys are never read
        for x in tensors[1:3]:
            x.masked_fill_(~mask[:, None, :, None], float("nan"))
    out = call(name, layout, tensors, options, mask, "triton")
    assert (out.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


@pytest.mark.parametrize("boxes", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
def test_descriptors_and_pointers_load_the_same_tiles(boxes, ragged):
    grid = (3, 10, 13) if ragged else (4, 8, 16)
    axes = tuple(NeighborhoodAxis(n, w, s, 1, False) for n, w, s in zip(grid, (3, 5, 7), (1, 2, 4), strict=True))
    torch.manual_seed(0)
    s = grid[0] * grid[1] * grid[2] + 7
    q, k, v = (torch.randn(1, s, 2, 64).half().transpose(1, 2) for _ in range(3))
    plan = window_plan(axes, 1.0, 64, 32, q.device)
    out, _ = block_sparse_attention(
        q, k, v, plan, scale=0.125, before=(7, 7), config=LaunchConfig(64, 32, 4, 1, boxes=boxes)
    )
    options = {"window": (3, 5, 7), "stride": (1, 2, 4)}
    exact = functional.gna_attention(q.double(), k.double(), v.double(), L(grid, 7), backend="torch", **options)
    assert (out.double() - exact).norm() <= 2e-3 * exact.norm()


def test_keys_and_values_may_have_different_strides():
    torch.manual_seed(0)
    q, k = (torch.randn(2, 64, 2, 32).half().transpose(1, 2) for _ in range(2))
    v = torch.randn(2, 2, 64, 32).half()
    lists, counts = torch.arange(4, dtype=torch.int32).expand(1, 4, 4), torch.full((1, 4), 4, dtype=torch.int32)
    plan = BlockPlan(Tiling.of((64,), (16,)), Tiling.of((64,), (16,)), lists.contiguous(), None, counts)
    for key, value in ((k, v), (v, k)):
        out, _ = block_sparse_attention(q, key, value, plan, scale=0.2, config=LaunchConfig(16, 16, 4, 1, boxes=True))
        exact = (q.double() @ key.double().mT * 0.2).softmax(-1) @ value.double()
        assert (out.double() - exact).norm() <= 2e-3 * exact.norm()


def test_log_sum_exp_grouped_heads_and_lengths_that_differ():
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 4, 50, 32), (torch.randn(2, 2, 90, 32) for _ in range(2))
    lists = torch.arange(6, dtype=torch.int32).expand(1, 4, 6).contiguous()
    plan = BlockPlan(
        Tiling.of((50,), (16,)), Tiling.of((90,), (16,)), lists, None, torch.full((1, 4), 6, dtype=torch.int32)
    )
    out, lse = block_sparse_attention(q, k, v, plan, scale=0.2, return_lse=True)
    logits = q @ k.repeat_interleave(2, 1).mT * 0.2
    torch.testing.assert_close(lse, logits.logsumexp(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, logits.softmax(-1) @ v.repeat_interleave(2, 1), atol=1e-5, rtol=1e-5)


def test_strided_lists_states_and_sums_are_refused():
    x, tiling = torch.randn(1, 2, 64, 16), Tiling.of((64,), (16,))
    lists, counts = torch.zeros(2, 4, 4, dtype=torch.int32), torch.full((2, 4), 4, dtype=torch.int32)
    state, norm = torch.zeros(2, 4, 16, 16), torch.zeros(2, 4, 16)

    def attend(lists=lists, counts=counts, state=state, norm=norm):
        linear = LinearBranch(state, norm, torch.ones(2), None, "relu")
        plan = BlockPlan(tiling, tiling, lists, None, counts)
        out, lse = block_sparse_attention(x, x, x, plan, scale=0.2, linear=linear, return_lse=True)
        return plan, out, lse

    plan, out, lse = attend()
    for name, wrong in (("kv_indices", {"lists": lists.mT}), ("kv_counts", {"counts": counts[:, :1].expand(-1, 4)}),
                        ("state", {"state": state.mT}), ("norm", {"norm": norm.mT.contiguous().mT})):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name} must be contiguous"):
            attend(**wrong)
    with pytest.raises(ValueError, match=r"^lse must be contiguous"):
        block_sparse_attention_backward(out, out, lse.mT.contiguous().mT, x, x, x, plan, scale=0.2)
    with pytest.raises(ValueError, match="key and value must have the same strides"):
        added = (out, x, x.mT.contiguous().mT)
        block_sparse_attention_backward(out, out, lse, x, x, x, plan, scale=0.2, added=added)
    with pytest.raises(ValueError, match=r"^kv_indices must be contiguous"):
        wrong = BlockPlan(tiling, tiling, lists.mT, None, counts)
        block_sparse_attention_backward(out, out, lse, x, x, x, wrong, scale=0.2)


def test_strided_masks_and_biases_are_read_correctly():
    name, layout, dim, options = CASES["sla marginal"]
    torch.manual_seed(0)
    tensors = [torch.randn(2, 1, layout.seq_len, dim) for _ in range(3)] + [torch.randn(dim, dim) / 8]
    mask = (torch.rand(layout.seq_len, 2) > 0.3).T
    bias = torch.randn(dim, 2)[:, 0]
    expected = call(name, layout, [*tensors, bias.clone()], options, mask.contiguous(), "triton")
    assert torch.equal(call(name, layout, [*tensors, bias], options, mask, "triton"), expected)


def test_every_element_is_written(monkeypatch):
    """No NaN is left in outputs allocated as NaN."""
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: empty(*a, **k).fill_(-1 if "int" in str(k.get("dtype")) else float("nan"))
    )
    for case in ("gna 2-D with global tokens", "clear pooled", "sla marginal"):
        name, layout, _, options = CASES[case]
        q = torch.randn(1, 2, layout.seq_len, 64)
        tensors = [q, q, q, torch.eye(64), torch.ones(64)]
        assert not call(name, layout, tensors, options, None, "triton").isnan().any()


def test_describe_counts_tiles_exactly_for_aligned_windows():
    axes = tuple(NeighborhoodAxis(*x, 1, False) for x in ((30, 18, 16), (48, 24, 8), (80, 24, 8)))
    plan = window_plan(axes, 1.0, 128, 64, torch.device("cpu"))
    assert "query tiles 2×8×8" in plan.describe() and "9.00% of the logits" in plan.describe()
    assert plan.all_full and int(plan.kv_counts.sum()) * 128 * 64 == 115200 * 18 * 24 * 24


def test_lists_of_all_query_tiles_cover_their_balls():
    plan = window_plan((BallAxis(21, 5, 1.0), BallAxis(30, 5, 1.0)), 25.0, 64, 16, torch.device("cpu"))
    visited = set()
    for tile in range(plan.q.n_tiles):
        listed = plan.kv_indices[0, tile, : plan.kv_counts[0, tile]].tolist()
        assert len(set(listed)) == len(listed)
        visited |= {(tile, other) for other in listed}

    def box_of(tiling, y, x):
        return y // tiling.box[1] * tiling.counts[2] + x // tiling.box[2]

    cells = [(y, x) for y in range(21) for x in range(30)]
    needed = {
        (box_of(plan.q, *a), box_of(plan.kv, *b))
        for a in cells
        for b in cells
        if (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 < 25
    }
    assert visited == needed


def test_tiles_counted_as_full_lie_inside_the_ball():
    """The kernel applies no mask to them, also if they lie inside the square around it."""
    plan = window_plan((BallAxis(21, 12, 1.0), BallAxis(30, 12, 1.0)), 144.0, 16, 16, torch.device("cpu"))

    def cells(tiling, tile):
        sides, (_, _, n) = tiling.box[1:], tiling.counts
        ranges = [range(i * s, min(i * s + s, g)) for i, s, g in zip(divmod(tile, n), sides, (21, 30), strict=True)]
        return torch.cartesian_prod(*map(torch.tensor, ranges)).double()

    assert 0 < plan.full_kv_counts.sum() < plan.kv_counts.sum()
    for tile, n_full in enumerate(plan.full_kv_counts[0].tolist()):
        for listed in plan.kv_indices[0, tile, :n_full].tolist():
            assert (torch.cdist(cells(plan.q, tile), cells(plan.kv, listed)) < 12).all()


@pytest.mark.parametrize("dtype, dim, message", [(torch.float64, 64, "float64"), (torch.float16, 300, "300")])
def test_unsupported_inputs_name_what_is_supported(dtype, dim, message):
    with pytest.raises(ValueError, match=message):
        check_inputs(torch.zeros(1, 1, 4, dim, dtype=dtype))


BUILD = """
import sys, torch, offline_gpu
from kernels.block_sparse import forward as b
from kernels.block_sparse.plan import BlockPlan, window_plan
from kernels.tiling import Tiling
from kernels.windows.geometry import BallAxis, NeighborhoodAxis
b.check_inputs = lambda query: None
kernel, built = b.block_sparse_fwd_kernel, []
class Launch:
    def __getitem__(self, grid):
        return lambda *a, **k: built.append(kernel.warmup(*a, grid=grid, **k))
b.block_sparse_fwd_kernel = Launch()
target = sys.argv[1]
config = b.LaunchConfig(64, 32, 4, 2, boxes=target in ("sm_90", "sm_100"))
q = torch.empty(1, 2, 16 * 32 + 8, 64, dtype=torch.bfloat16)
key_mask = torch.ones(1, 16 * 32 + 8, dtype=torch.bool)
pooled = (torch.empty(1, 2, 70, 64, dtype=q.dtype),) * 2
lists, counts = torch.zeros(2, 8, 3, dtype=torch.int32), torch.full((2, 8), 3, dtype=torch.int32)
state = torch.empty(2, 8, 64, 64, dtype=q.dtype)
linear = b.LinearBranch(state, torch.empty(2, 8, 64), torch.empty(2), q[0, 0, 0], "elu")
def window(*axes, limit=1.0):
    return window_plan(axes, limit, 64, 32, q.device)
ball = window(BallAxis(16, 4, 1.0), BallAxis(32, 4, 1.0), limit=16.0)
variants = {
    "clear": (ball, {}),
    "ellipse, pooled": (window(BallAxis(16, 3, 1.0), BallAxis(32, 4, 0.7), limit=9.0), {"pooled": (*pooled, None)}),
    "gna": (window(NeighborhoodAxis(16, 5, 2, 1, False), NeighborhoodAxis(32, 6, 1, 1, True)), {"return_lse": True}),
    "dilated": (
        window(NeighborhoodAxis(16, 3, 1, 2, False), NeighborhoodAxis(32, 6, 1, 3, False)), {"key_mask": key_mask},
    ),
    "sla": (BlockPlan(Tiling.of((512,), (64,)), Tiling.of((512,), (32,)), lists, None, counts), {"linear": linear}),
}
with offline_gpu.target(target):
    for name in sys.argv[2:] or variants:
        plan, options = variants[name]
        b.block_sparse_attention(q, q, q, plan, scale=0.1, before=(8, 8), config=config, **options)
print(len(built), sorted(built[-1].asm))
"""


BUILD_HOPPER = """
import torch, offline_gpu
from kernels.block_sparse import hopper as h
from kernels.block_sparse import forward as b
from kernels.block_sparse.plan import BlockPlan, window_plan
from kernels.tiling import Tiling
from kernels.windows.geometry import BallAxis, NeighborhoodAxis
kernel, built, masked = h.block_sparse_hopper_kernel, [], []
class Launch:
    def __getitem__(self, grid):
        def launch(*a, **k):
            masked.append(k["S"].HAS_PARTIAL)
            built.append(kernel.warmup(*a, grid=grid, **k))
        return launch
h.block_sparse_hopper_kernel = Launch()
b._hopper, b.check_inputs = lambda device: h, lambda query: None
q = torch.empty(1, 16 * 64 + 8, 2, 128, dtype=torch.bfloat16).transpose(1, 2)
lists, counts = torch.zeros(2, 8, 3, dtype=torch.int32), torch.full((2, 8), 3, dtype=torch.int32)
state = torch.empty(2, 8, 128, 128, dtype=q.dtype)
linear = b.LinearBranch(state, torch.empty(2, 8, 128), torch.empty(2), q[0, 0, 0], "elu")
ball = window_plan((BallAxis(16, 4, 1.0), BallAxis(64, 4, 0.7)), 16.0, 128, 128, q.device)
run = window_plan((NeighborhoodAxis(16, 5, 2, 1, False), NeighborhoodAxis(64, 6, 1, 1, True)), 1.0, 128, 64, q.device)
pooled = (torch.empty(1, 2, 70, 128, dtype=q.dtype),) * 2
whole = BlockPlan(Tiling.of((1024,), (128,)), Tiling.of((1024,), (128,)), lists, None, counts)
ragged = BlockPlan(Tiling.of((30, 30), (8, 16)), Tiling.of((30, 30), (8, 16)), lists, None, counts)
variants = [
    (whole, (0, 0), {}),
    (ragged, (0, 0), {}),
    (BlockPlan(Tiling.of((1016,), (128,)), Tiling.of((1016,), (64,)), lists, None, counts), (0, 0), {"linear": linear}),
    (ball, (8, 8), {"pooled": (*pooled, None)}),
    (ball, (0, 0), {"pooled": (*pooled, None)}),
    (run, (0, 0), {"return_lse": True}),
]
with offline_gpu.target("sm_90"):
    for plan, before, options in variants:
        x = q[:, :, : before[0] + plan.q.n_tokens]
        b.block_sparse_attention(x, x, x, plan, scale=0.1, before=before, **options)
print(all("cubin" in each.asm for each in built), masked)
"""


def build(code, *arguments):
    """Output of code in a separate process, because kernels are interpreted in this one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    tests = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent), str(tests), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_hopper_kernel_builds():
    """It builds, and applies masks for every plan with short tiles."""
    assert build(BUILD_HOPPER).strip() == "True [False, True, True, True, True, True]"


@pytest.mark.parametrize("target", sweep.keep(["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"], lambda x: x == "gfx942"))
def test_kernel_builds_for(target):
    """The variants differ in constexprs: the interpreter accepts branches that the compiler's type checks refuse."""
    variants = () if target == "sm_90" else ("clear",)
    printed = build(BUILD, target, *variants)
    assert printed.startswith("1" if variants else "5")
    assert ("hsaco" if target.startswith("gfx") else "cubin") in printed


def test_interpreter_is_on():
    assert block_sparse_triton.INTERPRETED
