"""Denoiser arguments for a prompt, captured from the pipeline's own call; no model family needs code of its own."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Conditions", "capture", "merge", "unconditional"]

_LATENTS = ("hidden_states", "sample")  # names that denoisers have for their latents
_UNBATCHED = ("img_ids", "txt_ids")


class _Captured(Exception):
    """Raised to end the pipeline's call at its first call of the denoiser."""


@dataclass
class Conditions:
    """Arguments of a denoiser for one prompt and size, without latents and timestep.

    Attributes:
        latents: name of the latents' argument.
        shape: shape of the latents for a batch of one.
        unit: the denoiser's timestep divided by the scheduler's.
        tensors: tensor arguments by name, "a/b" for entry b of the dict argument a.
        plain: all other arguments.
    """

    latents: str
    shape: tuple[int, ...]
    unit: float
    tensors: dict[str, Tensor]
    plain: dict[str, Any] = field(default_factory=dict)

    def arguments(self, latents: Tensor, timesteps: Tensor) -> dict[str, Any]:
        """Keyword arguments of a denoiser call. timesteps: (B,) in the scheduler's unit."""
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
    """Run the pipeline, without classifier-free guidance, up to its first call of the denoiser; return its arguments.

    Args: call: arguments of the pipeline's call, such as prompt, height and width.
    Raises: ValueError: the pipeline does not call this denoiser, or calls it with more than one sample per prompt.
    """
    found: dict[str, Any] = {}
    signature = inspect.signature(model.forward)

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update(signature.bind(*args, **kwargs).arguments)
        raise _Captured

    parameters = inspect.signature(pipe.__call__).parameters
    given = {**call, "num_inference_steps": 2, "output_type": "latent"}  # with 1 step, its timestep may be 0
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
        raise ValueError(f"{type(pipe).__name__}: expected one sample per prompt, got {latents.shape[0]}")
    first = float(pipe.scheduler.timesteps[0])
    if not first:
        raise ValueError(
            f"{type(pipe.scheduler).__name__} begins at timestep 0, so the denoiser's unit of time cannot be derived: "
            "use another scheduler"
        )
    unit = float(timestep.flatten()[0]) / first
    return Conditions(name, tuple(latents.shape), unit, *_split_arguments(found))


def _split_arguments(found: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensor arguments (on the CPU, flattened by "/") and plain arguments.

    Raises: ValueError: an argument of a type that cannot be cached.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, Tensor):
            tensors[key] = value.detach().cpu()
        elif isinstance(value, dict) and value and all(isinstance(x, Tensor) for x in value.values()):
            tensors |= {f"{key}/{inner}": x.detach().cpu() for inner, x in value.items()}
        elif value is None or isinstance(value, (bool, int, float, str)):
            plain[key] = value
        elif value:  # dropping it silently would change the denoiser's output
            raise ValueError(f"the denoiser's argument {key} is a {type(value).__name__}, which cannot be cached")
    plain["return_dict"] = False
    return tensors, {key: value for key, value in plain.items() if value is not None}


_TEXT = ("encoder_hidden_states", "pooled_projections", "added_cond_kwargs/text_embeds")


def unconditional(pipe: Any, model: nn.Module, call: dict[str, Any]) -> Conditions:
    """Conditions of the empty prompt as classifier-free guidance uses them: zeros for some pipelines, such as SDXL."""
    found = capture(pipe, model, {**call, "prompt": ""})
    if pipe.config.get("force_zeros_for_empty_prompt"):
        found.tensors |= {key: torch.zeros_like(x) for key, x in found.tensors.items() if key in _TEXT}
    return found


def merge(several: list[Conditions]) -> Conditions:
    """Concatenate conditions of the same shapes to one batch."""
    first = several[0]
    tensors = {
        key: value if key in _UNBATCHED or value.dim() == 0 else torch.cat([x.tensors[key] for x in several])
        for key, value in first.tensors.items()
    }
    return Conditions(first.latents, first.shape, first.unit, tensors, first.plain)
