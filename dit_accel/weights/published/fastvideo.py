"""FastVideo's conversion of TurboDiffusion's Wan: weights under FastVideo's or diffusers' names, ``proj_l`` under
``attn_impl``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from diffusers import WanTransformer3DModel
from torch import nn

from ..tensors import WeightsFile
from ._plan import Plan, learned_key, parameter_names, rename_weights
from .turbodiffusion import wan_plan

NAME = "FastVideo's conversion of TurboDiffusion for Wan"
MODELS = (WanTransformer3DModel,)

_PROJECTION = re.compile(r"(blocks\.\d+\.attn1)\.attn_impl\.proj_l\.(weight|bias)")
# FastVideo's name -> diffusers' name; other parameters have the same name in both
_NAMES = (
    (r"(blocks\.\d+)\.(to_[qkv]|norm_[qk])\.", r"\1.attn1.\2."),
    (r"(blocks\.\d+)\.to_out\.", r"\1.attn1.to_out.0."),
    (r"(blocks\.\d+\.attn2\.to_out)\.(?!0\.)", r"\1.0."),
    (r"(blocks\.\d+)\.self_attn_residual_norm\.norm\.", r"\1.norm2."),
    (r"(blocks\.\d+\.ffn|condition_embedder\.image_embedder\.ff)\.fc_in\.", r"\1.net.0.proj."),
    (r"(blocks\.\d+\.ffn|condition_embedder\.image_embedder\.ff)\.fc_out\.", r"\1.net.2."),
    (r"patch_embedding\.proj\.", r"patch_embedding."),
    (r"condition_embedder\.(text_embedder|time_embedder\.mlp)\.fc_in\.", r"condition_embedder.\1.linear_1."),
    (r"condition_embedder\.(text_embedder|time_embedder\.mlp)\.fc_out\.", r"condition_embedder.\1.linear_2."),
    (r"condition_embedder\.time_embedder\.mlp\.", r"condition_embedder.time_embedder."),
    (r"condition_embedder\.time_modulation\.linear\.", r"condition_embedder.time_proj."),
)


def recognises(keys: Collection[str]) -> bool:
    return any(_PROJECTION.fullmatch(key) for key in keys)


def plan(model: nn.Module, file: WeightsFile, options: Mapping[str, Any]) -> Plan:
    """Return the plan of TurboDiffusion; a file with only ``proj_l`` does not change the denoiser's own weights.

    Raises: ValueError: an option that SLA lacks.
    """
    weights = rename_weights(file, diffusers_name)
    only_learned = all(".dit_accel." in name for name in weights)
    remarks = ("no other weights in the file: the pipeline must already have TurboDiffusion's",) if only_learned else ()
    return wan_plan(model, file, weights, options, frozenset() if only_learned else parameter_names(model), remarks)


def diffusers_name(key: str) -> str | None:
    """Return diffusers' name of a FastVideo parameter; the same name if both agree."""
    projection = _PROJECTION.fullmatch(key)
    if projection:
        return learned_key(projection[1], projection[2])
    for pattern, name in _NAMES:
        key = re.sub(f"^{pattern}", name, key)
    return key
