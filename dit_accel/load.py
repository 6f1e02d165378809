"""Load attention that was learned elsewhere: folders of :func:`save_attention`, and what authors have published."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .install import (
    denoisers,
    install_processors,
    installation_of,
    installed_layers,
    new_layer,
    restored_afterwards,
    write_host_weight,
)
from .processor import PROCESSORS, AcceleratedAttnProcessor
from .published import RELEASES, Plan, recognise
from .save import DOWN, FORMAT, UP
from .weights import Weight, WeightsFile, find_weights, read_weights, shorten

__all__ = ["LoadedAttention", "LoadedPart", "check_fit", "load_attention"]


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
        release: whose it is.
        parts: one a denoiser.
    """

    path: Path
    release: str
    parts: tuple[LoadedPart, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.path.name}: {self.release}", *map(str, self.parts)])

    __repr__ = __str__  # what a notebook shows of a call


def load_attention(
    pipe_or_model: Any, source: str | os.PathLike[str], *, component: str | None = None, **options: Any
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
    file = read_weights(path)
    bare = isinstance(pipe_or_model, nn.Module)
    models = denoisers(pipe_or_model)
    if "dit_accel" in file.metadata:
        release, plans = "written by dit_accel.save_attention", _own_plans(models, bare, file, component, options)
    else:
        module = _release_of(file)
        name = _published_for(models, bare, module, component, path)
        _check_host(models[name], path)
        release, plans = module.NAME, {name: module.plan(models[name], file, options)}
    for name, plan in plans.items():
        _check_installed(models[name], plan, path)
        check_fit(models[name], plan, path)
        _check_writable(models[name], plan, path)
    _apply({name: models[name] for name in plans}, plans)
    parts = (_part(name, models[name], plan) for name, plan in plans.items())
    return LoadedAttention(path, release, tuple(parts))


def _part(name: str, model: nn.Module, plan: Plan) -> LoadedPart:
    learned = tuple(key for key in plan.weights if ".dit_accel." in key)
    overwritten = tuple(key for key in plan.weights if ".dit_accel." not in key)
    return LoadedPart(name, type(model).__name__, dict(plan.processors), learned, overwritten, plan.remarks)


def _own_plans(
    models: dict[str, nn.Module], bare: bool, file: WeightsFile, component: str | None, options: Mapping[str, Any]
) -> dict[str, Plan]:
    """By the models' names; those of the file may differ for a bare model."""
    configuration = _configuration(file)
    if options:
        raise ValueError(
            f"{file.path} carries its options, and takes none, got {', '.join(options)}: load it, or set another "
            "processor with set_attn_processor"
        )
    plans = {}
    for own, (name, entry) in _match(models, bare, configuration, component, file.path).items():
        processors = {layer: _from_json(group, file.path) for group in entry["attention"] for layer in group["layers"]}
        prefix = f"{name}."
        weights = {key.removeprefix(prefix): x for key, x in file.weights.items() if key.startswith(prefix)}
        plans[own] = Plan(processors, _merged(models[own], weights, file.path))
    return plans


def _merged(model: nn.Module, weights: dict[str, Weight], path: Path) -> dict[str, Weight]:
    """Replace the two factors of each LoRA by the weight that they make of the pretrained one, or of the file's own.

    Raises: ValueError: one factor without the other, factors that do not go together, or a projection that is fused or
        has an adapter around it.
    """
    factors = (f".{DOWN}", f".{UP}")
    names = dict.fromkeys(key.rpartition(".")[0] for key in weights if key.endswith(factors))
    if names:
        _check_host(model, path)
    rest = {key: x for key, x in weights.items() if not key.endswith(factors)}
    for name in names:
        down, up = weights.get(f"{name}.{DOWN}"), weights.get(f"{name}.{UP}")
        if down is None or up is None or not _is_low_rank(down, up):
            shapes = " and ".join("none" if factor is None else str(factor.shape) for factor in (down, up))
            raise ValueError(
                f"{path}: the LoRA of {name} has factors {shapes}; expected {DOWN} (r, in) and {UP} (out, r), both of "
                "a floating-point dtype"
            )
        key, shape = f"{name}.weight", (up.shape[0], down.shape[1])
        own = rest.get(key)
        if own is not None and (own.shape != shape or not own.dtype.is_floating_point):
            raise ValueError(f"{path}: {key} is {own.dtype} {own.shape}, and its LoRA makes a {shape}")
        rest[key] = Weight(shape, up.dtype, partial(_add_low_rank, model, key, own, down, up))
    return rest


def _is_low_rank(down: Weight, up: Weight) -> bool:
    fit = len(up.shape) == len(down.shape) == 2 and up.shape[1] == down.shape[0]
    return fit and up.dtype.is_floating_point and down.dtype.is_floating_point


def _add_low_rank(model: nn.Module, key: str, own: Weight | None, down: Weight, up: Weight) -> Tensor:
    """Return up @ down, added to the file's own weight if it has one; else to the pretrained one, whatever an earlier
    load has written over it. float32."""
    if own is not None:
        base = own.read()
    else:
        installation = installation_of(model)
        kept = installation.overwritten if installation is not None else {}
        base = kept[key] if key in kept else model.get_parameter(key).detach().cpu()
    return base.float() + up.read().float() @ down.read().float()


def _configuration(file: WeightsFile) -> dict[str, Any]:
    try:
        configuration = json.loads(file.metadata["dit_accel"])
        known = configuration["format"] == FORMAT and isinstance(configuration["components"], dict)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{file.path} has a configuration in its metadata that cannot be read: {error}") from error
    if not known:
        raise ValueError(
            f"{file.path} has format {configuration['format']!r}; this version reads {FORMAT}: update dit_accel"
        )
    return configuration


def _from_json(entry: dict[str, Any], path: Path) -> AcceleratedAttnProcessor:
    name = entry.get("mechanism")
    if name not in PROCESSORS:
        raise ValueError(
            f"{path} holds the mechanism {name!r}, which is not known here; known: {', '.join(PROCESSORS)}"
        )
    return PROCESSORS[name](**entry["options"])


def _match(
    models: dict[str, nn.Module], bare: bool, configuration: dict[str, Any], component: str | None, path: Path
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Component name and entry in the file, by the name of the model that they are for."""
    components = configuration["components"]
    there = list(components)
    if component is not None and component not in there:
        raise ValueError(f"{path} has no component {component!r}; it has {', '.join(there)}")
    if bare:
        own = next(iter(models))
        name = component or (own if own in there else there[0] if len(there) == 1 else own)
        if name not in there:
            raise ValueError(f"{path} has components {', '.join(there)}: say which one is meant with component=")
        return {own: (name, components[name])}
    wanted = [component] if component is not None else there
    lacking = [name for name in wanted if name not in models]
    if lacking:
        raise ValueError(f"{path} is for {', '.join(lacking)}, which this pipeline lacks (it has {', '.join(models)})")
    return {name: (name, components[name]) for name in wanted}


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


def _check_host(model: nn.Module, path: Path) -> None:
    """Raises: ValueError: projections that are not read where the file's would be written."""
    fused = next((name for name, module in model.named_modules() if _is_fused(module)), None)
    if fused is not None:
        raise ValueError(
            f"{path} has query, key and value projections, which {fused} has fused into one: call "
            "unfuse_qkv_projections() first"
        )
    adapter = next((name for name, _ in model.named_parameters() if ".base_layer." in name), None)
    if adapter is not None:
        raise ValueError(
            f"{path} has weights that an adapter is around ({adapter}): unload or fuse the LoRA first "
            "(pipe.unload_lora_weights()), and load it again afterwards"
        )


def _is_fused(module: nn.Module) -> bool:
    """A U-Net keeps the mark when it is unfused; what its plain processor reads are the single projections."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    plain = isinstance(getattr(module, "processor", None), AttnProcessor2_0)
    return getattr(module, "fused_projections", False) is True and not plain


def _check_installed(model: nn.Module, plan: Plan, path: Path) -> None:
    installed = installed_layers(model)
    for name, processor in plan.processors.items():
        if name in installed and installed[name].mechanism.name != processor.name:
            raise ValueError(
                f"{path} is for {processor.name}, but {installed[name].mechanism.name} is installed on {name}: "
                "call dit_accel.reset_attn_processor(...) first"
            )


def check_fit(model: nn.Module, plan: Plan, path: Path) -> None:
    """Every learned and every required parameter is there with its shape, and nothing else but what the host has.

    Raises: ValueError: layers that the model lacks, missing and unexpected weights, other shapes, whole numbers.
    """
    modules = dict(model.named_modules())
    absent = [name for name in plan.processors if name not in modules]
    if absent:
        raise ValueError(f"{path} has layers that {type(model).__name__} lacks: {shorten(absent)}")
    expected: dict[str, torch.Size] = {}
    with torch.device("meta"):  # for the shapes alone
        for name, processor in plan.processors.items():
            layer = new_layer(processor, modules[name], name)
            expected.update({f"{name}.dit_accel.{key}": value.shape for key, value in layer.named_parameters()})
    host = {key: value.shape for key, value in model.named_parameters() if ".dit_accel." not in key}
    missing = [key for key in (*expected, *sorted(plan.required)) if key not in plan.weights]
    unexpected = [key for key in plan.weights if key not in expected and key not in host]
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: missing {shorten(missing)}; unexpected {shorten(unexpected)}"
        )
    for key, weight in plan.weights.items():
        shape = tuple(expected[key] if key in expected else host[key])
        if weight.shape != shape:
            raise ValueError(
                f"{path}: {key} is {weight.shape}, the model needs {shape} (a model of another size, or another head "
                "size?)"
            )
        if not weight.dtype.is_floating_point:
            raise ValueError(f"{path}: {key} is {weight.dtype}; expected floating-point numbers")


def _check_writable(model: nn.Module, plan: Plan, path: Path) -> None:
    """Raises: ValueError: parameters that are not there to be written, or not as the numbers that they stand for."""
    for key in plan.weights:
        parameter = None if ".dit_accel." in key else model.get_parameter(key)
        if parameter is not None and (parameter.is_meta or not parameter.is_floating_point()):
            reason = "is offloaded, its weights are elsewhere" if parameter.is_meta else "is quantized"
            raise ValueError(
                f"{path} has {key}, which {reason}: load the attention first, and offload or quantize afterwards"
            )


def _apply(models: dict[str, nn.Module], plans: Mapping[str, Plan]) -> None:
    """Install and write everything; where that fails, all is as before."""
    with restored_afterwards(models.values(), on_success=False):
        install_processors(models, {name: plan.processors for name, plan in plans.items()})
        for name, plan in plans.items():
            _write(models[name], plan.weights)


@torch.no_grad()
def _write(model: nn.Module, weights: Mapping[str, Weight]) -> None:
    installation = installation_of(model)
    assert installation is not None
    for key, weight in weights.items():
        parameter = model.get_parameter(key)
        if ".dit_accel." in key:
            parameter.copy_(weight.read())
            continue
        if key not in installation.overwritten:
            installation.overwritten[key] = parameter.detach().to("cpu", copy=True)
        write_host_weight(model, key, weight.read())
