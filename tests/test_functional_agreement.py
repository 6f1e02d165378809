"""The four functions and their references compared with an independent float64 implementation."""

from __future__ import annotations

import itertools
import math

import oracle
import pytest
import sweep
import torch
import torch.nn.functional as F

from dit_accel import TokenLayout
from dit_accel.kernels.block_sparse import plan as block_plan
from dit_accel.mechanisms import clear, gna, llsa, sla

FUNCTIONS = {
    "sla": (sla.sla_attention, sla.reference),
    "clear": (clear.clear_attention, clear.reference),
    "llsa": (llsa.llsa_attention, llsa.reference),
    "gna": (gna.gna_attention, gna.reference),
}
INF = math.inf

# (mechanism, grid, options, options given to the oracle, which should not compute them itself)
CASES = [
    ("gna", (63,), {"window": 9, "stride": 4}, {}),
    ("gna", (7, 9), {"window": 3}, {}),
    ("gna", (7, 9), {"window": (4, 5), "stride": (3, 2)}, {}),
    ("gna", (8, 9), {"window": (3, 2), "stride": (2, 2), "dilation": (2, 3)}, {}),
    ("gna", (3, 5, 7), {"window": (2, 5, 4), "stride": (1, 3, 4)}, {}),
    ("gna", (3, 7, 5), {"window": (2, 3, 5), "stride": (2, 1, 3), "is_causal": (True, False, True)}, {}),
    ("gna", (31,), {"window": 5, "stride": 3, "dilation": 4, "is_causal": True}, {}),
    ("clear", (63,), {"radius": 7.5}, {}),
    ("clear", (7, 9), {"radius": 3}, {}),
    ("clear", (7, 9), {"radius": 5}, {}),
    ("clear", (7, 9), {"radius": (2.5, 4)}, {}),
    ("clear", (7, 9), {"radius": 2.2, "down_factor": 2}, {}),
    ("clear", (9, 7), {"radius": (3, INF), "down_factor": 4}, {}),
    ("clear", (3, 5, 7), {"radius": (1.5, 3, 2), "down_factor": 3}, {}),
    ("clear", (3, 7, 5), {"radius": 2.5}, {}),
    ("sla", (63,), {"block_q": 8, "block_kv": 16, "critical": 0.5, "negligible": 0.25}, {}),
    ("sla", (7, 9), {"block_q": 16, "block_kv": 8, "critical": 0.3, "negligible": 0.2, "feature_map": "elu"}, {}),
    ("sla", (7, 9), {"block_q": 8, "block_kv": 8, "critical": 0.2, "linear_over": "all", "smooth_key": True}, {}),
    (
        "sla",
        (11, 13),
        {"block_q": 64, "block_kv": 16, "critical": 0.3, "tile_order": True, "feature_map": "relu"},
        {"boxes": ((8, 8), (4, 4))},
    ),
    (
        "sla",
        (3, 5, 10),
        {"block_q": 128, "block_kv": 64, "critical": 0.4, "negligible": 0.3, "tile_order": True},
        {"boxes": ((2, 8, 8), (4, 4, 4))},
    ),
    ("llsa", (100,), {"block_size": 4, "topk": 3, "levels": 2}, {"boxes": ((4,), (16,))}),
    ("llsa", (7, 9), {"block_size": 16, "topk": 2}, {"boxes": ((4, 4),)}),
    ("llsa", (7, 9), {"block_size": 4, "topk": 2, "levels": 3}, {"boxes": ((2, 2), (4, 4), (8, 8))}),
    ("llsa", (11, 13), {"block_size": 4, "topk": 2, "levels": 2, "enrich": False}, {"boxes": ((2, 2), (4, 4))}),
    ("llsa", (3, 5, 7), {"block_size": 16, "topk": 3, "levels": 1}, {"boxes": ((2, 2, 4),)}),
    ("llsa", (5, 4, 7), {"block_size": 8, "topk": 1, "levels": 2}, {"boxes": ((2, 2, 2), (4, 4, 4))}),
]


