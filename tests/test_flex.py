"""The FlexAttention backend: block masks of plans, and agreement with the torch backend and the references."""

import pytest
import sweep
import torch

from dit_accel import TokenLayout
from dit_accel.functional import clear_attention, gna_attention, sla_attention
from dit_accel.kernels.block_sparse.flex import block_sparse_flex, check_compiled, flex_mask, kernel_options
from dit_accel.kernels.block_sparse.plan import BlockPlan, window_plan
from dit_accel.kernels.tiling import Tiling
from dit_accel.kernels.windows.geometry import BallAxis, NeighborhoodAxis
from dit_accel.mechanisms import sla

L = TokenLayout
CASES = [
    (gna_attention, L((20, 29), 5, 3), {"window": (7, 9), "stride": (2, 3)}),
    (gna_attention, L((5, 9, 11)), {"window": (2, 3, 4), "stride": (2, 3, 1), "dilation": (2, 2, 2)}),
    (gna_attention, L((150,), 0, 7), {"window": 40, "stride": 7}),
    (gna_attention, L((4, 8, 9)), {"window": (2, 5, 7), "is_causal": (True, False, False)}),
    (clear_attention, L((20, 28), 5, 3), {"radius": 5.5}),
    (clear_attention, L((3, 11, 13), 4), {"radius": (1.5, 4.7, 6)}),
    (clear_attention, L((21, 26), 6), {"radius": 6, "down_factor": 4}),
    (clear_attention, L((90,)), {"radius": 9}),
]
SLA_CASES = [
    (L((203,)), {"critical": 0.4, "negligible": 0.3}),
    (L((150,), 0, 7), {"block_q": 32, "block_kv": 16, "critical": 0.25, "linear_over": "all", "smooth_key": True}),
    (L((11, 13), 70, 3), {"block_q": 16, "block_kv": 32, "critical": 0.3, "tile_order": True, "feature_map": "elu"}),
    (L((5, 7, 9), 5, 66), {"block_q": 128, "block_kv": 64, "critical": 0.3, "tile_order": True}),
    (L((3, 5, 11), 4), {"block_q": 20, "block_kv": 36, "critical": 0.3, "tile_order": True, "linear_over": "all"}),
    (L((9, 15), 1, 1), {"block_q": 7, "block_kv": 90, "critical": 0.5, "negligible": 0.0}),
]


def inputs(layout, batch=2, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(batch, layout.seq_len, 2, 16, dtype=dtype).transpose(1, 2) for _ in range(3)]


@pytest.mark.parametrize(
    "case, masked",
    # each mechanism, number of axes and mask; the odd cases with a mask, the even ones without
    sweep.keep([(case, masked) for case in CASES for masked in (False, True)], lambda x: CASES.index(x[0]) % 2 == x[1]),
    ids=lambda x: f"{x[0].__name__}, {x[1].grid}, {x[2]}" if isinstance(x, tuple) else str(x),
)
def test_flex_agrees_with_the_torch_path(case, masked):
    function, layout, options = case
    tensors = inputs(layout)
    mask = torch.rand(2, layout.seq_len) > 0.3 if masked else None
    exact = function(*(x.double() for x in tensors), layout, key_mask=mask, backend="torch", **options)
    out = function(*tensors, layout, key_mask=mask, backend="flex", **options)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)


def test_gradients_through_flex_equal_torch():
    layout, grads = L((12, 14)), []
    for backend in ("flex", "torch"):
        tensors = [x.requires_grad_() for x in inputs(layout)]
        gna_attention(*tensors, layout, window=5, backend=backend).square().sum().backward()
        grads.append([x.grad for x in tensors])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("function, options", [(sla_attention, {"critical": 0.3, "block_kv": 16}), CASES[0][::2]])
def test_flex_in_a_compiled_graph(function, options):
    layout = L((12, 14), 3)

    def call(*tensors):
        return function(*tensors, layout, backend="flex", **options)

    torch.testing.assert_close(
        torch.compile(call, backend="aot_eager", fullgraph=True)(*inputs(layout)), call(*inputs(layout))
    )


def test_grouped_heads():
    plan = window_plan((BallAxis(10, 4, 1.0), BallAxis(12, 4, 1.0)), 16.0, 32, 32, torch.device("cpu"))
    torch.manual_seed(0)
    q, (k, v) = torch.randn(1, 4, 120, 16), torch.randn(2, 1, 2, 120, 16)
    out = block_sparse_flex(q, k, v, plan, scale=0.25)
    wide = block_sparse_flex(q, *(x.repeat_interleave(2, 1) for x in (k, v)), plan, scale=0.25)
    torch.testing.assert_close(out, wide)


