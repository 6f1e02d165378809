"""TurboDiffusion for Wan 2.1 and 2.2 (arXiv 2512.16093): complete denoisers trained with SLA, under Wan's own names.

In ``-quant`` files, each Linear of a block except ``proj_l`` is int8, with a float32 scale per 128×128 block.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from dit_accel.mechanisms.sla import SLAAttnProcessor

from ..tensors import Weight, WeightsFile
from ._plan import Plan, check_option_names, learned_key, parameter_names, rename_weights

NAME = "TurboDiffusion for Wan"
MODELS = (WanTransformer3DModel,)

_QUANTIZED_BLOCK = 128
# options of the authors' release; its files do not contain them
_DEFAULTS = {
    "critical": 0.1,
    "negligible": 0.0,
    "block_q": 128,
    "block_kv": 64,
    "linear_over": "all",
    "smooth_key": True,
}
_PROJECTION = re.compile(r"blocks\.(\d+)\.self_attn\.attn_op\.local_attn\.proj_l\.(weight|bias)")
# module in Wan's own code -> module in diffusers
_MODULES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
}
_BLOCK_MODULES = {
    **{
        f"{wan}.{a}": f"{diffusers}.{b}"
        for wan, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for a, b in {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}.items()
    },
    **{f"{a}.norm_{x}": f"{b}.norm_{x}" for a, b in (("self_attn", "attn1"), ("cross_attn", "attn2")) for x in "qk"},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",  # the norm before cross-attention, which diffusers counts second
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_PARAMETERS = {
    "head.modulation": "scale_shift_table",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
}


def recognises(keys: Collection[str]) -> bool:
    return any(_PROJECTION.fullmatch(key) for key in keys)


def plan(model: nn.Module, file: WeightsFile, options: Mapping[str, Any]) -> Plan:
    """Return the plan with all weights of the denoiser; options that are not passed are those of the release.

    Raises: ValueError: int8 weights without their scales, an option that SLA lacks.
    """
    dequantized = dequantize(file)
    weights = rename_weights(dequantized, diffusers_name)
    quantized = len(file.weights) - len(dequantized.weights)
    remarks = (f"{quantized} int8 weights dequantized",) if quantized else ()
    return wan_plan(model, file, weights, options, parameter_names(model), remarks)


def wan_plan(
    model: nn.Module,
    file: WeightsFile,
    weights: Mapping[str, Weight],
    options: Mapping[str, Any],
    required: frozenset[str],
    remarks: tuple[str, ...] = (),
) -> Plan:
    """Return the plan for SLA with the release's options in each block.

    The patch embedding, a matrix in the release, is reshaped to diffusers' 3-D convolution.

    Raises: ValueError: an option that SLA lacks.
    """
    check_option_names(SLAAttnProcessor, options, file.path)
    processor = SLAAttnProcessor(**{**_DEFAULTS, **options})
    weights = dict(weights)
    matrix, convolution = weights.get("patch_embedding.weight"), model.get_parameter("patch_embedding.weight")
    if matrix is not None and matrix.shape == (len(convolution), convolution[0].numel()):
        weights["patch_embedding.weight"] = matrix.reshape(convolution.shape)
    given = [name for name in _DEFAULTS if name in options]
    settings = [f"{name}={value}" for name, value in _DEFAULTS.items() if name not in given and name != "negligible"]
    defaults = (f"options of the release, since none were passed: {', '.join(settings)}",) if settings else ()
    layers = [name for name in dict(model.named_modules()) if re.fullmatch(r"blocks\.\d+\.attn1", name)]
    return Plan(dict.fromkeys(layers, processor), weights, required, (*remarks, *defaults))


def diffusers_name(key: str) -> str | None:
    """Return diffusers' name of a parameter of Wan's own code; None if there is none."""
    projection = _PROJECTION.fullmatch(key)
    if projection:
        return learned_key(f"blocks.{projection[1]}.attn1", projection[2])
    block = re.fullmatch(r"(blocks\.\d+)\.(.+)", key)
    if not block:
        return _PARAMETERS.get(key) or _rename_module(_MODULES, key)
    if block[2] == "modulation":
        return f"{block[1]}.scale_shift_table"
    inside = _rename_module(_BLOCK_MODULES, block[2])
    return inside and f"{block[1]}.{inside}"


def _rename_module(modules: Mapping[str, str], key: str) -> str | None:
    module, _, parameter = key.rpartition(".")
    return f"{modules[module]}.{parameter}" if module in modules else None


def dequantize(file: WeightsFile) -> WeightsFile:
    """Replace each ``int8_weight`` and its ``scale`` by a ``weight`` that is computed when it is read.

    Raises: ValueError: an int8 weight without scale, or scales that are not one per 128×128 block.
    """
    weights: dict[str, Weight] = {}
    modules = {key.removesuffix(".int8_weight") for key in file.weights if key.endswith(".int8_weight")}
    for key, weight in file.weights.items():
        module, _, name = key.rpartition(".")
        if name == "scale" and module in modules:
            continue
        if name != "int8_weight":
            weights[key] = weight
            continue
        scale = file.weights.get(f"{module}.scale")
        expected = tuple(-(-n // _QUANTIZED_BLOCK) for n in weight.shape)
        matches = scale is not None and scale.shape == expected and scale.dtype.is_floating_point
        if weight.dtype != torch.int8 or len(expected) != 2 or scale is None or not matches:
            raise ValueError(
                f"{file.path}: {key} is {weight.dtype} {weight.shape} with scale "
                f"{None if scale is None else scale.shape}; expected an int8 matrix and a floating-point "
                f"{module}.scale of shape {expected}"
            )
        if f"{module}.weight" in file.weights:
            raise ValueError(f"{file.path} has {module}.weight twice, as itself and as {key}")
        weights[f"{module}.weight"] = Weight(weight.shape, torch.float32, _Dequantize(weight, scale))
    return WeightsFile(file.path, weights, file.metadata, file.config)


class _Dequantize:
    """Product of an (N, K) int8 weight and its (⌈N/128⌉, ⌈K/128⌉) scales, float32."""

    def __init__(self, weight: Weight, scale: Weight) -> None:
        self.weight = weight
        self.scale = scale

    def __call__(self) -> Tensor:
        rows, columns = self.weight.shape
        scale = self.scale.read().float().repeat_interleave(_QUANTIZED_BLOCK, 0).repeat_interleave(_QUANTIZED_BLOCK, 1)
        return self.weight.read().float() * scale[:rows, :columns]
