"""The mechanisms as functions with the arguments of ``torch.nn.functional.scaled_dot_product_attention``.

``<name>_attention`` exists for every mechanism that is registered, also for one registered outside the package.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .mechanisms.clear import clear_attention
from .mechanisms.gna import gna_attention
from .mechanisms.linfusion import linfusion_attention
from .mechanisms.llsa import llsa_attention
from .mechanisms.registry import attention_function, find_processor
from .mechanisms.sla import sla_attention

__all__ = ["clear_attention", "gna_attention", "linfusion_attention", "llsa_attention", "sla_attention"]


def __getattr__(name: str) -> Callable[..., Tensor]:
    kind = find_processor(name.removesuffix("_attention")) if name.endswith("_attention") else None
    if kind is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return attention_function(kind)
