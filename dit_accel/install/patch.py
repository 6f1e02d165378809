"""Methods that ``import dit_accel`` adds to diffusers: set and reset attention processors of pipelines and models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..common.attention_group import ReadLayout
from ..layout import TokenLayout
from ..mechanisms.processor import AcceleratedAttnProcessor
from .installation import Layers, installation_of, reset_attn_processor, set_attn_processor, wrap_new_processors
from .intercept import InterceptedProcessor

__all__ = ["patch_diffusers"]


def patch_diffusers() -> None:
    """Add the methods, once."""
    from diffusers import DiffusionPipeline, ModularPipeline
    from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    if hasattr(DiffusionPipeline, "reset_attn_processor"):
        return
    for kind in (DiffusionPipeline, ModularPipeline):
        kind.set_attn_processor = _pipe_set_attn_processor
        kind.reset_attn_processor = _reset_attn_processor
    AttentionMixin.set_attn_processor = _accept_ours(AttentionMixin.set_attn_processor)
    AttentionMixin.reset_attn_processor = _reset_attn_processor
    for module in (Attention, AttentionModuleMixin):
        module.set_processor = _refuse_ours(module.set_processor)


def _pipe_set_attn_processor(
    self: Any,
    processor: AcceleratedAttnProcessor,
    layers: Layers | None = None,
    layout: TokenLayout | ReadLayout | None = None,
) -> None:
    """Set an attention processor of dit_accel on the pipeline's denoisers: `dit_accel.set_attn_processor`."""
    set_attn_processor(self, processor, layers=layers, layout=layout)


def _reset_attn_processor(self: Any) -> None:
    """Remove what dit_accel has installed, exactly: `dit_accel.reset_attn_processor`."""
    reset_attn_processor(self)


def _accept_ours(host: Callable[..., None]) -> Callable[..., None]:
    """The models' own method, which takes our processors and dicts that contain them, too."""

    @functools.wraps(host)
    def model_set_attn_processor(
        self: Any,
        processor: Any,
        layers: Layers | None = None,
        layout: TokenLayout | ReadLayout | None = None,
    ) -> None:
        if isinstance(processor, AcceleratedAttnProcessor):
            return set_attn_processor(self, processor, layers=layers, layout=layout)
        if layers is not None or layout is not None:
            raise TypeError(
                f"layers= and layout= go with a processor of dit_accel, got {type(processor).__name__}: pass such a "
                "processor, or leave layers= and layout= out"
            )
        return _set_each(host, self, processor) if isinstance(processor, dict) else host(self, processor)

    return model_set_attn_processor


def _set_each(host: Callable[..., None], model: Any, processors: dict[str, Any]) -> None:
    """Set processors by layer name; ours among them are installed."""
    ours = {name: p for name, p in processors.items() if isinstance(p, AcceleratedAttnProcessor)}
    rest = {name: model.attn_processors[name] if name in ours else p for name, p in processors.items()}
    if installation_of(model) is not None and any(isinstance(p, InterceptedProcessor) for p in rest.values()):
        rest = wrap_new_processors(model, rest)
    host(model, rest)  # a copy: diffusers empties the dict that it is given
    for name, processor in ours.items():
        set_attn_processor(model, processor, layers=[name.removesuffix(".processor")])


def _refuse_ours(host: Callable[..., None]) -> Callable[..., None]:
    """An attention module's own method, which does not know the model and so cannot install a processor of ours."""

    @functools.wraps(host)
    def set_processor(self: Any, processor: Any) -> None:
        if isinstance(processor, AcceleratedAttnProcessor):
            raise TypeError(processor.SET_ON_MODEL)
        host(self, processor)

    return set_processor
