"""Windows by torch's FlexAttention: the same plans as the kernels', the same numbers as the torch path."""

import pytest
import torch

from dit_accel import TokenLayout
from dit_accel.functional import clear_attention, gna_attention
from dit_accel.kernels.block_plan import BlockPlan, window_plan
from dit_accel.kernels.block_sparse_flex import block_sparse_flex
from dit_accel.kernels.tiling import Tiling
from dit_accel.kernels.window import BallAxis, NeighborhoodAxis

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


def inputs(layout, batch=2, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(batch, layout.seq_len, 2, 16, dtype=dtype).transpose(1, 2) for _ in range(3)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}, {case[1].grid}, {case[2]}")
def test_flex_agrees_with_the_torch_path(case, masked):
    function, layout, options = case
    tensors = inputs(layout)
    mask = torch.rand(2, layout.seq_len) > 0.3 if masked else None
    exact = function(*(x.double() for x in tensors), layout, key_padding_mask=mask, backend="torch", **options)
    out = function(*tensors, layout, key_padding_mask=mask, backend="flex", **options)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)


def test_gradients_through_flex_are_those_of_torch():
    layout, grads = L((12, 14)), []
    for backend in ("flex", "torch"):
        tensors = [x.requires_grad_() for x in inputs(layout)]
        gna_attention(*tensors, layout, window=5, backend=backend).square().sum().backward()
        grads.append([x.grad for x in tensors])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


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
    mask = plan.to_block_mask((1024, 1024)).block_mask
    assert mask.BLOCK_SIZE == (64, 64)
    dense = torch.zeros(plan.q.n_tiles, plan.kv.n_tiles, dtype=torch.int)
    for tile, (n, listed) in enumerate(zip(plan.n_tiles[0].tolist(), plan.tiles[0].tolist(), strict=True)):
        dense[tile, listed[:n]] = 1
    assert torch.equal(mask.to_dense()[0, 0], dense)
    full = mask.full_kv_num_blocks
    assert full is not None and torch.equal(full[0, 0], plan.n_full[0])


def test_lists_that_differ_by_head_are_refused():
    tiling = Tiling.of((64,), (32,))
    ones = torch.ones(2, 2, dtype=torch.int32)
    plan = BlockPlan(tiling, tiling, torch.zeros(2, 2, 1, dtype=torch.int32), None, ones)
    with pytest.raises(ValueError, match="one list for all heads"):
        plan.to_block_mask((64, 64))
