"""Linear attention over a selection of key blocks per query block, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FEATURE_MAPS", "block_linear_sums", "feature", "gather_blocks", "gather_rows"]

FEATURE_MAPS = ("softmax", "elu", "relu")


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows. x: (G, S, D), index: (1|G, n, m) → (G, n, m, D)."""
    groups, length, dim = x.shape
    flat = (index + torch.arange(groups, device=x.device).view(-1, 1, 1) * length).flatten()
    return x.reshape(-1, dim).index_select(0, flat).view(groups, *index.shape[1:], dim)


def gather_blocks(x: Tensor, table: Tensor) -> Tensor:
    """Gather the tokens of each block: (B, H, N, D) at (M, block) → (B, H, M, block, D); -1 entries give arbitrary
    rows."""
    return gather_rows(x.flatten(0, 1), table[None].clamp(min=0)).unflatten(0, x.shape[:2])


def feature(x: Tensor, feature_map: str) -> Tensor:
    """Feature map φ(x) over the last axis."""
    if feature_map == "softmax":
        return torch.softmax(x, -1)
    # not F.elu(x) + 1, which loses the digits of exp(x) for x far below 0
    return F.relu(x) + x.clamp(max=0).exp() if feature_map == "elu" else F.relu(x)


def block_linear_sums(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, q_table: Tensor, place: Tensor, k_table: Tensor, marginal: Tensor
) -> Tensor:
    """Linear attention φ(q) Σ φ(k)ᵀ v over the marginal blocks of each query block, (B, H, N, D + 1).

    The tables (M, block) list the tokens of each block; ``place`` gives the flat position of each query token in
    ``q_table``.
    """
    inside = (k_table >= 0).to(phi_k.dtype)[:, :, None]
    sums = (gather_blocks(phi_k, k_table) * inside).mT @ gather_blocks(v, k_table)  # (B, H, Mk, D, D + 1)
    picked = (marginal.unflatten(0, sums.shape[:2]) @ sums.flatten(3)).unflatten(
        -1, sums.shape[3:]
    )  # (B, H, Mq, D, D + 1)
    total = (gather_blocks(phi_q, q_table) @ picked).flatten(2, 3)  # (B, H, Mq * block, D + 1)
    return total.index_select(2, place)
