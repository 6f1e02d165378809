"""Sums of linear attention over all keys, over each key block, and over the marginal blocks of each query block.

With sums N = Σ φ(k)ᵀ v Wᵀ and z = Σ φ(k), the linear part is φ(q) N / (φ(q)·z + 1e-5). The functions return the means
N/c and z/c over some count c, which half precision can represent for any length, and eps = 1e-5/c, so that
``φ(q) @ state / (φ(q)·norm + eps)`` is the same number. [SLA, arXiv 2509.24006, eq. 5-7: H_j, Z_j; W = Proj]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..arguments import Tokens, mask_of, rows_of
from ..launch import (
    HOPPER_SHARED,
    Boxes,
    box_descriptors,
    cdiv,
    check_contiguous,
    exact_products,
    next_pow2_min16,
    register_limit,
    shared_memory,
)
from ..tiling import Tiling
from .arguments import Static
from .forward_kernel import block_state_fwd_kernel, finish_state_fwd_kernel, marginal_norm_fwd_kernel

__all__ = [
    "LinearState",
    "block_states",
    "linear_state",
    "marginal_linear_state",
    "marginal_states",
]

EPSILON = 1e-5  # added to the sums, not to the means
PROGRAMS = 264  # programs that sum over a whole sequence: two for each of the 132 multiprocessors of an H100 or H200
BOX_STAGES = 3  # tiles of keys and values in flight if they are loaded by tensor descriptor
SCRATCH_BYTES = 512 * 2**20  # limit of the scratch for block sums; heads are processed in chunks that fit it


class LinearState(NamedTuple):
    """State of ``φ(q) @ state / ((φ(q) * norm).sum(-1) + eps)``, W included, the bias of the projection excluded.

    The state is 0 if nothing was summed; eps is never 0, so the quotient is then 0. Shapes depend on the function that
    returns it.
    """

    state: Tensor
    norm: Tensor
    eps: Tensor


def linear_state(
    key: Tensor,
    value: Tensor,
    before: int,
    n_grid: int,
    feature_map: str,
    weight: Tensor | None,
    key_mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    norm_weights: Tensor | None = None,
) -> LinearState:
    """Means over all valid grid keys. The order of the tokens does not matter, so there is no tiling.

    Args:
        key, value: (B, H, S, D) float16/bfloat16/float32, any strides, D at most 256; without a weight the value may
            be float32 although the key is not.
        before, n_grid: the grid tokens are rows before to before + n_grid - 1.
        feature_map: φ: "softmax" (over the head dim), "elu" (elu + 1) or "relu", in float32.
        weight: (D, D), any floating dtype; it is applied to the finished mean, in float32. None = no projection.
        key_mask: (B, S) bool, True = attend; masked rows are never read. None = attend to all.
        dtype: of the state; None = float32.
        norm_weights: (B, H, S) float32 weight of each token in the norm; None = 1.
    Returns: state (B, H, D, D) in dtype, norm (B, H, D) and eps (B*H,) in float32: means over the number of valid grid
        keys of each batch element (eps = 1e-5 / count; without a valid key: 0, 0, and 1e-5).
    """
    parts, states, norms = _parts(key, n_grid)
    _launch_block_states(key, value, parts, before, feature_map, None, key_mask, states, norms, 0, norm_weights)
    weight = torch.eye(key.shape[-1], device=key.device) if weight is None else weight
    return _finish_state(states, norms, len(key), before, n_grid, parts.volume, weight, key_mask, dtype)


def _parts(key: Tensor, n_grid: int) -> tuple[Tiling, Tensor, Tensor]:
    """Intervals of tokens, one per program, and the scratch for their partial sums."""
    batch, heads, _, dim = key.shape
    n_parts = min(max(1, PROGRAMS // (batch * heads)), cdiv(n_grid, 256))
    part = cdiv(cdiv(n_grid, n_parts), 64) * 64
    parts = Tiling.of((n_grid,), (part,))
    states = torch.empty(batch * heads, parts.n_tiles, dim, dim, dtype=torch.float32, device=key.device)
    norms = torch.empty(batch * heads, parts.n_tiles, dim, dtype=torch.float32, device=key.device)
    return parts, states, norms


def _finish_state(
    states: Tensor,
    norms: Tensor,
    batch: int,
    before: int,
    n_grid: int,
    volume: int,
    weight: Tensor,
    key_mask: Tensor | None,
    dtype: torch.dtype | None,
) -> LinearState:
    """Add the partial sums (G, parts, D, D) and (G, parts, D), divide by the count and apply the projection."""
    check_contiguous(states=states, norms=norms)
    groups, n_parts, dim, _ = states.shape
    heads, device = groups // batch, states.device
    counts = (
        None if key_mask is None else key_mask[:, before : before + n_grid].sum(-1).expand(batch).int().contiguous()
    )
    state = torch.empty(batch, heads, dim, dim, dtype=dtype or torch.float32, device=device)
    norm = torch.empty(batch, heads, dim, dtype=torch.float32, device=device)
    eps = torch.empty(groups, dtype=torch.float32, device=device)
    rows, block_d = 16, next_pow2_min16(dim)
    finish_state_fwd_kernel[(groups, cdiv(dim, rows))](
        states, norms, weight.contiguous(), counts, state, norm, eps, heads, n_parts, n_grid, float(volume), EPSILON,
        D=dim, PRECISION="ieee" if state.dtype == torch.float32 else exact_products(), BLOCK_M=rows, BLOCK_D=block_d,
        BLOCK_E=min(block_d, 32), UNROLL=8, num_warps=4,
    )  # fmt: skip
    return LinearState(state, norm, eps)


def block_states(
    key: Tensor,
    value: Tensor,
    tiling: Tiling,
    before: int,
    feature_map: str,
    weight: Tensor | None,
    out_dtype: torch.dtype,
    key_mask: Tensor | None = None,
    norm_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums of φ(k)ᵀ v Wᵀ and φ(k) over the valid tokens of each tile, divided by the volume of a full tile.

    In half precision v Wᵀ is computed first, with float32 accumulation, like a Linear layer in that dtype: its rounding
    averages out over the tokens, and it costs no more than W after the sum. In float32, and for heads longer than 128,
    W comes after the sum.

    Args: as in :func:`linear_state`; tiling: tiles of the keys; grid token i is row ``before + i``.
    Returns: (B, H, Mk, D, D) in out_dtype and (B, H, Mk, D) float32.
    """
    batch, heads, _, dim = key.shape
    states = torch.empty(batch * heads, tiling.n_tiles, dim, dim, dtype=out_dtype, device=key.device)
    norms = torch.empty(batch * heads, tiling.n_tiles, dim, dtype=torch.float32, device=key.device)
    _launch_block_states(key, value, tiling, before, feature_map, weight, key_mask, states, norms, 0, norm_weights)
    return states.unflatten(0, (batch, heads)), norms.unflatten(0, (batch, heads))


