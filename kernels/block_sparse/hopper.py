"""The attention of ``block_sparse/forward.py`` in a separate kernel for Hopper GPUs: 16-bit, head dims 64 and 128,
tiles of 128 queries. This module launches it and assigns query tiles to programs."""

from __future__ import annotations

import heapq
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..launch import check_contiguous
from .arguments import FullTiles, lists_of, state_of, tokens_of, window_of
from .hopper_kernel import block_sparse_hopper_kernel
from .hopper_walk import Linear, Output, Schedule, Sizes, Static
from .plan import BlockPlan

__all__ = ["VOLUMES", "block_sparse_hopper", "supports", "supports_call"]

QUERIES = 128  # per program, split between two groups of warps
KEYS = 128  # per step: one tile of 128 or two of 64
VOLUMES = ((QUERIES, 64), (QUERIES, KEYS))  # supported volumes of query and key tiles
STAGES = 2  # steps in shared memory for head dim 128; twice that for head dim 64
IDLE_STEPS = 2  # cost of a tile in addition to its steps, in steps
REGISTERS = (240, 24)  # per thread, in the warps that compute and in the warp that loads
DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
LAYOUT = gl.NVMMASharedLayout(128, 16, 2)
ROWS_LAYOUT, BOXES_LAYOUT = gl.NVMMASharedLayout(128, 16, 3), gl.NVMMASharedLayout(128, 16, 5)


