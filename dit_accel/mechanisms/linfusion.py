"""LinFusion: linear attention over inputs changed by a learned projection (arXiv 2409.02097)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_accel.kernels.block_linear.reference import feature
from dit_accel.layout import TokenLayout

from ._common import check_layout_and_scale, check_positive_int, check_tensors, flat_layout, zero_masked
from .backend import resolve
from .processor import AcceleratedAttnProcessor
from .registry import register_processor

__all__ = ["LinFusionAttnProcessor", "input_projection", "linfusion_attention", "reference"]

EPSILON = 1e-4


@register_processor
@dataclass(frozen=True, kw_only=True)
class LinFusionAttnProcessor(AcceleratedAttnProcessor):
    """Linear attention for U-Nets. [LinFusion, arXiv 2409.02097]

    Query and key are projected from ``x + to_q_(x)`` and ``x + to_k_(x)``, with two learned modules per layer. Needs
    trained weights: :func:`dit_accel.load_attention` loads the authors'. See
    :func:`dit_accel.functional.linfusion_attention`.

    Args:
        projection_mid_dim: inner width of ``to_q_`` and ``to_k_``; None = the layer's width.
    """

    projection_mid_dim: int | None = None

    name: ClassVar[str] = "linfusion"
    label: ClassVar[str] = "LinFusion"
    summary: ClassVar[str] = "linear attention with learned inputs"
    paper: ClassVar[str] = "arXiv 2409.02097"
    any_host: ClassVar[bool] = False

    def check(self) -> None:
        if self.projection_mid_dim is not None:
            check_positive_int("projection_mid_dim", self.projection_mid_dim)

    def check_scale(self, scale: float | None) -> None:
        if scale is not None:
            raise ValueError(f"linear attention has no logits to scale, got scale={scale}: leave scale out")

    def count_logits(self, layout: TokenLayout) -> float:
        """Return 0: linear attention has no logits."""
        return 0.0

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        *,
        key_mask: Tensor | None = None,
        host_scale: float | None = None,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Compute plain matrix products, which need no operator of their own."""
        return _attend(
            query, key, value, self.grid_layout(layout), key_mask=key_mask, scale=host_scale, backend=self.backend
        )

    def input_projections(self, attn: nn.Module) -> dict[str, nn.Module]:
        width: Any = attn.query_dim
        return {name: input_projection(width, self.projection_mid_dim) for name in ("to_q", "to_k")}

    def check_host(self, attn: nn.Module, name: str) -> None:
        from diffusers.models.attention_processor import AttnProcessor2_0

        if not isinstance(attn.processor, AttnProcessor2_0) or attn.norm_q is not None or attn.norm_k is not None:
            raise ValueError(
                "LinFusion supports only the self-attention of U-Nets: expected diffusers' AttnProcessor2_0 without "
                f"query or key norms, got {type(attn.processor).__name__} on {name}. Use another mechanism for this "
                "model; for a U-Net, restore its default processors first (unfuse_qkv_projections(), "
                "set_default_attn_processor())"
            )


def linfusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout | None = None,
    *,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normalized linear attention, not causal. [LinFusion, arXiv 2409.02097]

    ``φ(q) (φ(k)ᵀ v / S) / (φ(q) · mean φ(k) + 1e-4)`` with φ = elu + 1. In LinFusion query and key are the host's
    projections of ``x + to_q_(x)`` and ``x + to_k_(x)`` (:func:`input_projection`); value is the one of x itself.

    Args:
        query, key, value: (B, H, S, D), any floating dtype, any strides; before φ.
        layout: position of the grid in the sequence, which must not contain global tokens; None = the whole sequence.
        key_mask: (B, S) bool, True = attend; masked keys do not count in S.
        backend: "torch" or None: plain matrix products on any device.
    Returns: (B, H, S, D) in query.dtype, summed in at least float32; a row without a visible key is 0.
    Raises: ValueError: global tokens, a layout that does not match, another backend, tensors that do not match each
        other.
    """
    return _attend(query, key, value, layout, key_mask=key_mask, backend=backend)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout | None,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return :func:`linfusion_attention`; a ``scale`` is refused."""
    if not torch.compiler.is_compiling():
        check_tensors(query, key, value, key_mask)
        check_layout_and_scale(layout, None, default=True)
        _check_sequence(flat_layout(layout, query), query, scale)
        resolve(backend, query.device, LinFusionAttnProcessor)
    acc = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        q, k = _feature(query.to(acc)), _feature(zero_masked(key, key_mask).to(acc))
        v, count = zero_masked(value, key_mask).to(acc), torch.full((), k.shape[2], dtype=acc, device=k.device)
        if key_mask is not None:
            k = zero_masked(k, key_mask)
            count = key_mask.sum(-1).clamp(min=1).to(acc)[:, None, None, None]
        k = k / count  # before the product, so that no sum over the keys grows with their number
        out = (q @ (k.mT @ v)) / (q @ k.sum(2)[..., None] + EPSILON)
    return out.to(query.dtype)


def _feature(x: Tensor) -> Tensor:
    return feature(x, "elu")


def _check_sequence(layout: TokenLayout, query: Tensor, scale: float | None) -> None:
    """Raises: ValueError: global tokens, another length, or a scale, which linear attention cannot use."""
    if layout.before or layout.after:
        raise ValueError(
            f"LinFusion does not support global tokens, got {layout.before + layout.after} in layout {layout}: "
            "use it in U-Nets, whose sequence is the grid alone"
        )
    if layout.seq_len != query.shape[2]:
        raise ValueError(
            f"layout {layout} has {layout.seq_len} tokens but query has {query.shape[2]}: "
            "pass the layout of this sequence"
        )
    if scale is not None:
        raise ValueError(f"linear attention has no logits that scale={scale} could be a factor on: leave scale out")


def input_projection(hidden_dim: int, mid_dim: int | None = None) -> nn.Sequential:
    """LinFusion's ``to_q_`` or ``to_k_``: Linear, LayerNorm, LeakyReLU, Linear; its output is added to its input.

    The last layer starts at 0, so that the sum starts as the input itself. The first layer has a fixed initialization,
    so that all processes of a distributed training start alike and torch's random state does not change.

    Args:
        hidden_dim: features in and out.
        mid_dim: features inside (the authors' projection_mid_dim); None = hidden_dim.
    """
    mid_dim = hidden_dim if mid_dim is None else mid_dim
    first, last = _unset_linear(hidden_dim, mid_dim), _unset_linear(mid_dim, hidden_dim)
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for parameter in first.parameters() if not first.weight.is_meta else ():
            drawn = torch.empty(parameter.shape, device="cpu").uniform_(-1, 1, generator=generator)
            parameter.copy_(drawn * hidden_dim**-0.5)
        for parameter in last.parameters():
            parameter.zero_()
    return nn.Sequential(first, nn.LayerNorm(mid_dim), nn.LeakyReLU(), last)


def _unset_linear(in_features: int, out_features: int) -> nn.Linear:
    """Linear with uninitialized parameters, on the default device."""
    return nn.Linear(in_features, out_features, device="meta").to_empty(device=torch.get_default_device())


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TokenLayout | None = None,
    *,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Return :func:`linfusion_attention` through the full (S, S) weights: slow; the specification."""
    acc = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(acc) for x in (query, zero_masked(key, key_mask), zero_masked(value, key_mask)))
    weights = _feature(q) @ _feature(k).mT
    count: Tensor | int = query.shape[2]
    if key_mask is not None:
        weights = weights * key_mask[:, None, None, :]
        count = key_mask.sum(-1).clamp(min=1)[:, None, None, None]
    total = weights.sum(-1, keepdim=True) / count
    return ((weights / count) @ v / (total + EPSILON)).to(query.dtype)
