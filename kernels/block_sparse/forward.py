"""Softmax attention over lists of key tiles in one Triton kernel: windows, selected blocks, global and pooled tokens.

A sequence is ``[before | grid | after]``. A program loops over the key tiles in the list of one tile of grid queries,
then over the global tokens and, if there are any, over pooled tokens; the first programs process the global queries,
which attend to all keys. Tiles are loaded directly from the sequence: nothing is permuted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..launch import Boxes, box_descriptors, cdiv, check_contiguous, empty_rows, next_pow2_min16, register_limit
from ..tuning import LaunchConfig, choose_config, launch_tuned, measured
from .forward_kernel import block_sparse_fwd_kernel
from .plan import BlockPlan, WindowMask

__all__ = [
    "LaunchConfig",
    "LinearBranch",
    "block_sparse_attention",
    "check_inputs",
    "check_plan",
    "cost_mode",
    "log2_scale",
    "tile_volumes",
]

LOG2E = 1.4426950408889634
TINY_SCALE = 1e-30  # replaces 0: -inf times 0 would be NaN
INTERPRETED = triton.knobs.runtime.interpret
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class LinearBranch:
    """Linear branch of a grid query q: φ(q)·state / (φ(q)·norm + eps) + bias, added to the softmax attention.

    state: (G, 1 or q tiles, D, D) in the queries' dtype, projection folded in. norm: (G, 1 or q tiles, D) float32.
    eps: (G,) float32. bias: (D,) or None. G = B*H. state None = the bias only.
    """

    state: Tensor | None
    norm: Tensor | None
    eps: Tensor | None
    bias: Tensor | None
    feature_map: str


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    *,
    scale: float,
    before: tuple[int, int] = (0, 0),
    key_mask: Tensor | None = None,
    pooled: tuple[Tensor, Tensor, Tensor | None] | None = None,
    linear: LinearBranch | None = None,
    return_lse: bool = False,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of each tile of grid queries over its list of key tiles and over all global keys; global
    queries attend to all keys.

    Args:
        query: (B, H, Sq, D) float16, bfloat16 or float32, D at most 256, any strides.
        key, value: (B, Hk, Sk, D), H a multiple of Hk.
        plan: tiles and lists, on the same device.
        scale: factor on the logits.
        before: tokens in front of the grid, among queries and among keys.
        key_mask: (B, Sk) bool, True = attend; masked keys are not read.
        pooled: pooled_key and pooled_value (B, Hk, P, D), visible to grid queries, and pooled_mask (B, P) or None.
        linear: the linear branch, added to grid queries.
        return_lse: whether to return the log-sum-exp, too.
        config: launch parameters; None = from the table or the autotuner in `tuning`, and the Hopper kernel if it
            supports the call.
    Returns: (B, H, Sq, D) in query.dtype, dense in the order (B, Sq, H, D); (B, H, Sq) float32 log-sum-exp of the
        softmax part, natural log, -inf for a query without a visible key; such a row is 0 in the output.
    Raises: ValueError: a dtype, head dim or device that the kernel does not support, or lists or states that are not
        contiguous; OutOfResources: the GPU has too little shared memory for it.
    """
    check_inputs(query)
    check_plan(plan, pooled and pooled[2])
    if linear:
        check_contiguous(state=linear.state, norm=linear.norm, eps=linear.eps)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    key_mask = key_mask if key_mask is None or key_mask.stride(-1) == 1 else key_mask.contiguous()
    batch, heads, length_q, dim = query.shape
    kv_heads, length_k = key.shape[1:3]
    q, kv, mask = plan.q, plan.kv, plan.mask
    out = empty_rows(query)
    lse = torch.empty(batch, heads, length_q, dtype=torch.float32, device=query.device) if return_lse else None
    if pooled:
        pooled = (pooled[0].contiguous(), pooled[1].contiguous(), pooled[2])
    full_mode, magnitude = _full_mode(plan, key_mask), log2_scale(scale)
    hopper = None if config else _hopper(query.device)
    if hopper and hopper.supports_call(query, key, value, plan, scale, key_mask, pooled, linear):
        hopper.block_sparse_hopper(
            query, key, value, plan, out, lse, scale=magnitude, before=before, pooled=pooled and pooled[:2],
            linear=linear, full_mode=full_mode,
        )  # fmt: skip
        return out, lse
    kind = _kind(plan)
    suited = config or choose_config(query, kind)
    block_q, block_k = min(suited.block_q, next_pow2_min16(q.volume)), min(suited.block_k, next_pow2_min16(kv.volume))
    q_parts, k_parts = cdiv(q.volume, block_q), cdiv(kv.volume, block_k)
    n_global_q, n_global_k = length_q - q.n_tokens, length_k - kv.n_tokens
    n_global_tiles, n_items = cdiv(n_global_q, block_q), q.n_tiles * q_parts
    pooled_key, pooled_value, pooled_mask = pooled if pooled else (key, value, None)
    ordered = mask.ordered if mask else (False,) * 3
    boxes: Boxes | None = None
    if key_mask is None and not any(ordered) and kv.volume == block_k:
        boxes = box_descriptors(key, value, kv, before[1])
    intervals = mask.intervals if mask else (False,) * 3
    weights = (mask and mask.weights) or (0.0, 0.0, 0.0)
    state = linear.state if linear else None
    bias = linear.bias.contiguous() if linear and linear.bias is not None else None

    def launch(config: LaunchConfig) -> None:
        found = boxes if config.boxes else None
        block_sparse_fwd_kernel[((n_global_tiles + n_items) * batch * heads,)](
            query, key, value, out, lse, key_mask, plan.tiles, plan.n_full, plan.n_tiles, mask.tables if mask else None,
            mask.ball if mask else None, pooled_key, pooled_value, pooled_mask, state, linear.norm if linear else None,
            linear.eps if linear else None, bias, *(found[:2] if found else (None, None)),
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
            0 if key_mask is None else key_mask.stride(0), *pooled_key.stride()[:3],
            0 if pooled_mask is None else pooled_mask.stride(0),
            plan.tiles.stride(0) if plan.tiles.shape[0] > 1 else 0, heads, heads // kv_heads, length_q, length_k,
            pooled_key.shape[2], *before, batch * heads, n_global_tiles, q.n_tiles, n_items, plan.tiles.shape[2],
            mask.tables.shape[2] if mask else 0, magnitude, *weights, mask.limit if mask else 0.0, *q.grid, *kv.grid,
            D=dim, BLOCK_D=next_pow2_min16(dim), BLOCK_E=_state_columns(query), BM=block_q, BN=block_k,
            QB0=q.box[0], QB1=q.box[1], QB2=q.box[2], KB0=kv.box[0], KB1=kv.box[1], KB2=kv.box[2],
            Q_PARTS=q_parts, K_PARTS=k_parts, FULL=full_mode, HAS_KEY_MASK=key_mask is not None,
            HAS_PARTIAL=full_mode != 2 and not (full_mode == 1 and plan.all_full), HAS_GLOBAL_QUERIES=n_global_q > 0,
            HAS_GLOBAL_KEYS=n_global_k > 0, HAS_POOLED=pooled is not None, HAS_POOLED_MASK=pooled_mask is not None,
            IN0=intervals[0], IN1=intervals[1], IN2=intervals[2], BALL0=bool(weights[0]), BALL1=bool(weights[1]),
            BALL2=bool(weights[2]), COST=cost_mode(mask), OR0=ordered[0], OR1=ordered[1], OR2=ordered[2],
            HAS_LSE=return_lse, STATE_MODE=0 if state is None else 1 + (state.shape[1] > 1),
            HAS_BIAS=bias is not None, FEATURE_MAP=linear.feature_map if linear else "relu",
            NEGATE=scale < 0, PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            BOXES=found[2] if found else 0,
            num_warps=config.num_warps, num_stages=config.num_stages, **register_limit(query, config.max_registers),
        )  # fmt: skip

    if config or measured(query, kind):
        launch(suited)
    else:
        traits = {"boxes": boxes is not None, "masked": key_mask is not None, "state": state is not None}
        what = " ".join([kind, f"{block_q}x{block_k}", *(name for name, has in traits.items() if has)])
        launch_tuned(launch, query, what, suited, boxes is not None)
    return out, lse