def marginal_states(
    marginal: Tensor, states: Tensor, norms: Tensor, volume: int, n_marginal: float | None = None
) -> LinearState:
    """Sum of the block sums over the marginal blocks of each query block.

    Args:
        marginal: (B*H, Mq, Mk) 0/1 map in states.dtype.
        states, norms: from :func:`block_states`.
        volume: tokens of a full tile, the divisor in block_states.
        n_marginal: approximate number of marginal blocks per row, the divisor of every row. Any number gives the same
            quotient; one far too high costs float16 precision. None = Mk.
    Returns: state (B*H, Mq, D, D) in states.dtype, norm (B*H, Mq, D) float32, eps (B*H,) float32: means over
        ``count = volume * n_marginal`` tokens (eps = 1e-5 / count); 0 if a row has no marginal block.
    """
    states, norms = states.flatten(0, 1), norms.flatten(0, 1)
    n_marginal = states.shape[1] if n_marginal is None else n_marginal
    out = _empty_marginal(marginal, states.shape[-1], states.dtype, volume * n_marginal)
    _add_marginal(marginal, states, out.state, n_marginal)
    _launch_marginal_norms(marginal, norms, out.norm, n_marginal)
    return out


def marginal_linear_state(
    marginal: Tensor,
    key: Tensor,
    value: Tensor,
    tiling: Tiling,
    before: int,
    feature_map: str,
    weight: Tensor | None,
    key_mask: Tensor | None = None,
    n_marginal: int | None = None,
) -> LinearState:
    """:func:`block_states` and :func:`marginal_states` for a chunk of heads at a time, to bound the scratch memory.

    Args: as there; marginal: (B*H, Mq, Mk or more) 0/1 map, best in key.dtype; columns past Mk are 0.
    Returns: as :func:`marginal_states`, the state in key.dtype.
    """
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch, heads, _, dim = key.shape
    n_marginal = max(1, tiling.n_tiles if n_marginal is None else n_marginal)
    marginal = marginal.to(key.dtype)
    out = _empty_marginal(marginal, dim, key.dtype, tiling.volume * n_marginal)
    norms = torch.empty(batch * heads, tiling.n_tiles, dim, dtype=torch.float32, device=key.device)
    step = SCRATCH_BYTES // (tiling.n_tiles * dim * dim * key.element_size())
    step = min(max(1, step), batch * heads)
    # cuBLAS needs an inner length in multiples of 16 bytes: the rows of the map are padded to that with zeros
    n_padded = marginal.shape[2]
    scratch = torch.empty(step, n_padded, dim, dim, dtype=key.dtype, device=key.device)
    scratch[:, tiling.n_tiles :].zero_()
    weight = None if weight is None else weight.to(key.dtype).contiguous()
    for first in range(0, batch * heads, step):
        run = slice(first, min(first + step, batch * heads))
        states = scratch[: run.stop - first]
        _launch_block_states(key, value, tiling, before, feature_map, weight, key_mask, states, norms[run], first)
        _add_marginal(marginal[run], states, out.state[run], n_marginal)
    _launch_marginal_norms(marginal[..., : tiling.n_tiles], norms, out.norm, n_marginal)
    return out


