"""Load attention that was learned elsewhere: folders of :func:`save_attention`, and what authors have published."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..common.attention_group import ReadLayout
from ..install.installation import denoisers, install_processors, overwrite_host_weight, restored_afterwards
from ..layout import TokenLayout
from ..mechanisms.processor import AcceleratedAttnProcessor
from .plan_checks import check_fit, check_host, check_installed, check_layout, check_writable
from .published import RELEASES, Plan, recognise
from .saved import saved_plans
from .tensors import Weight, WeightsFile, find_weights, read_weights, shorten

__all__ = ["LoadedAttention", "LoadedPart", "load_attention"]


@dataclass(frozen=True)
class LoadedPart:
    """What was loaded into one denoiser.

    Args:
        component: the denoiser's name in the pipeline.
        model: its class.
        processors: what was installed, by the name of the attention module.
        learned: names of the learned parameters that were loaded.
        overwritten: names of the host's parameters that were; ``reset_attn_processor`` puts their values back.
        remarks: where options came from that were not given.
    """

    component: str
    model: str
    processors: Mapping[str, AcceleratedAttnProcessor]
    learned: tuple[str, ...]
    overwritten: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for processor in self.processors.values():
            counts[str(processor)] = counts.get(str(processor), 0) + 1
        lines = [f"{self.component} ({self.model}): {text} on {n} layers" for text, n in counts.items()]
        lines.append(f"  {len(self.learned)} learned tensors loaded")
        if self.overwritten:
            lines[-1] += (
                f", {len(self.overwritten)} of the model's own overwritten; reset_attn_processor puts them back"
            )
        return "\n".join([*lines, *(f"  {remark}" for remark in self.remarks)])


@dataclass(frozen=True, repr=False)
class LoadedAttention:
    """What :func:`load_attention` has loaded; as text, a few lines to read.

    Args:
        path: the file.
        release: name of the release.
        parts: one per denoiser.
    """

    path: Path
    release: str
    parts: tuple[LoadedPart, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.path.name}: {self.release}", *map(str, self.parts)])

    __repr__ = __str__  # what a notebook shows of a call


def load_attention(
    pipe_or_model: Any,
    source: str | os.PathLike[str],
    *,
    component: str | None = None,
    layout: TokenLayout | ReadLayout | None = None,
    **options: Any,
) -> LoadedAttention:
    """Install what was learned elsewhere, and load its parameters strictly: all that it needs, and nothing else.

    It reads what :func:`save_attention` wrote; CLEAR's files for Flux.1-dev (arXiv 2412.16112); TurboDiffusion's for
    Wan (arXiv 2512.16093), plain and ``-quant``, and FastVideo's conversion of them; LinFusion's for Stable Diffusion
    (arXiv 2409.02097). Which one a file is, its keys tell. Weights of the model's own that a file holds as well
    overwrite the model's, in its dtype; :func:`reset_attn_processor` puts them back.

    Args:
        pipe_or_model: pipeline, or one denoiser.
        source: a file or folder, or a repository on the Hugging Face hub, or ``owner/repository/file`` there.
        component: which denoiser of a pipeline that has several a published file is for; for a bare model, which part
            of a file of :func:`save_attention` that has several.
        layout: the token layout by hand, as :func:`set_attn_processor` takes it, instead of the file's and the
            model's own. Needed for a model that dit_accel does not know if the file holds none: a ``TokenLayout`` is
            saved, a function cannot be.
        options: of published files, what they do not carry: any option of the processor. CLEAR's ``radius`` is read
            off a name such as clear_local_16_down_4, else it must be given. TurboDiffusion's are by default the
            authors': blocks of 128 queries and 64 keys, critical 0.1, linear over all keys, smooth keys. LinFusion's
            ``layers=[...]`` stands for a ``config.json`` beside the file.

    Returns: what was loaded where; print it.
    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: a file that is not whole or not known, for another model, of another mechanism than the one that is
            installed, or keys or shapes that do not fit the model (all missing and unexpected keys are named). The
            model is then as before.
    """
    path = find_weights(source)
    with _naming(path):
        return _load(pipe_or_model, path, component, layout, options)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the path in front of the message of a ValueError that lacks it."""
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def _load(
    pipe_or_model: Any,
    path: Path,
    component: str | None,
    layout: TokenLayout | ReadLayout | None,
    options: Mapping[str, Any],
) -> LoadedAttention:
    file = read_weights(path)
    bare = isinstance(pipe_or_model, nn.Module)
    models = denoisers(pipe_or_model)
    if "dit_accel" in file.metadata:
        release, plans = (
            "written by dit_accel.save_attention",
            saved_plans(models, bare, file, component, layout, options),
        )
    else:
        module = _release_of(file)
        name = _published_for(models, bare, module, component, path)
        release, plans = module.NAME, {name: module.plan(models[name], file, options)}
    if layout is not None:
        plans = {name: replace(plan, layouts=dict.fromkeys(plan.processors, layout)) for name, plan in plans.items()}
    for name, plan in plans.items():
        check_installed(models[name], plan, path)
        check_layout(models[name], plan, path)
        if any(".dit_accel." not in key for key in plan.weights):
            check_host(models[name], path)
        check_fit(models[name], plan, path)
        check_writable(models[name], plan, path)
    _apply({name: models[name] for name in plans}, plans)
    parts = (_part(name, models[name], plan) for name, plan in plans.items())
    return LoadedAttention(path, release, tuple(parts))


