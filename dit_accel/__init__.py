"""Sub-quadratic attention for Hugging Face diffusers pipelines: SLA, CLEAR, LLSA, GNA and LinFusion in one line."""

from . import functional
from .api import compare, convert, evaluate
from .install.describe import describe, logit_fraction
from .install.installation import attention, reset_attn_processor, set_attn_processor
from .install.patch import patch_diffusers
from .layout import TokenLayout
from .mechanisms.processor import (
    PROCESSORS,
    AcceleratedAttnProcessor,
    CLEARAttnProcessor,
    GNAAttnProcessor,
    LinFusionAttnProcessor,
    LLSAAttnProcessor,
    SLAAttnProcessor,
)
from .weights.load import LoadedAttention, LoadedPart, load_attention
from .weights.save import save_attention

__version__ = "0.1.0"

__all__ = [
    "PROCESSORS",
    "AcceleratedAttnProcessor",
    "CLEARAttnProcessor",
    "GNAAttnProcessor",
    "LLSAAttnProcessor",
    "LinFusionAttnProcessor",
    "LoadedAttention",
    "LoadedPart",
    "SLAAttnProcessor",
    "TokenLayout",
    "attention",
    "compare",
    "convert",
    "describe",
    "evaluate",
    "functional",
    "load_attention",
    "logit_fraction",
    "reset_attn_processor",
    "save_attention",
    "set_attn_processor",
]

patch_diffusers()