def _empty_marginal(marginal: Tensor, dim: int, dtype: torch.dtype, count: float) -> LinearState:
    groups, n_q, _ = marginal.shape
    return LinearState(
        torch.empty(groups, n_q, dim, dim, dtype=dtype, device=marginal.device),
        torch.empty(groups, n_q, dim, dtype=torch.float32, device=marginal.device),
        torch.full((groups,), EPSILON / count, device=marginal.device),
    )


def _add_marginal(marginal: Tensor, states: Tensor, out: Tensor, n_marginal: float) -> None:
    """Compute out (G, Mq, D, D) = marginal (G, Mq, Mk) @ states (G, Mk, D, D) / n_marginal, divided before rounding."""
    out.flatten(2).baddbmm_(marginal, states.flatten(2), beta=0, alpha=1 / n_marginal)


def _launch_block_states(
    key: Tensor,
    value: Tensor,
    tiling: Tiling,
    before: int,
    feature_map: str,
    weight: Tensor | None,
    key_mask: Tensor | None,
    states: Tensor,
    norms: Tensor,
    first: int,
    norm_weights: Tensor | None = None,
) -> None:
    """Write states (G, M or more, D, D) and norms (G, M, D) of the G heads from ``first`` on; weight None = no
    projection."""
    check_contiguous(states=states, norms=norms, norm_weights=norm_weights)
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    heads, length, dim = key.shape[1:]
    half = value.element_size() == 2
    block_d = next_pow2_min16(dim)
    block_e = min(block_d, 128 if half else 64)  # columns of the state per program: more would spill registers
    block_n = min(next_pow2_min16(tiling.volume), 64 if half else 32)
    big = block_d * block_e >= 128 * 64
    fold = half and weight is not None and dim <= 128
    weight = None if weight is None else weight.to(key.dtype).contiguous()
    n_items = len(states) * tiling.n_tiles
    in_one = tiling.volume <= block_n
    boxes = _boxes(key, value, tiling, before) if fold and key_mask is None and tiling.volume == block_n else None
    static = Static(
        D=dim, BLOCK_D=block_d, BLOCK_E=block_e, BLOCK_N=block_n, BOX=tiling.box, PARTS=cdiv(tiling.volume, block_n),
        FEATURE_MAP=feature_map, BOXES=boxes[2] if boxes else "none",
        # float32 values of half-precision keys need the range of float32; TF32 is as precise as half precision
        PRECISION="ieee" if key.dtype == value.dtype else "tf32",
    )  # fmt: skip
    # programs loop over the tiles that fit one step, so that the next tile is loaded while one is summed
    n_programs = min(n_items, PROGRAMS // 2 if boxes else PROGRAMS) if in_one else n_items
    block_state_fwd_kernel[(n_programs, cdiv(dim, block_e))](
        rows_of(key), rows_of(value), weight if fold else None, mask_of(key_mask), norm_weights, states, norms,
        *(boxes[:2] if boxes else (None, None)), _rows(states, dim) if boxes else None, first, heads, tiling.n_tiles,
        n_items, states.shape[1], Tokens(length, before, *tiling.grid), 1 / tiling.volume, S=static,
        num_warps=8 if big and not (in_one and half and block_d <= 128) else 4,
        num_stages=BOX_STAGES if boxes else _stages(value, block_n, block_d, block_e, fold, 2 if in_one else 3),
        # two programs per multiprocessor: one waits, one works
        **register_limit(key, 128 if big and block_d <= 128 and not in_one else None),
    )  # fmt: skip
    if weight is not None and not fold:
        states.copy_(states.to(weight.dtype) @ weight.mT)


def _boxes(key: Tensor, value: Tensor, tiling: Tiling, before: int) -> Boxes | None:
    """Tensor descriptors of tiles, or None if tiles in flight, φ, v Wᵀ, W and a state exceed the shared memory."""
    dim, size = key.shape[3], key.element_size()
    needed = ((2 * BOX_STAGES + 2) * tiling.volume + 2 * dim) * dim * size
    return box_descriptors(key, value, tiling, before) if needed <= shared_memory(key) else None


def _rows(states: Tensor, dim: int) -> TensorDescriptor:
    """Tensor descriptor of (G, M, D, D) with blocks of one (D, D) matrix."""
    return TensorDescriptor(states, [states.shape[0] * states.shape[1] * dim, dim], [dim, 1], [dim, dim])


def _stages(value: Tensor, block_n: int, block_d: int, block_e: int, fold: bool, most: int) -> int:
    """Blocks of keys and values in flight: ``most``, or the number that leaves room for two programs per multiprocessor
    on Hopper and for one on other GPUs."""
    size = value.element_size()
    beside = (block_n + block_d) * block_e if fold else block_n * block_d  # v Wᵀ and W, else φ
    room = min(shared_memory(value), HOPPER_SHARED // 2) - beside * size
    return max(1, min(most if size == 2 and block_d <= 128 else 2, room // (block_n * (block_d + block_e) * size)))


def _launch_marginal_norms(marginal: Tensor, norms: Tensor, out: Tensor, n_marginal: float) -> None:
    """Compute out (G, Mq, D) = marginal (G, Mq, Mk) @ norms (G, Mk, D) / n_marginal."""
    check_contiguous(norms=norms, out=out)
    groups, n_q, n_k = marginal.shape
    dim = norms.shape[-1]
    block_m, block_e = 32, min(next_pow2_min16(dim), 64)
    marginal_norm_fwd_kernel[(groups * cdiv(n_q, block_m), cdiv(dim, block_e))](
        marginal, norms, out, marginal.stride(), n_q, n_k, 1 / n_marginal, D=dim, PRECISION=exact_products(),
        BLOCK_M=block_m, BLOCK_N=64, BLOCK_E=block_e, num_warps=4,
    )  # fmt: skip
