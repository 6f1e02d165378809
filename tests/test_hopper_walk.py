"""The Hopper kernel in `gluon_interpreter`: which keys, values and queries are combined, and that no barrier deadlocks.
Properties that need a GPU are tested in tests/gpu."""

import pytest
import sweep
import torch
from gluon_interpreter import Interpreted
from hopper_cases import HOPPER_CASES, hopper_case

from dit_accel.kernels.block_sparse import forward as block_sparse_triton
from dit_accel.kernels.block_sparse import hopper as block_sparse_hopper
from dit_accel.kernels.block_sparse import hopper_fetch as block_sparse_hopper_fetch
from dit_accel.kernels.block_sparse import hopper_kernel as block_sparse_hopper_kernel
from dit_accel.kernels.block_sparse import hopper_walk as block_sparse_hopper_walk

MODULES = (block_sparse_hopper_walk, block_sparse_hopper_fetch, block_sparse_hopper_kernel)


def positions_of(grid):
    """Position (N, 3) of each token of a grid in raster order."""
    return torch.cartesian_prod(*(torch.arange(n) for n in grid))


def tile_indices(tiling):
    """Tile index (N,) of each token of a grid."""
    box = positions_of(tiling.grid) // torch.tensor(tiling.box)
    _, n1, n2 = tiling.counts
    return (box[:, 0] * n1 + box[:, 1]) * n2 + box[:, 2]


def mask_of_plan(plan):
    """Mask (1 or G, queries, keys) of a plan on the grid."""
    if plan.mask is None:
        shown = torch.zeros(len(plan.kv_indices), plan.q.n_tiles, plan.kv.n_tiles, dtype=torch.bool)
        shown.scatter_(2, plan.kv_indices.long(), True)
        return shown[:, tile_indices(plan.q)][:, :, tile_indices(plan.kv)]
    q, k = positions_of(plan.q.grid), positions_of(plan.kv.grid)
    visible, cost = torch.ones(len(q), len(k), dtype=torch.bool), torch.zeros(len(q), len(k))
    for axis in range(3):
        _, first, last = plan.mask.tables[axis]
        if plan.mask.intervals[axis]:
            visible &= (k[:, axis] >= first[q[:, axis], None]) & (k[:, axis] <= last[q[:, axis], None])
        if plan.mask.weights:
            cost += plan.mask.weights[axis] * (k[:, axis] - q[:, axis, None]) ** 2
    return (visible & (cost < plan.mask.limit) if plan.mask.weights else visible)[None]


def dense(call):
    """Output and log-sum-exp from all logits, in float64."""
    q, k, v = (x.double() for x in call.tensors)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    n, grid = q.shape[2], slice(call.before, call.before + call.plan.q.n_tokens)
    visible = torch.ones(q.shape[0] * q.shape[1], n, n, dtype=torch.bool)
    visible[:, grid, grid] = mask_of_plan(call.plan)
    if call.pooled:
        pk, pv = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in call.pooled)
        k, v = torch.cat([k, pk], 2), torch.cat([v, pv], 2)
        on_grid = torch.zeros(n, dtype=torch.bool)
        on_grid[grid] = True
        visible = torch.cat([visible, on_grid[None, :, None].expand(len(visible), n, pk.shape[2])], 2)
    logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible.view(*q.shape[:2], n, -1), -torch.inf)
    out, lse = torch.softmax(logits, -1) @ v, logits.logsumexp(-1)
    if call.linear:
        phi = torch.softmax(q[:, :, grid], -1).flatten(0, 1)
        by_tile = call.linear.state.shape[1] > 1
        which = tile_indices(call.plan.q) if by_tile else torch.zeros(phi.shape[1], dtype=torch.long)
        state, norm = call.linear.state.double(), call.linear.norm.double()
        denominator = (phi * norm[:, which]).sum(-1) + call.linear.eps.double()[:, None]
        part = torch.stack([phi[:, i, None] @ state[:, w] for i, w in enumerate(which.tolist())], 1)[:, :, 0]
        out[:, :, grid] += (part / denominator[..., None] + call.linear.bias.double()).view_as(out[:, :, grid])
    return out.float(), lse.float()


def properties(case, *launch):
    """What may matter together: the key tile, global tokens, grouped heads, states, pooled tokens; and the launch."""
    make, texts, kv_heads, n_states, n_pooled = HOPPER_CASES[case]
    plan = make("cpu")
    kind = plan.mask and (plan.mask.weights is not None, any(plan.mask.intervals))
    return plan.kv.volume, kind, max(texts) > 0, kv_heads, n_states > 0, n_pooled > 0, launch


@pytest.mark.parametrize(
    "case, dim, processors",
    sweep.cover([(case, *launch) for case in HOPPER_CASES for launch in ((64, 132), (128, 3))], properties),
)
def test_walk_agrees_with_attention_over_all_logits(case, dim, processors, monkeypatch):
    """With few programs, each processes many tiles."""
    call = hopper_case(case, dim, torch.float16, "cpu")
    exact, exact_lse = dense(call)
    kernel = Interpreted(block_sparse_hopper_kernel.block_sparse_hopper_kernel, *MODULES)
    monkeypatch.setattr(block_sparse_triton, "_hopper", lambda device: block_sparse_hopper)
    monkeypatch.setattr(block_sparse_hopper, "block_sparse_hopper_kernel", kernel)
    monkeypatch.setattr(block_sparse_hopper, "_processors", lambda device: processors)
    out, lse = call()
    assert kernel.launches == len(out)
    torch.testing.assert_close(out.float(), exact, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse, exact_lse, atol=2e-5, rtol=1e-5)
