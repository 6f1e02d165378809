"""Attention processors: the mechanism, its options, and the conditions under which a layer stays dense.

A processor is a frozen dataclass without weights or model. Installing it (see :mod:`dit_accel.install`) adds one
:class:`dit_accel.install.intercept.MechanismLayer` with the learned parameters to every attention module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..layout import TokenLayout
from . import clear, gna, linfusion, llsa, sla
from ._common import check_number
from .backend import check_backend

__all__ = [
    "PROCESSORS",
    "AcceleratedAttnProcessor",
    "CLEARAttnProcessor",
    "GNAAttnProcessor",
    "LLSAAttnProcessor",
    "LinFusionAttnProcessor",
    "SLAAttnProcessor",
]


def _to_hashable(value: Any) -> Any:
    """Convert a list to a tuple, so that the processor is hashable; return any other value unchanged."""
    return tuple(value) if isinstance(value, list) else value


def _per_axis(value: Any, axes: int) -> tuple[Any, ...]:
    """Return one value per axis; a single value, or a tuple of one, is repeated for all axes."""
    values = value if isinstance(value, tuple) else (value,)
    return values * axes if len(values) == 1 else values


@dataclass(frozen=True, kw_only=True)
class AcceleratedAttnProcessor:
    """Base class of the processors, with the options that all mechanisms share.

    Args:
        scale: factor on the logits; default the model's own, else ``D**-0.5``.
        dense_steps: number of denoising steps at the start of each generation that stay dense; ignored in training.
        min_tokens: layers with fewer grid tokens stay dense.
        reference: attention over reference images (Flux Kontext): ``"whole"``, dense between them and all tokens;
            ``"window"``, with the window of the image (they must have its size).
        backend: ``"torch"``, ``"triton"`` or ``"flex"``; None = the environment variable ``DIT_ACCEL_BACKEND``, else
            Triton on a GPU. Depends on the machine: :func:`dit_accel.save_attention` does not save it.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range.
    """

    scale: float | None = None
    dense_steps: int = 0
    min_tokens: int = 0
    reference: str = "whole"
    backend: str | None = None

    name: ClassVar[str]
    mechanism: ClassVar[ModuleType]
    paper: ClassVar[str]
    any_host: ClassVar[bool] = True  # supports every self-attention layer, and works without training
    SET_ON_MODEL: ClassVar[str] = (
        "expected a dit_accel processor to be installed on a model, got one set on a single attention module, which "
        "has no token layout: call model.set_attn_processor(processor) or pipe.set_attn_processor(processor), with "
        'layers=["transformer_blocks.0.attn"] for single layers'
    )
    _options: ClassVar[dict[str, Any]]  # set on the instance

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _to_hashable(getattr(self, field.name)))
        for name in ("dense_steps", "min_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if self.reference not in ("whole", "window"):
            raise ValueError(f"reference must be 'whole' or 'window', got {self.reference!r}")
        if self.scale is not None:
            if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)):
                raise TypeError(f"scale must be a number or None, got {self.scale!r}")
            if not 0 < check_number("scale", self.scale) < math.inf:
                raise ValueError(f"scale must be positive and finite, got {self.scale}")
        check_backend(self.backend)
        common = {field.name for field in fields(AcceleratedAttnProcessor)}
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in common}
        object.__setattr__(self, "_options", options)  # computed once: dynamo cannot trace dataclasses.fields
        self.mechanism.check_options(**options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises: TypeError: always. diffusers calls it if the processor was set on a single attention module."""
        raise TypeError(self.SET_ON_MODEL)

    def options(self) -> dict[str, Any]:
        """Return the keyword options of the mechanism's function."""
        return dict(self._options)

    def initial_parameters(self, head_dim: int) -> dict[str, Tensor]:
        """Return the initial learned parameters of one layer, by the function's keyword."""
        return {}

    def input_projections(self, attn: nn.Module) -> dict[str, nn.Module]:
        """Return learned residual modules for the inputs of the attention module's projections.

        A module's output is added to its input before the projection; keys are names of projections (``to_q``).
        """
        return {}

    def check_host(self, attn: nn.Module, name: str) -> None:
        """Check that the mechanism supports this attention module.

        Raises: ValueError: it does not.
        """

    def grid_layout(self, layout: TokenLayout) -> TokenLayout:
        """Return the layout for the mechanism; ``reference="window"`` adds the reference images to the grid."""
        if self.reference == "whole" or not layout.references:
            return layout
        if any(grid != layout.grid for grid in layout.references):
            raise ValueError(
                f'reference="window" expects reference images with the size of the image, a grid of {layout.grid}, '
                f'got {layout.references}: resize them or use reference="whole"'
            )
        images = 1 + len(layout.references)
        stacked = (images, *layout.grid)
        return TokenLayout(stacked, layout.before, layout.seq_len - layout.before - math.prod(stacked))

    def layer_options(self, layout: TokenLayout) -> dict[str, Any]:
        """Return the options for a layer with this layout, before ``mechanism.fit`` caps them to the grid."""
        options = self.options()
        if self.reference == "window" and layout.references:
            options.update(self._image_axis_options(len(layout.grid), 1 + len(layout.references)))
        return options

    def _image_axis_options(self, axes: int, images: int) -> dict[str, Any]:
        """Return the options that differ for a grid with a leading axis of images, along which attention is dense."""
        return {}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        *,
        key_mask: Tensor | None = None,
        host_scale: float | None = None,
        parameters: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Compute the mechanism for (B, H, S, D) of one layer; options larger than the grid are capped to it."""
        return self.mechanism._attend(
            query,
            key,
            value,
            self.grid_layout(layout),
            key_mask=key_mask,
            scale=host_scale if self.scale is None else self.scale,
            fit=True,
            backend=self.backend,
            **self.layer_options(layout),
            **(parameters or {}),
        )

    def __str__(self) -> str:
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}({', '.join(shown)})"


@dataclass(frozen=True, kw_only=True)
class SLAAttnProcessor(AcceleratedAttnProcessor):
    """Sparse-linear attention (SLA, arXiv 2509.24006): see :func:`dit_accel.functional.sla_attention`."""

    critical: float = 0.05
    negligible: float = 0.10
    block_q: int = 64
    block_kv: int = 64
    feature_map: str = "softmax"
    linear_over: str = "marginal"
    smooth_key: bool = False
    tile_order: bool = False

    name: ClassVar[str] = "sla"
    mechanism: ClassVar[ModuleType] = sla
    paper: ClassVar[str] = "arXiv 2509.24006"

    def initial_parameters(self, head_dim: int) -> dict[str, Tensor]:
        return {"weight": torch.zeros(head_dim, head_dim), "bias": torch.zeros(head_dim)}


@dataclass(frozen=True, kw_only=True)
class CLEARAttnProcessor(AcceleratedAttnProcessor):
    """Circular local windows (CLEAR, arXiv 2412.16112): see :func:`dit_accel.functional.clear_attention`.

    Args:
        train_tokens: sequence length that the model was trained with (Flux: 64² + 512). Sets the paper's
            high-resolution scale, ``sqrt(log(S, train_tokens) / D)``, with 10·S instead of S if ``down_factor > 1``.
    """

    radius: float | Sequence[float]
    down_factor: int = 1
    train_tokens: int | None = None

    name: ClassVar[str] = "clear"
    mechanism: ClassVar[ModuleType] = clear
    paper: ClassVar[str] = "arXiv 2412.16112"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_tokens is not None and self.scale is not None:
            raise ValueError("expected scale or train_tokens, got both: train_tokens sets the scale, leave one out")

    def initial_parameters(self, head_dim: int) -> dict[str, Tensor]:
        f = self.down_factor
        return {"pool_weight": torch.full((f, f), 1.0 / f**2)} if f > 1 else {}

    def _image_axis_options(self, axes: int, images: int) -> dict[str, Any]:
        return {"radius": (math.inf, *_per_axis(self.radius, axes))}


@dataclass(frozen=True, kw_only=True)
class LLSAAttnProcessor(AcceleratedAttnProcessor):
    """Log-linear sparse attention (LLSA, arXiv 2512.16615): see :func:`dit_accel.functional.llsa_attention`."""

    block_size: int = 16
    topk: int = 8
    levels: int | None = None
    enrich: bool = True

    name: ClassVar[str] = "llsa"
    mechanism: ClassVar[ModuleType] = llsa
    paper: ClassVar[str] = "arXiv 2512.16615"


@dataclass(frozen=True, kw_only=True)
class GNAAttnProcessor(AcceleratedAttnProcessor):
    """Generalized neighborhood attention (GNA, arXiv 2504.16922): see :func:`dit_accel.functional.gna_attention`."""

    window: int | Sequence[int]
    stride: int | Sequence[int] = 1
    dilation: int | Sequence[int] = 1
    is_causal: bool | Sequence[bool] = False

    name: ClassVar[str] = "gna"
    mechanism: ClassVar[ModuleType] = gna
    paper: ClassVar[str] = "arXiv 2504.16922"

    def _image_axis_options(self, axes: int, images: int) -> dict[str, Any]:
        leading = {"window": images, "stride": 1, "dilation": 1, "is_causal": False}
        return {name: (first, *_per_axis(getattr(self, name), axes)) for name, first in leading.items()}


@dataclass(frozen=True, kw_only=True)
class LinFusionAttnProcessor(AcceleratedAttnProcessor):
    """Linear attention for U-Nets (LinFusion, arXiv 2409.02097): see :func:`dit_accel.functional.linfusion_attention`.

    Query and key are projected from ``x + to_q_(x)`` and ``x + to_k_(x)``, with two learned modules per layer. Needs
    trained weights: :func:`dit_accel.load_attention` loads the authors'.

    Args:
        projection_mid_dim: inner width of ``to_q_`` and ``to_k_``; None = the layer's width.
    """

    projection_mid_dim: int | None = None

    name: ClassVar[str] = "linfusion"
    mechanism: ClassVar[ModuleType] = linfusion
    paper: ClassVar[str] = "arXiv 2409.02097"
    any_host: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale is not None:
            raise ValueError(f"linear attention has no logits to scale, got scale={self.scale}: leave scale out")

    def input_projections(self, attn: nn.Module) -> dict[str, nn.Module]:
        width: Any = attn.query_dim
        return {name: linfusion.input_projection(width, self.projection_mid_dim) for name in ("to_q", "to_k")}

    def check_host(self, attn: nn.Module, name: str) -> None:
        from diffusers.models.attention_processor import AttnProcessor2_0

        if not isinstance(attn.processor, AttnProcessor2_0) or attn.norm_q is not None or attn.norm_k is not None:
            raise ValueError(
                "LinFusion supports only the self-attention of U-Nets: expected diffusers' AttnProcessor2_0 without "
                f"query or key norms, got {type(attn.processor).__name__} on {name}. Use another mechanism for this "
                "model; for a U-Net, restore its default processors first (unfuse_qkv_projections(), "
                "set_default_attn_processor())"
            )


PROCESSORS: dict[str, type[AcceleratedAttnProcessor]] = {
    "sla": SLAAttnProcessor,
    "clear": CLEARAttnProcessor,
    "llsa": LLSAAttnProcessor,
    "gna": GNAAttnProcessor,
    "linfusion": LinFusionAttnProcessor,
}
