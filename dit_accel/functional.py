"""The mechanisms as functions with the signature of ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from .mechanisms.clear import clear_attention
from .mechanisms.gna import gna_attention
from .mechanisms.linfusion import linfusion_attention
from .mechanisms.llsa import llsa_attention
from .mechanisms.sla import sla_attention

__all__ = ["clear_attention", "gna_attention", "linfusion_attention", "llsa_attention", "sla_attention"]
