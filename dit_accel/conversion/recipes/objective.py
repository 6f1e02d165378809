"""Training losses: the pretraining objective and distances to the teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_accel.install.installation import unwrap

from .capture import Conditions
from .matching import matching_loss
from .noise import NoiseProcess
from .recipe import Stage
from .transfer import recorded_calls

__all__ = ["Batch", "attention_outputs", "copy_teacher", "losses_of", "transfer_loss"]


@dataclass
class Batch:
    """A training batch; all tensors are on one device.

    Attributes:
        latents, noise: (B, …). levels: (B,) noise levels. later: (B,) lower levels on the same trajectories.
        conditions: the denoiser's other arguments for the whole batch.
        kind: equal for two batches that can replay the same CUDA graph; equal shapes are not enough, since their
            token grids may differ.
    """

    latents: Tensor
    noise: Tensor
    levels: Tensor
    later: Tensor
    conditions: Conditions
    kind: Hashable = None

    def tensors(self) -> list[Tensor]:
        return [self.latents, self.noise, self.levels, self.later, *self.conditions.tensors.values()]

    def clone(self) -> Batch:
        conditions = replace(self.conditions, tensors={k: x.clone() for k, x in self.conditions.tensors.items()})
        return Batch(
            self.latents.clone(), self.noise.clone(), self.levels.clone(), self.later.clone(), conditions,
            self.kind,
        )  # fmt: skip


def copy_teacher(model: nn.Module, trained: set[str]) -> nn.Module:
    """Frozen copy of the model in its current state; parameters that are not in ``trained`` are shared, not copied."""
    shared = {id(p): p for name, p in model.named_parameters() if name not in trained}
    teacher = copy.deepcopy(model, shared)
    return teacher.eval()


@contextmanager
def attention_outputs(model: nn.Module, layers: list[str]) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of the attention modules by name; of several outputs the first, which is the grid's."""
    found: dict[str, Tensor] = {}

    def note(name: str, output: Any) -> None:
        found.setdefault(name, output[0] if isinstance(output, tuple) else output)

    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: note(name, out))
        for name in layers
    ]  # fmt: skip
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def losses_of(
    stage: Stage, model: nn.Module, teacher: nn.Module | None, layers: list[str], process: NoiseProcess, batch: Batch
) -> dict[str, Tensor]:
    """Unweighted losses of a stage for one batch, by name, from a forward pass of the whole model.

    Args:
        model: the student. teacher: needed only if the stage distils.
        layers: names of the converted attention modules.
    """
    noisy, target = process.mix(batch.latents, batch.noise, batch.levels)
    arguments = batch.conditions.arguments(noisy, process.timestep(batch.levels))
    watched = layers if stage.attention else []
    with attention_outputs(unwrap(model), watched) as ours:
        prediction, variance = _split(model(**arguments)[0], target)
    losses = {"flow": F.mse_loss(prediction.float(), target.float())} if stage.flow else {}
    if stage.matching:
        assert teacher is not None
        losses["matching"] = matching_loss(
            unwrap(model), teacher, process, batch.conditions, noisy, prediction, batch.levels, batch.later
        )
    if not (stage.prediction or stage.variance or stage.attention):
        return losses
    assert teacher is not None
    with torch.no_grad(), attention_outputs(unwrap(teacher), watched) as theirs:
        wanted, wanted_variance = _split(teacher(**arguments)[0], target)
    if stage.prediction:
        losses["prediction"] = F.mse_loss(prediction.float(), wanted.float())
    if stage.variance and variance is not None and wanted_variance is not None:
        losses["variance"] = F.mse_loss(variance.float(), wanted_variance.float())
    if stage.attention:
        each = [F.mse_loss(ours[name].float(), theirs[name].float()) for name in layers]
        losses["attention"] = torch.stack(each).mean()
    return losses


def _split(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
    """Prediction and variance of a model output; None for the variance if the model predicts none.

    A model that predicts a variance has twice as many output channels [DiT, arXiv 2212.09748].
    """
    channels = target.shape[1]
    if output.shape[1] == 2 * channels and output.shape[2:] == target.shape[2:]:
        return output[:, :channels], output[:, channels:]
    return output, None


def transfer_loss(
    forced: Callable[..., Tensor], teacher: nn.Module, layers: list[str], process: NoiseProcess, batch: Batch
) -> Tensor:
    """Attention-transfer loss: distance of the student's attention outputs, given the teacher's inputs; () float32.

    Args: forced: a :class:`.transfer.TeacherForced`, possibly wrapped.
    """
    noisy, _ = process.mix(batch.latents, batch.noise, batch.levels)
    with torch.no_grad(), recorded_calls(teacher, layers) as calls:
        teacher(**batch.conditions.arguments(noisy, process.timestep(batch.levels)))
    loss: Tensor = forced(calls)
    return loss
