"""Base class of the attention processors: options of the user, and the mathematics of the mechanism.

A processor is a frozen dataclass without weights or model. Installing it (see :mod:`dit_accel.install`) adds one
:class:`dit_accel.install.intercept.MechanismLayer` with the learned parameters to every attention module. A mechanism
is one subclass in one file, made known by :func:`dit_accel.register_processor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..common.choices import Recipe
from ..layout import TokenLayout
from ._common import check_layout_and_scale, check_number, check_tensors, flat_layout
from ._controls import Control, option_controls
from ._inputs import AttentionInputs
from ._operator import check_no_tangents
from ._options import OperatorOption, operator_arguments, option_fields, to_hashable
from ._search import SearchSpace
from ._workloads import Workload
from .backend import check_backend

__all__ = ["AcceleratedAttnProcessor"]

Self = TypeVar("Self", bound="AcceleratedAttnProcessor")


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

    # A mechanism sets these:
    name: ClassVar[str]  # in --attn, in files, and of the function <name>_attention
    label: ClassVar[str]  # for people
    summary: ClassVar[str]  # a few words after the label
    paper: ClassVar[str] = ""
    backends: ClassVar[tuple[str, ...]] = ("torch",)  # the first one is named in messages
    backward_backends: ClassVar[tuple[str, ...]] = ()  # those with a backward pass of their own
    learned: ClassVar[Mapping[str, str]] = {}  # learned tensors, in the order of ``compute``, with their description
    recipe: ClassVar[Recipe] = "sla"  # default recipe of dit-accel convert
    any_host: ClassVar[bool] = True  # supports every self-attention layer, and works without training
    needs_layout: ClassVar[bool] = False  # without a layout there is no default
    workloads: ClassVar[tuple[Workload, ...]] = ()  # what dit-accel bench measures
    comparison_grid: ClassVar[tuple[int, ...]] = ()  # largest grid of a workload that torch computes in float32

    SET_ON_MODEL: ClassVar[str] = (
        "expected a dit_accel processor to be installed on a model, got one set on a single attention module, which "
        "has no token layout: call model.set_attn_processor(processor) or pipe.set_attn_processor(processor), with "
        'layers=["transformer_blocks.0.attn"] for single layers'
    )
    registered: ClassVar[Any] = None  # the class itself; set by register_processor, as the two below
    operator: ClassVar[Any] = None
    operator_options: ClassVar[tuple[OperatorOption, ...]] = ()
    _options: ClassVar[dict[str, Any]]  # set on the instance, because dynamo cannot trace dataclasses.fields
    _arguments: ClassVar[tuple[Any, ...]]

    def __post_init__(self) -> None:
        if self.registered is not type(self):  # a subclass would compute what its base class does
            raise TypeError(
                f"{type(self).__name__} is not registered: put @dit_accel.register_processor above its @dataclass"
            )
        for field in fields(self):
            object.__setattr__(self, field.name, to_hashable(getattr(self, field.name)))
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
        options = {field.name: getattr(self, field.name) for field in option_fields(type(self))}
        object.__setattr__(self, "_options", options)
        self.check()
        self.check_scale(self.scale)
        if self.operator_options:
            object.__setattr__(self, "_arguments", operator_arguments(self.name, self.operator_options, options))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises: TypeError: always. diffusers calls it if the processor was set on a single attention module."""
        raise TypeError(self.SET_ON_MODEL)

    # What a mechanism defines

    def check(self) -> None:
        """Raises: TypeError, ValueError: an option that is invalid for every layout."""

    def check_scale(self, scale: float | None) -> None:
        """Raises: ValueError: a factor on the logits that the options exclude."""

    def fit(self: Self, layout: TokenLayout) -> Self:
        """Return the processor with options capped to this layout."""
        return self

    def count_logits(self, layout: TokenLayout) -> float:
        """Return the logits per batch element and head, global tokens included; dense would be ``seq_len ** 2``."""
        raise NotImplementedError(f"{type(self).__name__} does not define count_logits")

    def compute(self, backend: str, inputs: AttentionInputs) -> Any:
        """Return the output (B, H, S, D), and for ``backward_backends`` also the log-sum-exp (B, H, S) float32.

        Runs inside a torch operator, with options that :meth:`fit` has capped to the layout if a model calls it.

        Args: backend: one of ``backends``. "torch" must be differentiable; without a backward pass of its own, another
            backend is differentiated through it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define compute")

    def backward(self, grad: Tensor, out: Tensor, lse: Tensor, inputs: AttentionInputs) -> Sequence[Tensor]:
        """Return the gradients of query, key, value and of the learned tensors that are given; for
        ``backward_backends``."""
        raise NotImplementedError(f"{type(self).__name__} does not define backward")

    def dense_reference(self, inputs: AttentionInputs) -> Tensor:
        """Return the output through the full (S, S) weights: slow; the specification, for tests and drawings."""
        raise NotImplementedError(f"{type(self).__name__} does not define dense_reference")

    def learned_shapes(self, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the learned tensors of one layer."""
        return {}

    def initial_parameters(self, head_dim: int) -> dict[str, Tensor]:
        """Return the initial learned parameters of one layer."""
        return {}

    def input_projections(self, attn: nn.Module) -> dict[str, nn.Module]:
        """Return learned residual modules for the inputs of the attention module's projections.

        A module's output is added to its input before the projection; keys are names of projections (``to_q``).
        """
        return {}

    def check_host(self, attn: nn.Module, name: str) -> None:
        """Raises: ValueError: the mechanism does not support this attention module."""

    def image_axis_options(self, axes: int, images: int) -> dict[str, Any]:
        """Return the options that differ for a grid with a leading axis of images, along which attention is dense."""
        return {}

    @classmethod
    def suggest(cls, grid: Sequence[int], share: float = 0.1) -> dict[str, Any]:
        """Return options that compute about ``share`` of the logits on a grid; all others have defaults."""
        return {}

    @classmethod
    def tiny_options(cls, options: Mapping[str, Any], grid: Sequence[int]) -> dict[str, Any]:
        """Return the options of a workload for a grid of a few tokens, to test that it runs."""
        return dict(options)

    @classmethod
    def search_space(cls, grid: Sequence[int]) -> SearchSpace | None:
        """Return the options that a search by layer varies on a grid; None = they cannot be searched."""
        return None

    @classmethod
    def controls(cls, grid: Sequence[int]) -> tuple[Control, ...]:
        """Return the sliders of the demo app for a grid."""
        return option_controls(cls)

    @classmethod
    def from_controls(cls, values: Mapping[str, Any], axes: int) -> dict[str, Any]:
        """Return the options for values of the sliders, on a grid with this number of axes."""
        return dict(values)

    def without_pooled_tokens(self: Self) -> Self:
        """Return the processor without pooled tokens, which stand for several keys."""
        return self

    def block_tables(self, layout: TokenLayout) -> tuple[Tensor, Tensor] | None:
        """Return the grid tokens of each query block and of each key block, (M, block), -1 in short blocks; None for a
        mechanism that selects no blocks."""
        return None

    def identity_parameters(self, head_dim: int) -> dict[str, Tensor] | None:
        """Return learned parameters that add a linear part as it is; None without a linear part."""
        return None

    # What all mechanisms share

    def options(self) -> dict[str, Any]:
        """Return the options of the mechanism, without those that all processors share."""
        return dict(self._options)

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
        """Return the options for a layer with this layout, before they are capped to the grid."""
        options = self.options()
        if self.reference == "window" and layout.references:
            options.update(self.image_axis_options(len(layout.grid), 1 + len(layout.references)))
        return options

    def for_layout(self: Self, layout: TokenLayout) -> Self:
        """Return the processor with the options that a layer with this layout uses, capped to its grid.

        Raises: ValueError: options that do not suit the layout.
        """
        return replace(self, **self.layer_options(layout)).fit(self.grid_layout(layout))

    def layer_logits(self, layout: TokenLayout) -> float:
        """Return the logits that a layer with this layout computes."""
        return float(self.for_layout(layout).count_logits(self.grid_layout(layout)))

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
        """Compute the mechanism for (B, H, S, D) of one layer; options larger than the grid are capped to it."""
        arguments = self._arguments
        if self.reference == "window" and layout.references:
            arguments = operator_arguments(self.name, self.operator_options, self.layer_options(layout))
        return self.call(
            query, key, value, self.grid_layout(layout), arguments, key_mask=key_mask,
            scale=host_scale if self.scale is None else self.scale, fit=True, backend=self.backend,
            learned=parameters or {},
        )  # fmt: skip

    @classmethod
    def call(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout | None,
        arguments: tuple[Any, ...],
        *,
        key_mask: Tensor | None,
        scale: float | None,
        fit: bool,
        backend: str | None,
        learned: Mapping[str, Tensor | None],
    ) -> Tensor:
        """Call the operator with options as its arguments, see :func:`._options.operator_arguments`."""
        if not torch.compiler.is_compiling():
            check_tensors(query, key, value, key_mask)
            check_layout_and_scale(layout, scale, default=not cls.needs_layout)
        tensors = [learned.get(name) for name in cls.learned]
        check_no_tangents(cls.name, query, key, value, *tensors)
        layout = flat_layout(layout, query)
        return cls.operator(
            query, key, value, key_mask, *tensors, list(layout.grid), layout.before, layout.after, *arguments, scale,
            fit, backend,
        )[0]  # fmt: skip

    def __str__(self) -> str:
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}({', '.join(shown)})"
