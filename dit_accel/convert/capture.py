"""What a pipeline hands its denoiser for a prompt: read off its own call, so that no family needs code of its own."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Conditions", "capture", "merge", "unconditional"]

_LATENTS = ("hidden_states", "sample")  # how denoisers call what they denoise
_UNBATCHED = ("img_ids", "txt_ids")


class _Captured(Exception):
    """Ends the pipeline's call once the denoiser was called."""


@dataclass
class Conditions:
    """Arguments of a denoiser for one prompt and size, without its latents and timestep.

    latents: the name of the latents' argument. shape: theirs, with a batch of one. unit: the denoiser's timestep over
    the scheduler's. tensors: by argument, "a/b" for entry b of a dict argument. plain: the other arguments.
    """

    latents: str
    shape: tuple[int, ...]
    unit: float
    tensors: dict[str, Tensor]
    plain: dict[str, Any] = field(default_factory=dict)

    def arguments(self, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
        """Of a call of the denoiser. timesteps: (B,) in the scheduler's unit."""
        given: dict[str, Any] = {**self.plain, self.latents: latents, "timestep": timesteps * self.unit}
        for key, value in self.tensors.items():
            outer, _, inner = key.partition("/")
            if inner:
                given[outer] = {**given.get(outer, {}), inner: value}
            else:
                given[outer] = value
        return given


@torch.no_grad()
def capture(pipe: Any, model: nn.Module, call: dict[str, Any]) -> Conditions:
    """Call the pipeline up to its denoiser's first call, without classifier-free guidance.

    Args: call: arguments of the pipeline: prompt, height, width and so on.
    Raises: ValueError: the pipeline does not call this denoiser, or with more than one sample for a prompt.
    """
    found: dict[str, Any] = {}
    signature = inspect.signature(model.forward)

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update(signature.bind(*args, **kwargs).arguments)
        raise _Captured

    parameters = inspect.signature(pipe.__call__).parameters
    given = {**call, "num_inference_steps": 2, "output_type": "latent"}  # the only one of 1 may be timestep 0
    if "guidance_scale" in parameters and not getattr(model.config, "guidance_embeds", False):
        given["guidance_scale"] = 1.0
    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        pipe(**{key: value for key, value in given.items() if key in parameters})
    except _Captured:
        pass
    finally:
        handle.remove()
    name = next((x for x in _LATENTS if x in found), None)
    if name is None or "timestep" not in found:
        raise ValueError(f"{type(pipe).__name__} did not call {type(model).__name__} with latents and a timestep")
    latents, timestep = found.pop(name), found.pop("timestep")
    if latents.shape[0] != 1:
        raise ValueError(f"{type(pipe).__name__} denoises {latents.shape[0]} samples for one prompt; one is expected")
    first = float(pipe.scheduler.timesteps[0])
    if not first:
        raise ValueError(f"{type(pipe.scheduler).__name__} begins at timestep 0: the denoiser's unit cannot be told")
    unit = float(timestep.flatten()[0]) / first
    return Conditions(name, tuple(latents.shape), unit, *_part(found))


def _part(found: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, Tensor):
            tensors[key] = value.detach().cpu()
        elif isinstance(value, dict) and value and all(isinstance(x, Tensor) for x in value.values()):
            tensors |= {f"{key}/{inner}": x.detach().cpu() for inner, x in value.items()}
        elif value is None or isinstance(value, (bool, int, float, str)):
            plain[key] = value
        elif value:  # what cannot be kept must not be dropped in silence
            raise ValueError(f"the denoiser's argument {key} is a {type(value).__name__}, which cannot be cached")
    plain["return_dict"] = False
    return tensors, {key: value for key, value in plain.items() if value is not None}


_TEXT = ("encoder_hidden_states", "pooled_projections", "added_cond_kwargs/text_embeds")


def unconditional(pipe: Any, model: nn.Module, call: dict[str, Any]) -> Conditions:
    """Of the empty prompt, as guidance has them: of some pipelines (SDXL's) zeros."""
    found = capture(pipe, model, {**call, "prompt": ""})
    if pipe.config.get("force_zeros_for_empty_prompt"):
        found.tensors |= {key: torch.zeros_like(x) for key, x in found.tensors.items() if key in _TEXT}
    return found


def merge(several: list[Conditions]) -> Conditions:
    """One batch of conditions of the same shapes."""
    first = several[0]
    tensors = {
        key: value if key in _UNBATCHED or value.dim() == 0 else torch.cat([x.tensors[key] for x in several])
        for key, value in first.tensors.items()
    }
    return Conditions(first.latents, first.shape, first.unit, tensors, first.plain)