@cache
def _hopper(device: torch.device) -> Any:
    """Module of the kernel for this GPU, or None for another GPU or if Triton is too old to build it."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        return None
    from . import hopper as block_sparse_hopper

    return block_sparse_hopper


def _state_columns(query: Tensor) -> int:
    """Columns per step of the linear branch's state: all if that fits the registers of any supported GPU."""
    columns = next_pow2_min16(query.shape[-1])
    most = 32 if query.element_size() > 2 else columns if columns <= 128 else 64
    return min(columns, most)


def log2_scale(scale: float) -> float:
    """Magnitude of a scale, in units of log2."""
    return max(abs(scale) * LOG2E, TINY_SCALE)


def cost_mode(mask: WindowMask | None) -> int:
    """Mode of comparing distances with a ball; see `in_ball`."""
    if mask is None or mask.weights is None or (mask.exact and set(mask.weights) <= {0.0, 1.0}):
        return 0
    return 1 if mask.exact else 2


def _full_mode(plan: BlockPlan, key_mask: Tensor | None) -> int:
    """Tiles of a list that need no mask: 0 none, 1 the first ``n_full``, 2 all, 3 all but the last tile of the grid."""
    if key_mask is not None:
        return 0
    if plan.n_full is not None:
        return 1
    if plan.kv.is_whole:
        return 2
    return 3 if plan.kv.grid[:2] == (1, 1) else 0


def check_inputs(query: Tensor) -> None:
    """Raises: ValueError: a dtype, head dim or device that the kernels do not support."""
    if query.dtype not in DTYPES:
        raise ValueError(f"Triton kernels support float16, bfloat16, float32, got {query.dtype}: use backend='torch'")
    if query.shape[-1] > 256:
        raise ValueError(f"Triton kernels support head dims up to 256, got {query.shape[-1]}: use backend='torch'")
    if query.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"Triton kernels run on CUDA and ROCm GPUs, got a tensor on {query.device}")


def check_plan(plan: BlockPlan, pooled_mask: Tensor | None = None) -> None:
    """Raises: ValueError: lists, counts, tables or rows of the pooled mask that are not contiguous; the kernels do not
    read their strides.
    """
    tables = plan.mask.tables if plan.mask else None
    check_contiguous(tiles=plan.tiles, n_full=plan.n_full, n_tiles=plan.n_tiles, tables=tables)
    if pooled_mask is not None:
        check_contiguous(pooled_mask=pooled_mask[:1])


def tile_volumes(query: Tensor, kind: str) -> tuple[tuple[int, int], ...]:
    """Volumes of query and key tiles for a head dim, a dtype and a kind of plan; see `tuning`."""
    if (hopper := _hopper(query.device)) and hopper.supports(query):
        return hopper.VOLUMES
    config = choose_config(query, kind)
    return ((config.block_q, config.block_k),)


def _kind(plan: BlockPlan) -> str:
    if plan.mask is None:
        return "list"
    return "interval" if plan.mask.weights is None else "ball"