@lru_cache(maxsize=64)
def _even_schedule(items: int, programs: int, device: torch.device) -> Schedule:
    """Schedule of items of equal cost, in order."""
    n_turns = -(-items // programs)
    order = torch.arange(n_turns * programs, dtype=torch.int32).view(n_turns, programs)
    return Schedule(order.to(device), (order < items).sum(0, dtype=torch.int32).to(device))


@lru_cache(maxsize=64)
def _uneven_schedule(
    steps: int | BlockPlan,
    more: int,
    n_q_tiles: int,
    global_steps: int,
    n_global_tiles: int,
    heads: int,
    programs: int,
    device: torch.device,
) -> Schedule:
    """Schedule of items of unequal cost (global queries take longer): each item goes to the program with the least
    work.

    steps: of the list of each grid tile, or the plan with the lists. more: steps after the list.
    """
    if isinstance(steps, int):
        costs = [steps] * n_q_tiles
    else:
        costs = [-(-n * steps.kv.volume // KEYS) for n in steps.kv_counts[0].tolist()]
    costs = [global_steps + IDLE_STEPS] * (n_global_tiles * heads) + [
        cost + more + IDLE_STEPS for cost in costs
    ] * heads
    queue = [(0, i) for i in range(programs)]
    lists: list[list[int]] = [[] for _ in range(programs)]
    for item, cost in enumerate(costs):
        load, program = heapq.heappop(queue)
        lists[program].append(item)
        heapq.heappush(queue, (load + cost, program))
    turns = torch.tensor([len(x) for x in lists], dtype=torch.int32)
    order = torch.zeros(programs, int(turns.max()), dtype=torch.int32)
    for row, items in zip(order, lists, strict=True):
        row[: len(items)] = torch.tensor(items, dtype=torch.int32)
    return Schedule(order.T.contiguous().to(device), turns.to(device))


def _processors(device: torch.device) -> int:
    """Multiprocessors of the GPU, each of which runs one program; 132 (H100) without a GPU, for offline compilation."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _rows(x: Tensor, n: int) -> TensorDescriptor:
    """Tensor descriptor of (H, S, D) with blocks of n rows."""
    stride_h, stride_r, _ = x.stride()
    return TensorDescriptor(x, list(x.shape), [stride_h, stride_r, 1], [1, n, 64], ROWS_LAYOUT)


def _boxes(x: Tensor, grid: tuple[int, int, int], box: tuple[int, ...], before: int) -> TensorDescriptor:
    """Tensor descriptor of the grid in (H, S, D) with blocks of one tile."""
    heads, _, dim = x.shape
    stride_h, row, _ = x.stride()
    strides = [stride_h, grid[1] * grid[2] * row, grid[2] * row, row, 1]
    return TensorDescriptor(x[:, before:], [heads, *grid, dim], strides, [1, *box, 64], BOXES_LAYOUT)


def _half(box: tuple[int, int, int]) -> tuple[int, ...]:
    first = next(i for i in range(3) if box[i] > 1)
    return tuple(side // 2 if i == first else side for i, side in enumerate(box))


def _static(
    dim: int, plan: BlockPlan, full: FullTiles, has_global: bool, has_pooled: bool, linear: Any, has_lse: bool
) -> Static:
    """Compile-time parameters of a plan."""
    q, kv, mask = plan.q, plan.kv, plan.mask
    weights = (mask and mask.weights) or (0.0, 0.0, 0.0)
    all_full = full == "all" or (full == "counted" and plan.all_full)
    return Static(
        D=dim,
        N=KEYS,
        SLOTS=STAGES * (KEYS // dim),
        QB=q.box,
        KB=kv.box,
        FLAT=q.grid[:2] == (1, 1) == kv.grid[:2],
        SHORT=(kv.grid[0] % kv.box[0] != 0, kv.grid[1] % kv.box[1] != 0, kv.grid[2] % kv.box[2] != 0),
        FULL=full,
        HAS_PARTIAL=not all_full or kv.volume < KEYS,  # two tiles per step: the last may be alone
        HAS_GLOBAL=has_global,
        HAS_POOLED=has_pooled,
        STATE=state_of(linear.state if linear else None),
        HAS_BIAS=linear is not None and linear.bias is not None,
        HAS_LSE=has_lse,
        FEATURE_MAP=linear.feature_map if linear else "relu",
        IN=mask.intervals if mask else (False,) * 3,
        BALL=(bool(weights[0]), bool(weights[1]), bool(weights[2])),
        ROUND=set(weights) <= {0.0, 1.0},
    )


def block_sparse_hopper(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    out: Tensor,
    lse: Tensor | None,
    *,
    scale: float,
    before: tuple[int, int],
    pooled: tuple[Tensor, Tensor] | None,
    linear: Any,
    full: FullTiles,
) -> None:
    """`block_sparse_attention` into ``out`` and ``lse``, for calls with `supports_call`; the caller has checked plan
    and linear branch. ``scale`` is in units of log2."""
    check_contiguous(lse=lse)
    batch, heads, length_q, dim = query.shape
    kv_heads, length_k = key.shape[1:3]
    q, kv, mask = plan.q, plan.kv, plan.mask
    n_global_before = -(-before[0] // QUERIES)
    n_global_tiles = n_global_before + -(-(length_q - q.n_tokens - before[0]) // QUERIES)
    n_pooled = pooled[0].shape[2] if pooled else 0
    state = linear.state if linear else None
    bias = linear.bias.contiguous() if linear and linear.bias is not None else None
    has_global = n_global_tiles > 0 or length_k > kv.n_tokens
    static = _static(dim, plan, full, has_global, pooled is not None, linear, lse is not None)
    programs = min(_processors(query.device), (n_global_tiles + q.n_tiles) * heads)
    if n_global_tiles:
        steps = plan if mask is not None else -(-plan.kv_indices.shape[2] * kv.volume // KEYS)
        whole, rest = -(-length_k // KEYS), -(-(length_k - kv.n_tokens) // KEYS) + -(-n_pooled // KEYS)
        schedule = _uneven_schedule(steps, rest, q.n_tiles, whole, n_global_tiles, heads, programs, query.device)
    else:
        schedule = _even_schedule(q.n_tiles * heads, programs, query.device)
    lists, window, sizes = lists_of(plan), window_of(mask), Sizes(n_global_tiles, n_global_before, n_pooled)
    tokens = tokens_of(length_q, before[0], q), tokens_of(length_k, before[1], kv)
    for i in range(batch):
        own = slice(i * heads, (i + 1) * heads)

        def of(x: Tensor | None, own: slice = own) -> Tensor | None:
            """Slice of this batch element, if there is one per element."""
            return x if x is None or x.shape[0] == 1 else x[own]

        own_lists = lists._replace(
            indices=of(lists.indices), full_counts=of(lists.full_counts), counts=of(lists.counts)
        )
        rows = [None, None, None, None, None]
        if has_global:
            rows[:3] = _rows(query[i], 64), _rows(key[i], KEYS), _rows(value[i], KEYS)
        if pooled:
            rows[3:] = _rows(pooled[0][i], KEYS), _rows(pooled[1][i], KEYS)
        block_sparse_hopper_kernel[(programs,)](
            _boxes(query[i], q.grid, _half(q.box), before[0]), rows[0],
            _boxes(key[i], kv.grid, kv.box, before[1]), rows[1],
            _boxes(value[i], kv.grid, kv.box, before[1]), rows[2], rows[3], rows[4],
            None if state is None else _rows(state[own].view(-1, dim, dim), dim),
            Output(out[i], out.stride(1), out.stride(2), None if lse is None else lse[i]),
            Linear(None if state is None else linear.norm[own], None if state is None else linear.eps[own], bias),
            schedule, own_lists, window, sizes, heads, heads // kv_heads, q.n_tiles, *tokens, scale, S=static,
            DTYPE=DTYPES[query.dtype], LAYOUT=LAYOUT, REGISTERS=REGISTERS[0], FETCHER_REGISTERS=REGISTERS[1],
            num_warps=4,
        )  # fmt: skip


def supports_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    scale: float,
    key_mask: Tensor | None,
    pooled: Any,
    linear: Any,
) -> bool:
    """Whether the kernel supports this call; otherwise the portable kernel runs."""
    mask = plan.mask
    descriptors = (query, key, value, *(pooled[:2] if pooled else ()))
    return (
        supports(query)
        and plan.q.volume == QUERIES
        and plan.kv.volume in (64, KEYS)
        and key_mask is None
        and (pooled is None or pooled[2] is None)
        and scale > 0
        and not (mask and any(mask.ordered))
        and not (mask and mask.weights and not mask.exact)
        and all(_has_aligned_rows(x) for x in descriptors)
    )


def supports(query: Tensor) -> bool:
    """Whether the kernel supports the dtype and head dim."""
    return query.dtype in DTYPES and query.shape[-1] in (64, 128)


def _has_aligned_rows(x: Tensor) -> bool:
    """Whether strides are multiples of 16 bytes, as descriptors require."""
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(x.stride(i) * 2 % 16 == 0 < x.stride(i) for i in (1, 2))
