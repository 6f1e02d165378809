"""Calls of the block-sparse core that the Hopper kernel supports: for the GPU, and for an interpreter off it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dit_accel.kernels.block_sparse.forward import LinearBranch, block_sparse_attention
from dit_accel.kernels.block_sparse.plan import BlockPlan, window_plan
from dit_accel.kernels.tiling import Tiling
from dit_accel.kernels.windows.geometry import BallAxis, NeighborhoodAxis


def lists(grid, q_box, k_box, n):
    """Plans with n distinct key tiles per query tile of two times two heads, in ascending order."""

    def make(device):
        q, kv = Tiling.of(grid, q_box), Tiling.of(grid, k_box)
        tiles = torch.rand(4, q.n_tiles, kv.n_tiles, device=device).topk(n).indices.sort().values.int()
        return BlockPlan(q, kv, tiles, None, torch.full((4, q.n_tiles), n, dtype=torch.int32, device=device))

    return make


def window(*axes, limit=1.0, keys=64):
    return lambda device: window_plan(axes, limit, 128, keys, torch.device(device))


N, B = NeighborhoodAxis, BallAxis
# plan, tokens before and after the grid, key heads (of two query heads), states per head, pooled tokens
HOPPER_CASES = {
    "short last tile": (lists((1000,), (128,), (64,), 5), (0, 0), 2, 0, 0),
    "tiles of 128, one step": (lists((1000,), (128,), (128,), 1), (0, 0), 1, 0, 0),
    "ragged tiles of 128": (lists((30, 30), (8, 16), (8, 16), 3), (0, 0), 2, 0, 0),
    "linear branch": (lists((1000,), (128,), (64,), 6), (0, 0), 2, 1, 0),
    "linear branch by tile, global tokens": (lists((6, 12, 20), (2, 8, 8), (2, 4, 8), 7), (7, 13), 2, 90, 0),
    "linear branch, ragged in 3-D": (lists((5, 20, 12), (2, 8, 8), (4, 4, 4), 6), (0, 0), 2, 90, 0),
    "full tiles": (window(N(6, 4, 2, 1, False), N(16, 8, 8, 1, False), N(24, 8, 8, 1, False)), (0, 0), 1, 0, 0),
    "interval, causal interval": (window(N(40, 15, 2, 1, False), N(56, 17, 3, 1, True), keys=128), (5, 3), 2, 0, 0),
    "circle": (window(B(40, 8, 1.0), B(56, 8, 1.0), limit=56.25), (5, 300), 1, 0, 0),
    "circle, tiles of 128": (window(B(41, 8, 1.0), B(55, 8, 1.0), limit=56.25, keys=128), (200, 0), 2, 0, 0),
    "ellipsoid, pooled": (window(B(5, 2, 1.0), B(19, 5, 0.3), B(23, 6, 0.2), limit=7.3), (5, 3), 1, 0, 70),
    "circle, pooled, no global tokens": (window(B(40, 8, 1.0), B(56, 8, 1.0), limit=56.25), (0, 0), 2, 0, 150),
}


@dataclass
class Call:
    """Call of the core. It returns output and log-sum-exp, with the inputs cast to a dtype, and with a given launch
    configuration or the one chosen for the GPU."""

    tensors: list[torch.Tensor]
    plan: BlockPlan
    before: int
    pooled: list[torch.Tensor]
    linear: LinearBranch | None

    def __call__(self, to=None, config=None):
        def cast(x):
            return x if to is None else x.to(to)

        linear = self.linear and replace(self.linear, state=cast(self.linear.state), bias=cast(self.linear.bias))
        return block_sparse_attention(
            *map(cast, self.tensors), self.plan, scale=self.tensors[0].shape[-1] ** -0.5,
            before=(self.before, self.before), pooled=(*map(cast, self.pooled), None) if self.pooled else None,
            return_lse=True, config=config, linear=linear,
        )  # fmt: skip


def hopper_case(name, dim, dtype, device):
    """Random inputs of a case, two batch elements of two heads."""
    torch.manual_seed(0)
    make, (before, after), kv_heads, n_states, n_pooled = HOPPER_CASES[name]
    plan = make(device)
    length = before + plan.q.n_tokens + after
    shapes = [(2, length, heads, dim) for heads in (2, kv_heads, kv_heads)]
    tensors = [torch.randn(shape, device=device).to(dtype).transpose(1, 2) for shape in shapes]
    pooled = [torch.randn(2, kv_heads, n_pooled, dim, device=device).to(dtype) for _ in range(2)] if n_pooled else []
    linear = None
    if n_states:
        n_states = min(n_states, plan.q.n_tiles)
        state = (torch.randn(4, n_states, dim, dim, device=device) / 8).to(dtype)
        norm, eps = torch.rand(4, n_states, dim, device=device), torch.rand(4, device=device)
        linear = LinearBranch(state, norm, eps, torch.randn(dim, device=device).to(dtype), "softmax")
    return Call(tensors, plan, before, pooled, linear)
