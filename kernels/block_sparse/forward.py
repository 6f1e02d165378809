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

from ..arguments import mask_of, rows_of
from ..launch import Boxes, box_descriptors, cdiv, check_contiguous, empty_rows, next_pow2_min16, register_limit
from ..tuning import LaunchConfig, choose_config, launch_tuned, measured
from .arguments import Added, FullTiles, lists_of, pooled_of, state_of, static_of, tokens_of, window_of
from .forward_kernel import block_sparse_fwd_kernel
from .plan import BlockPlan

__all__ = [
    "LaunchConfig",
    "LinearBranch",
    "block_sparse_attention",
    "check_inputs",
    "check_plan",
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
    batch, heads, length_q, _ = query.shape
    kv_heads, length_k = key.shape[1:3]
    q, kv, mask = plan.q, plan.kv, plan.mask
    out = empty_rows(query)
    lse = torch.empty(batch, heads, length_q, dtype=torch.float32, device=query.device) if return_lse else None
    if pooled:
        pooled = (pooled[0].contiguous(), pooled[1].contiguous(), pooled[2])
    full, magnitude = _full_tiles(plan, key_mask), log2_scale(scale)
    hopper = None if config else _hopper(query.device)
    if hopper and hopper.supports_call(query, key, value, plan, scale, key_mask, pooled, linear):
        hopper.block_sparse_hopper(
            query, key, value, plan, out, lse, scale=magnitude, before=before, pooled=pooled and pooled[:2],
            linear=linear, full=full,
        )  # fmt: skip
        return out, lse
    kind = _kind(plan)
    suited = config or choose_config(query, kind)
    block_q, block_k = min(suited.block_q, next_pow2_min16(q.volume)), min(suited.block_k, next_pow2_min16(kv.volume))
    n_global = length_q - q.n_tokens, length_k - kv.n_tokens
    boxes: Boxes | None = None
    if key_mask is None and not (mask and any(mask.ordered)) and kv.volume == block_k:
        boxes = box_descriptors(key, value, kv, before[1])
    state = linear.state if linear else None
    bias = linear.bias.contiguous() if linear and linear.bias is not None else None
    by_pointer = static_of(
        query, plan, block_q, block_k, scale=scale, full=full, n_global=n_global, whole=kv.volume % block_k == 0,
        state=state_of(state), feature_map=linear.feature_map if linear else "relu", block_e=_state_columns(query),
    )  # fmt: skip
    groups = (
        rows_of(query), rows_of(key), rows_of(value), rows_of(out), lse, mask_of(key_mask), lists_of(plan),
        window_of(mask), *pooled_of(*(pooled or (None, None, None))),
        Added(state, linear.norm if linear else None, linear.eps if linear else None, bias),
    )  # fmt: skip
    tokens = tokens_of(length_q, before[0], q), tokens_of(length_k, before[1], kv)
    sizes = batch * heads, heads, heads // kv_heads, magnitude
    n_programs = (cdiv(n_global[0], block_q) + q.n_tiles * by_pointer.Q_PARTS) * batch * heads

    def launch(config: LaunchConfig) -> None:
        found = boxes if config.boxes else None
        block_sparse_fwd_kernel[(n_programs,)](
            *groups, *(found[:2] if found else (None, None)), *tokens, *sizes,
            S=by_pointer._replace(BOXES=found[2]) if found else by_pointer,
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


def _full_tiles(plan: BlockPlan, key_mask: Tensor | None) -> FullTiles:
    """Which tiles of a list need no mask."""
    if key_mask is not None:
        return "none"
    if plan.full_kv_counts is not None:
        return "counted"
    if plan.kv.is_whole:
        return "all"
    return "all but the last" if plan.kv.grid[:2] == (1, 1) else "none"


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
    check_contiguous(
        kv_indices=plan.kv_indices, full_kv_counts=plan.full_kv_counts, kv_counts=plan.kv_counts, tables=tables
    )
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