def test_block_mask_marks_the_plans_tiles():
    axes = (NeighborhoodAxis(32, 16, 8, 1, False), NeighborhoodAxis(32, 16, 8, 1, False))
    plan = window_plan(axes, 1.0, 64, 64, torch.device("cpu"))
    mask = flex_mask(plan, (1024, 1024)).block_mask
    assert mask.BLOCK_SIZE == (64, 64)
    dense = torch.zeros(plan.q.n_tiles, plan.kv.n_tiles, dtype=torch.int)
    for tile, (n, listed) in enumerate(zip(plan.kv_counts[0].tolist(), plan.kv_indices[0].tolist(), strict=True)):
        dense[tile, listed[:n]] = 1
    assert torch.equal(mask.to_dense()[0, 0], dense)
    full = mask.full_kv_num_blocks
    assert full is not None and torch.equal(full[0, 0], plan.full_kv_counts[0])


def learned(given):
    torch.manual_seed(1)
    return {"weight": torch.randn(16, 16).double() / 4, "bias": torch.randn(16).double()} if given else {}


def close(out, exact, rows):
    assert float(torch.where(rows, out - exact, 0).abs().max() / exact.abs().max()) < 1e-5


@pytest.mark.parametrize(
    "layout, options, masked, given",
    # each case with and without a mask, and with and without a projection
    sweep.keep(
        [(*case, masked, given) for case in SLA_CASES for masked in (False, True) for given in (False, True)],
        lambda x: x[2] != x[3] if x[:2] in SLA_CASES[::2] else x[2] == x[3],
    ),
    ids=str,
)
def test_sla_by_flex_agrees_with_the_reference(layout, options, masked, given):
    tensors, more, mask = inputs(layout, dtype=torch.float64), learned(given), torch.rand(2, layout.seq_len) > 0.3
    mask[0, layout.seq_len // 3 : layout.seq_len // 2] = mask[1, -layout.seq_len // 5 :] = False
    mask |= torch.tensor(not masked)
    more |= {"key_mask": mask} if masked else {}
    exact = sla.reference(*tensors, layout, **options, **more)
    rows = mask[:, None, :, None]  # the selection is undefined for a query block that is all padding
    out = sla_attention(*tensors, layout, backend="flex", **options, **more)
    close(out, exact, rows)
    torch.testing.assert_close(out, sla_attention(*tensors, layout, backend="torch", **options, **more))
    single = {name: x.float() if x.is_floating_point() else x for name, x in more.items()}
    out = sla_attention(*(x.float() for x in tensors), layout, backend="flex", **options, **single)
    close(out.double(), exact, rows)


def test_masked_keys_do_not_leak_and_empty_rows_are_zero():
    layout, options = L((6, 7), 3), {"block_q": 16, "block_kv": 8, "critical": 0.4, "tile_order": True}
    tensors, mask = inputs(layout), torch.rand(2, layout.seq_len) > 0.3
    mask[0] = False
    spoilt = [tensors[0], *(x.masked_fill(~mask[:, None, :, None], torch.nan) for x in tensors[1:])]
    more = {name: x.float() for name, x in learned(True).items()} | {"key_mask": mask}
    out = sla_attention(*spoilt, layout, backend="flex", **options, **more)
    assert (out[0] == 0).all()
    torch.testing.assert_close(out, sla.reference(*tensors, layout, **options, **more), atol=1e-5, rtol=1e-5)
    out = gna_attention(*spoilt, layout, window=3, backend="flex", key_mask=mask)
    right = gna_attention(*tensors, layout, window=3, backend="torch", key_mask=mask)
    assert (out[0] == 0).all()
    torch.testing.assert_close(out, right, atol=1e-5, rtol=1e-5)


def test_sla_gradients_through_flex_equal_torch():
    layout, grads = L((10, 9), 4), []
    for backend in ("flex", "torch"):
        weight = learned(True)["weight"].float().requires_grad_()
        tensors = [*(x.requires_grad_() for x in inputs(layout)), weight]
        sla_attention(
            *tensors[:3], layout, block_q=16, block_kv=8, critical=0.3, weight=weight, backend=backend
        ).square().sum().backward()
        grads.append([x.grad for x in tensors])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True], ids=["no padding", "padding"])
