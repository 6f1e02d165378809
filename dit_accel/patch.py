"""What ``import dit_accel`` adds to diffusers: ``set_attn_processor`` on pipelines, and on models, for ours."""

from __future__ import annotations

import functools
from typing import Any

from .install import adopt, installation_of, set_attn_processor
from .intercept import Rerouted
from .processor import AcceleratedAttnProcessor

__all__ = ["patch_diffusers"]


def patch_diffusers() -> None:
    """Add the methods, once."""
    from diffusers import DiffusionPipeline
    from diffusers.models.attention import AttentionMixin

    if hasattr(DiffusionPipeline, "set_attn_processor"):
        return
    host = AttentionMixin.set_attn_processor

    @functools.wraps(host)
    def model_set_attn_processor(self: Any, processor: Any) -> None:
        if isinstance(processor, AcceleratedAttnProcessor):
            return set_attn_processor(self, processor)
        if isinstance(processor, dict):
            return _set_each(self, processor)
        return host(self, processor)

    def _set_each(model: Any, processors: dict[str, Any]) -> None:
        ours = {name: p for name, p in processors.items() if isinstance(p, AcceleratedAttnProcessor)}
        rest = {name: model.attn_processors[name] if name in ours else p for name, p in processors.items()}
        if installation_of(model) is not None and any(isinstance(p, Rerouted) for p in rest.values()):
            rest = adopt(model, rest)
        host(model, rest)  # a copy: diffusers empties the dict that it is given
        for name, processor in ours.items():
            set_attn_processor(model, processor, layers=[name.removesuffix(".processor")])

    def pipe_set_attn_processor(self: Any, processor: AcceleratedAttnProcessor) -> None:
        """Set an attention processor of dit_accel on the pipeline's denoisers: `dit_accel.set_attn_processor`."""
        set_attn_processor(self, processor)

    AttentionMixin.set_attn_processor = model_set_attn_processor
    DiffusionPipeline.set_attn_processor = pipe_set_attn_processor
