"""Sub-quadratic attention for Hugging Face diffusers pipelines: SLA, CLEAR, LLSA, GNA and LinFusion in one line."""

try:
    from . import functional
except ModuleNotFoundError as error:  # of a module of the package, if git wrote its links as text files
    from pathlib import Path

    from .common.links import explain_import

    raise explain_import(error, Path(__file__).parent) from None
from .api import compare, convert, evaluate
from .common.version import __version__ as __version__
from .install.describe import describe, logit_fraction
from .install.installation import attention, reset_attn_processor, set_attn_processor
from .install.patch import patch_diffusers
from .layout import TokenLayout
from .mechanisms._inputs import AttentionInputs
from .mechanisms.clear import CLEARAttnProcessor
from .mechanisms.gna import GNAAttnProcessor
from .mechanisms.linfusion import LinFusionAttnProcessor
from .mechanisms.llsa import LLSAAttnProcessor
from .mechanisms.processor import AcceleratedAttnProcessor
from .mechanisms.registry import PROCESSORS, register_processor
from .mechanisms.sla import SLAAttnProcessor
from .weights.load import LoadedAttention, LoadedPart, load_attention
from .weights.save import save_attention

__all__ = [
    "PROCESSORS",
    "AcceleratedAttnProcessor",
    "AttentionInputs",
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
    "register_processor",
    "reset_attn_processor",
    "save_attention",
    "set_attn_processor",
]

patch_diffusers()