def inputs(layout, dim, *, batch=2, heads=None, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    heads = heads or (2 if layout.grid_len < 150 else 1)  # the oracle is slow
    return [torch.randn(batch, heads, layout.seq_len, dim, generator=generator).to(dtype) for _ in range(3)]


def learned(name, options, dim, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if name == "sla":
        return {"weight": torch.randn(dim, dim, generator=generator) / 4, "bias": torch.randn(dim, generator=generator)}
    if name == "clear" and options.get("down_factor", 1) > 1:
        f = options["down_factor"]
        return {"pool_weight": (torch.rand(f, f, generator=generator) + 0.5) / f**2}
    return {}


def padding(layout, batch=2, seed=2):
    """Scattered gaps, a long masked interval in the first element, masked keys at the end in the second."""
    mask = torch.rand(batch, layout.seq_len, generator=torch.Generator().manual_seed(seed)) > 0.15
    mask[0, layout.seq_len // 3 : layout.seq_len // 2] = False
    mask[1, -layout.seq_len // 5 :] = False
    return mask


def expected(name, qkv, layout, options, given):
    skipped = {"sla": ("tile_order",), "llsa": ("block_size", "levels")}.get(name, ())
    options = {k: v for k, v in options.items() if k not in skipped}
    return torch.from_numpy(getattr(oracle, name)(*qkv, layout, **options, **given))


def check(name, qkv, layout, options, given, *, rows=None):
    want = expected(name, qkv, layout, options, given)
    for function in FUNCTIONS[name]:
        got = function(*qkv, layout, **options).double()
        error = (got - want).abs()
        if rows is not None:  # the selection is undefined for a query block that is all padding
            error = error * rows[:, None, :, None]
        assert float(error.max() / want.abs().max()) < 1e-5, function.__module__ + "." + function.__name__


@pytest.mark.parametrize("text", [(0, 0), (5, 3)], ids=["image", "text"])
@pytest.mark.parametrize("name, grid, options, given", CASES)
def test_agrees_with_the_paper(name, grid, options, given, text):
    layout = TokenLayout(grid, *text)
    options = options | learned(name, options, 16)
    check(name, inputs(layout, 16), layout, options, given)


@pytest.mark.parametrize("name, grid, options, given", CASES)
def test_padding_is_as_if_it_were_not_there(name, grid, options, given):
    layout = TokenLayout(grid, 4, 3)
    mask = padding(layout)
    options = options | learned(name, options, 16)
    check(name, inputs(layout, 16), layout, options | {"key_mask": mask}, given, rows=mask)


@pytest.mark.parametrize("dim", [40, 64, 80, 96, 128])
@pytest.mark.parametrize("name, grid, options, given", [CASES[2], CASES[11], CASES[16], CASES[22]])
def test_head_dims(name, grid, options, given, dim):
    layout = TokenLayout(grid, 2, 1)
    options = options | learned(name, options, dim) | {"scale": 0.07}
    check(name, inputs(layout, dim, batch=1), layout, options, given)


LENGTHS = {
    "gna": lambda n: ({"window": max(1, n // 8), "stride": max(1, n // 16)}, {}),
    "clear": lambda n: ({"radius": n / 9 + 0.5}, {}),
    "sla": lambda n: ({"critical": 0.2, "negligible": 0.2, "block_kv": 32}, {}),
    "llsa": lambda n: ({"topk": 2, "levels": 2 if n > 63 else 1}, {"boxes": ((16,), (256,))[: 2 if n > 63 else 1]}),
}


@pytest.mark.parametrize(
    "name, length",
    sweep.keep(
        itertools.product(LENGTHS, [1, 63, 64, 500, 1000]),  # the oracle takes 2 s for 1,000 tokens
        lambda case: case[1] < 500 or case in (("gna", 500), ("clear", 500), ("sla", 1000), ("llsa", 500)),
    ),
)
def test_lengths(name, length):
    layout = TokenLayout((length,))
    options, given = LENGTHS[name](length)
    qkv = inputs(layout, 16, batch=1, heads=1)
    want = expected(name, qkv, layout, options, given)
    got = FUNCTIONS[name][0](*qkv, layout, **options)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["sla", "llsa"])
def test_no_layout_is_one_axis(name):
    qkv = inputs(TokenLayout((300,)), 16)
    function, reference = FUNCTIONS[name]
    options = {"sla": {"critical": 0.4}, "llsa": {"topk": 3}}[name]
    assert torch.equal(function(*qkv, **options), function(*qkv, TokenLayout((300,)), **options))
    torch.testing.assert_close(reference(*qkv, **options), function(*qkv, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, grid, options, given", [CASES[4], CASES[13], CASES[19], CASES[24]])
def test_any_strides(name, grid, options, given):
    layout = TokenLayout(grid, 2, 3)
    qkv = inputs(layout, 16, heads=2)
    options = options | learned(name, options, 16)
    want = FUNCTIONS[name][0](*qkv, layout, **options)
    q, k, v = qkv
    views = [
        q.transpose(1, 2).contiguous().transpose(1, 2),  # strides as after a projection
        k.transpose(-1, -2).contiguous().transpose(-1, -2),
        torch.stack([v, v], -1).flatten(-2)[..., ::2],
    ]
    assert not any(x.is_contiguous() for x in views)
    torch.testing.assert_close(FUNCTIONS[name][0](*views, layout, **options), want, rtol=1e-6, atol=1e-6)


OPEN = [
    ("gna", {"window": (3, 5, 7)}),
    ("clear", {"radius": 8.4}),
    ("clear", {"radius": INF}),
    ("clear", {"radius": (INF, 8.7, 30)}),
    ("sla", {"critical": 1, "negligible": 0, "block_kv": 16}),
    ("sla", {"critical": 1, "negligible": 0, "block_kv": 16, "tile_order": True}),
    ("llsa", {"topk": 1000, "enrich": False}),
    ("llsa", {"topk": 36, "block_size": 4, "levels": 3, "enrich": False}),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name, options", OPEN)
def test_wide_open_is_dense(name, options, masked):
    layout = TokenLayout((3, 5, 7), 4, 2)
    qkv = inputs(layout, 64)
    mask = padding(layout) if masked else None
    want = F.scaled_dot_product_attention(*qkv, attn_mask=None if mask is None else mask[:, None, None])
    got = FUNCTIONS[name][0](*qkv, layout, **options, key_mask=mask)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name, grid, options, given", [CASES[4], CASES[13], CASES[19], CASES[16], CASES[22]])
def test_low_precision_is_as_good_as_dense_attention(name, grid, options, given, dtype, masked):
    layout = TokenLayout(grid, 5, 3)
    qkv = inputs(layout, 64, dtype=dtype)
    options = options | learned(name, options, 64)
    if masked:
        options["key_mask"] = torch.arange(layout.seq_len).expand(2, -1) < layout.seq_len - 2
    exact = FUNCTIONS[name][1](*(x.double() for x in qkv), layout, **options)
    got = FUNCTIONS[name][0](*qkv, layout, **options)
    assert got.dtype == dtype
    dense = F.scaled_dot_product_attention(*qkv).double()
    dense_error = (dense - F.scaled_dot_product_attention(*(x.double() for x in qkv))).abs().max()
    rounding = exact.abs().max() * torch.finfo(dtype).eps
    assert float((got.double() - exact).abs().max()) <= 2 * float(dense_error + rounding)


def test_float64_stays_float64():
    layout = TokenLayout((5, 6))
    qkv = inputs(layout, 16, dtype=torch.float64)
    assert gna.gna_attention(*qkv, layout, window=3).dtype == torch.float64


@pytest.mark.parametrize("name, grid, options, given", [case for case in CASES if case[0] == "llsa"][:2])
def test_float64_is_exact_to_float64(name, grid, options, given):
    layout = TokenLayout(grid, 2, 1)
    qkv = inputs(layout, 16, dtype=torch.float64)
    want = expected(name, qkv, layout, options, given)
    torch.testing.assert_close(FUNCTIONS[name][0](*qkv, layout, **options), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("linear_over", ["marginal", "all"])
def test_single_element_with_a_fully_padded_block(linear_over):
    """All blocks are full and the batch size is 1, but fewer blocks count than exist."""
    layout = TokenLayout((40,), 0, 2)
    mask = torch.ones(1, layout.seq_len, dtype=torch.bool)
    mask[0, 8:12] = False
    options = {"block_q": 4, "block_kv": 4, "critical": 0.5, "negligible": 0.3, "linear_over": linear_over}
    options |= learned("sla", options, 16) | {"key_mask": mask}
    check("sla", inputs(layout, 16, batch=1), layout, options, {}, rows=mask)


def test_equal_scores_are_never_critical_and_negligible():
    """Queries of zero: whichever blocks are critical, half of the eight are marginal."""
    layout = TokenLayout((64,))
    _, key, _ = inputs(layout, 8, batch=1, heads=1)
    query = torch.zeros_like(key)
    options = {"block_q": 8, "block_kv": 8, "critical": 0.25, "negligible": 0.25}
    place = torch.zeros_like(key)  # the column encodes the block of a value
    place.view(8, 8, 8)[torch.arange(8), :, torch.arange(8)] = 1
    sparse = sla.sla_attention(query, key, place, layout, **options)
    both = sla.sla_attention(query, key, place, layout, weight=torch.eye(8), **options)
    linear = both - sparse
    assert ((sparse > 1e-3).sum(-1) == 2).all()
    assert ((linear > 1e-3).sum(-1) == 4).all()
    assert not ((sparse > 1e-3) & (linear > 1e-3)).any()


@pytest.mark.parametrize("radius", [1e-200, (1e-200, 5), 0.5])
def test_a_tiny_circle_holds_the_token_itself(radius):
    layout = TokenLayout((4, 5), 1, 0)
    options = {"radius": radius}
    same = {"radius": (1, 5) if isinstance(radius, tuple) else 1}
    qkv = inputs(layout, 16)
    want = expected("clear", qkv, layout, same, {})
    for function in FUNCTIONS["clear"]:
        torch.testing.assert_close(function(*qkv, layout, **options).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton", "flex"])
@pytest.mark.parametrize("name, grid, options, given", [CASES[2], CASES[11], CASES[16], CASES[22]])
def test_scales_of_any_sign(name, grid, options, given, backend):
    """The selection depends on the scores only, for any scale."""
    if name == "llsa" and backend == "flex":
        pytest.skip("LLSA has no such backend")
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the tensors are on the CPU")
    layout = TokenLayout(grid, 2, 1)
    options = options | learned(name, options, 8)
    qkv = inputs(layout, 8, batch=1, heads=1)
    for scale in (-0.7, -20.0, 0.0):
        want = expected(name, qkv, layout, options | {"scale": scale}, given)
        got = FUNCTIONS[name][0](*qkv, layout, **options, scale=scale, backend=backend)
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


# a key exactly on the border: along an axis, off the axes, in decimals, in 3-D, beyond float32
BORDERS = [
    ((3, 9), (4, 7)),
    ((4, 9), (5, 10)),
    ((2, 13), (2.6, 13)),
    ((7, 7), 2.5),
    ((4, 5), (1.5, 3)),
    ((2, 4, 5), (3, 6, 2)),
    ((2, 102), (97, 101)),
    ((2, 2, 2), (1009.7, 1013.3, 1)),
]


@pytest.mark.parametrize("backend", ["torch", "triton", "flex"])
@pytest.mark.parametrize("grid, radius", BORDERS)
def test_key_on_the_border_is_masked(grid, radius, backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the tensors are on the CPU")
    layout = TokenLayout(grid)
    qkv = inputs(layout, 8, batch=1, heads=1)
    want = expected("clear", qkv, layout, {"radius": radius}, {})
    got = clear.clear_attention(*qkv, layout, radius=radius, backend=backend)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    if backend == "torch":
        got = clear.reference(*qkv, layout, radius=radius)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "decimal"])
def test_balls_separate_inside_from_outside_exactly(whole):
    """Checked in float64, in which the torch path, Flex and kernels with a ball that is not `exact` compare; otherwise
    in float32, too."""
    layout, unit = TokenLayout((24, 25)), 1 if whole else 10
    place = torch.arange(25)
    for r0, r1 in itertools.product(range(1, 25) if whole else range(10, 70, 7), repeat=2):
        axes, limit = clear._axes(layout, (r0 / unit, r1 / unit))
        inside = (place[:24, None] * r1 * unit) ** 2 + (place * r0 * unit) ** 2 < (r0 * r1) ** 2  # exact in int64
        weights, bound, exact = block_plan._ball((block_plan.NeighborhoodAxis(1, 1, 1, 1, False), *axes), limit)
        for dtype in [torch.float64] + [torch.float32] * exact:
            squares = place.to(dtype) ** 2
            w0, w1, least = torch.tensor([*weights[1:], bound], dtype=dtype)
            assert torch.equal(w0 * squares[:24, None] + w1 * squares < least, inside), (r0, r1, dtype)


@pytest.mark.parametrize("shape", [(0, 2), (1, 0)])
@pytest.mark.parametrize("name, options", OPEN[:2] + OPEN[4:5] + OPEN[6:7])
def test_empty_inputs_give_empty_outputs(name, options, shape):
    layout = TokenLayout((3, 5, 7))
    qkv = [torch.zeros(*shape, layout.seq_len, 8, requires_grad=True) for _ in range(3)]
    out = FUNCTIONS[name][0](*qkv, layout, **options)
    out.sum().backward()
    assert out.shape == qkv[0].shape
    assert all(x.grad.shape == x.shape for x in qkv)