def _part(name: str, model: nn.Module, plan: Plan) -> LoadedPart:
    learned = tuple(key for key in plan.weights if ".dit_accel." in key)
    overwritten = tuple(key for key in plan.weights if ".dit_accel." not in key)
    return LoadedPart(name, type(model).__name__, dict(plan.processors), learned, overwritten, plan.remarks)


def _release_of(file: WeightsFile) -> ModuleType:
    release = recognise(file.weights.keys())
    if release is None:
        raise ValueError(
            f"{file.path} was not written by dit_accel.save_attention (no configuration in its metadata), and its keys "
            f"are of no release that is known here: {shorten(file.weights, 3)}. "
            f"Known: {'; '.join(known.NAME for known in RELEASES)}"
        )
    return release


def _published_for(
    models: dict[str, nn.Module], bare: bool, release: ModuleType, component: str | None, path: Path
) -> str:
    """The name of the denoiser that a published file goes into."""
    if component is not None and (bare or component not in models):
        there = "a model was given and no pipeline" if bare else f"this pipeline has {', '.join(models)}"
        raise ValueError(f"{path}: component={component!r} names a denoiser of a pipeline, but {there}")
    fitting = [name for name, model in models.items() if isinstance(model, release.MODELS)]
    asked = [name for name in fitting if component in (None, name)]
    if not asked:
        wanted = " or ".join(kind.__name__ for kind in release.MODELS)
        got = ", ".join(f"{name}: {type(model).__name__}" for name, model in models.items())
        raise ValueError(f"{path} is of {release.NAME} and needs a {wanted}, got {got}")
    if len(asked) > 1:
        raise ValueError(
            f"{path} is for one denoiser, and this pipeline has {', '.join(asked)}: say which one with component="
        )
    return asked[0]


def _apply(models: dict[str, nn.Module], plans: Mapping[str, Plan]) -> None:
    """Install and write everything; where that fails, all is as before."""
    with restored_afterwards(models.values(), on_success=False):
        for layout, chosen in _by_layout(plans):
            install_processors(models, chosen, layout)
        for name, plan in plans.items():
            _write(models[name], plan.weights)


def _by_layout(
    plans: Mapping[str, Plan],
) -> list[tuple[TokenLayout | ReadLayout | None, dict[str, dict[str, AcceleratedAttnProcessor]]]]:
    """Each layout with the processors that it is for; None stands for the models' own."""
    found: list[tuple[TokenLayout | ReadLayout | None, dict[str, dict[str, AcceleratedAttnProcessor]]]] = []
    for name, plan in plans.items():
        for layer, processor in plan.processors.items():
            layout = plan.layouts.get(layer)
            chosen = next((chosen for other, chosen in found if other == layout), None)
            if chosen is None:
                chosen = {}
                found.append((layout, chosen))
            chosen.setdefault(name, {})[layer] = processor
    return found


@torch.no_grad()
def _write(model: nn.Module, weights: Mapping[str, Weight]) -> None:
    for key, weight in weights.items():
        if ".dit_accel." in key:
            model.get_parameter(key).copy_(weight.read())
        else:
            overwrite_host_weight(model, key, weight.read())