@pytest.mark.parametrize("layout, options", SLA_CASES, ids=str)
def test_sla_block_lists_cover_all_visible_keys(layout, options, masked, monkeypatch):
    """The compiled kernel visits listed blocks and applies mask_mod to partial ones; the eager one to every logit."""
    masks = []

    def recorded(query, key, value, plan, *, scale, before, key_mask):
        masks.append(flex_mask(plan, (layout.seq_len,) * 2, before, key_mask=key_mask, heads=query.shape[1]).block_mask)
        return block_sparse_flex(query, key, value, plan, scale=scale, before=before, key_mask=key_mask)

    monkeypatch.setattr("dit_accel.kernels.block_sparse.flex.block_sparse_flex", recorded)
    key_mask = torch.rand(2, layout.seq_len) > 0.3 if masked else None
    sla_attention(*inputs(layout), layout, key_mask=key_mask, backend="flex", **options)
    [mask] = masks
    (q_len, k_len), (q_side, k_side) = mask.seq_lengths, mask.BLOCK_SIZE
    b, h, q, k = torch.meshgrid(*map(torch.arange, (2, 2, q_len, k_len)), indexing="ij")
    visible = mask.mask_mod(b, h, q, k).unflatten(3, (-1, k_side)).unflatten(2, (-1, q_side))
    lists = [(mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)]
    listed = []
    for counts, indices in lists:
        first = torch.arange(indices.shape[-1]) < counts[..., None]
        listed.append(torch.zeros(first.shape, dtype=torch.bool).scatter_(-1, indices.long(), first))
    partial, full = listed
    assert not (partial & full).any() and full.any() == (not masked and k_side == options.get("block_kv", 64))
    assert torch.equal(full & visible.all(-1).all(-2), full.expand(2, 2, -1, -1))
    assert not (visible.any(-1).any(-2) & ~(partial | full)).any()


def test_compiled_kernel_tiles_divide_the_blocks():
    for volumes in ((64, 64), (128, 64), (20, 36), (7, 200), (129, 2)):
        for dtype, dim in ((torch.bfloat16, 128), (torch.float16, 256), (torch.float32, 40), (torch.float32, 256)):
            sides = mask_of(volumes).BLOCK_SIZE
            options = kernel_options(sides, dtype, dim)
            assert all(side >= volume for side, volume in zip(sides, volumes, strict=True))
            for side, tile in zip(sides, (options["BLOCK_M"], options["BLOCK_N"]), strict=True):
                assert tile in (16, 32, 64) and side % tile == 0
    assert kernel_options((128, 128), torch.bfloat16, 128) is None
    assert kernel_options((128, 64), torch.bfloat16, 128)["BLOCK_N"] == 64


def mask_of(volumes):
    q, kv = (Tiling.of((500,), (volume,)) for volume in volumes)
    plan = BlockPlan(
        q, kv, torch.zeros(1, q.n_tiles, 1, dtype=torch.int32), None, torch.ones(1, q.n_tiles, dtype=torch.int32)
    )
    return flex_mask(plan, (500, 500)).block_mask


def test_unsupported_flex_inputs_are_refused():
    tiling = Tiling.of((64,), (32,))
    ones = torch.ones(6, 2, dtype=torch.int32)
    plan = BlockPlan(tiling, tiling, torch.zeros(6, 2, 1, dtype=torch.int32), None, ones)
    for heads in (None, 4):
        with pytest.raises(ValueError, match=f"6 lists, of each batch element and head: give heads, got {heads}"):
            flex_mask(plan, (64, 64), heads=heads)
    assert flex_mask(plan, (64, 64), heads=3).block_mask.shape == (2, 3, 64, 64)
    window = window_plan((NeighborhoodAxis(64, 9, 1, 1, False),), 1.0, 32, 32, torch.device("cpu"))
    with pytest.raises(ValueError, match="mask of a window: make one plan for each"):
        flex_mask(BlockPlan(tiling, tiling, plan.kv_indices, None, ones, window.mask), (64, 64), heads=3)
    with pytest.raises(ValueError, match=r"got float64: convert .* or choose backend"):
        check_compiled(torch.float64, 64)
    with pytest.raises(ValueError, match="head dims from 16, got 8: pad"):
        check_compiled(torch.float32, 8)
