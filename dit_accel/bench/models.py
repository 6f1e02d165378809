"""Denoisers for the step benchmarks: real configurations with random weights, and the processors to set on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from ..mechanisms.clear import CLEARAttnProcessor
from ..mechanisms.processor import AcceleratedAttnProcessor
from ..mechanisms.sla import SLAAttnProcessor

__all__ = ["MODELS", "TRAINING", "StepModel", "select", "smoke"]

_WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2), "attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096,
    "freq_dim": 256, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
}  # fmt: skip
_WAN_1_3B = {**_WAN, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
_WAN_14B = {**_WAN, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
_FLUX = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
_SMOKE: dict[str, dict[str, Any]] = {
    "wan": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "ffn_dim": 32, "text_dim": 24,
            "freq_dim": 32, "rope_max_seq_len": 32},
    "flux": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1,
             "joint_attention_dim": 24, "pooled_projection_dim": 12, "axes_dims_rope": (4, 6, 6)},
}  # fmt: skip
_SLA = SLAAttnProcessor(critical=0.05, block_q=128, block_kv=64, linear_over="all", smooth_key=True)
_CLEAR_8, _CLEAR_16 = CLEARAttnProcessor(radius=8), CLEARAttnProcessor(radius=16)


@dataclass(frozen=True)
class StepModel:
    """A denoiser, its token grid, and a processor and speed-up goal per variant.

    Variants are compiled unless their name ends in "-eager".
    """

    name: str
    work: str
    family: str  # "wan" or "flux"
    config: Mapping[str, Any]
    grid: tuple[int, ...]
    ours: Mapping[str, tuple[AcceleratedAttnProcessor, float | None]]  # variant -> processor, goal
    default_variants: tuple[str, ...]
    text: int = 512

    @property
    def variants(self) -> tuple[str, ...]:
        return ("dense-eager", "dense", *self.ours, *(f"{name}-eager" for name in self.ours))

    def processor(self, variant: str) -> AcceleratedAttnProcessor | None:
        """Processor of a variant; None for the dense variants."""
        return self.ours.get(variant.removesuffix("-eager"), (None, None))[0]

    def goal(self, variant: str) -> float | None:
        """Speed-up goal over dense attention; None: no goal."""
        return self.ours.get(variant, (None, None))[1]

    def build(self, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Module:
        """Build the model with random weights, directly on the device and in the dtype, without a float32 copy."""
        from diffusers import FluxTransformer2DModel, WanTransformer3DModel

        kind = {"wan": WanTransformer3DModel, "flux": FluxTransformer2DModel}[self.family]
        before = torch.get_default_dtype()
        torch.manual_seed(seed)
        try:
            torch.set_default_dtype(dtype)
            with device:
                model = kind(**self.config)
        finally:
            torch.set_default_dtype(before)
        return model.eval().requires_grad_(False)  # no .to(dtype): rotary embeddings keep their precision

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        """Random arguments of the model's forward pass, batch 1."""
        generator = torch.Generator(device).manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=device, generator=generator)

        config = self.config
        if self.family == "wan":
            frames, height, width = self.grid
            return {
                "hidden_states": random(1, config["in_channels"], frames, 2 * height, 2 * width),
                "timestep": torch.full((1,), 500, device=device),
                "encoder_hidden_states": random(1, self.text, config["text_dim"]),
            }
        height, width = self.grid
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
        return {
            "hidden_states": random(1, height * width, config["in_channels"]),
            "encoder_hidden_states": random(1, self.text, config["joint_attention_dim"]),
            "pooled_projections": random(1, config["pooled_projection_dim"]),
            "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
            "img_ids": ids.to(device, dtype),  # as FluxPipeline passes them
            "txt_ids": torch.zeros(self.text, 3, device=device, dtype=dtype),
            "guidance": torch.full((1,), 3.5, device=device, dtype=dtype),
        }


def _wan(name: str, work: str, config: Mapping[str, Any], grid: tuple[int, ...], goal: float) -> StepModel:
    return StepModel(name, work, "wan", config, grid, {"sla": (_SLA, goal)}, ("dense", "sla"))


def _flux(side: int, **goals: float) -> StepModel:
    ours = {"clear-r8": (_CLEAR_8, goals.get("r8")), "clear-r16": (_CLEAR_16, goals.get("r16"))}
    variants = ("dense", *ours) if side < 8192 else ("dense-eager", "clear-r16")  # a dense step at 8192 takes 90 s
    return StepModel(f"flux-{side}", f"Flux.1-dev {side}²", "flux", _FLUX, (side // 16, side // 16), ours, variants)


def _named(models: Sequence[StepModel]) -> dict[str, StepModel]:
    return {model.name: model for model in models}


MODELS = _named([
    _wan("wan1.3b-480p", "Wan2.1-1.3B 480p, 81 frames", _WAN_1_3B, (21, 30, 52), 2.3),
    _wan("wan1.3b-720p", "Wan2.1-1.3B 720p, 81 frames", _WAN_1_3B, (21, 45, 80), 4.0),
    _wan("wan14b-720p", "Wan2.1-14B 720p, 81 frames", _WAN_14B, (21, 45, 80), 3.0),
    _flux(1024, r8=1.0, r16=1.0),
    _flux(2048, r8=1.65, r16=1.5),
    _flux(4096, r16=4.0),
    _flux(8192, r16=10.0),
])  # fmt: skip


def _training(name: str, frames: int, variants: tuple[str, ...]) -> StepModel:
    """Four blocks of Wan, enough to measure the training time per block; SLA with 10 % critical blocks."""
    config = {**_WAN_1_3B, "num_layers": 4}
    work = f"4 blocks of Wan2.1-1.3B 480p, {4 * frames - 3} frames"
    ours = {"sla": (replace(_SLA, critical=0.10), None)}
    return StepModel(name, work, "wan", config, (frames, 30, 52), ours, variants)


_EAGER = ("dense-eager", "sla-eager")
TRAINING = _named([
    _training("wan1.3b-480p-quarter", 5, _EAGER),
    _training("wan1.3b-480p-half", 11, _EAGER),
    _training("wan1.3b-480p", 21, ("dense-eager", "dense", "sla", "sla-eager")),
])  # fmt: skip


def select(names: tuple[str, ...], models: Mapping[str, StepModel] = MODELS) -> list[StepModel]:
    """Select models by name; without names, all.

    Raises: ValueError: an unknown name; the message suggests the nearest and lists all.
    """
    for name in names:
        if name not in models:
            close = get_close_matches(name, models, n=1, cutoff=0.3)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"unknown model {name!r}{hint} Available: {', '.join(models)}")
    return [models[name] for name in names] or list(models.values())


def smoke(model: StepModel) -> StepModel:
    """Tiny version of a model that runs on any machine, to test the code path; its timings mean nothing."""
    small: dict[str, Any] = {"in_channels": 4, **({"out_channels": 4} if model.family == "wan" else {})}
    grid = {2: (6, 8), 3: (3, 4, 5)}[len(model.grid)]
    config = {**model.config, **_SMOKE[model.family], **small}
    ours = {name: (processor, None) for name, (processor, _) in model.ours.items()}
    return replace(model, config=config, grid=grid, ours=ours, text=7)
