"""Save what was learned in the installed attention layers, and load it into another copy of the model."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import replacing
from .install import denoisers, head_dim_of, installation_of, installed_layers, set_attn_processor
from .processor import PROCESSORS, AcceleratedAttnProcessor

__all__ = ["FILE_NAME", "load_attention", "save_attention"]

FILE_NAME = "dit_accel.safetensors"
_FORMAT = 1


def save_attention(pipe_or_model: Any, folder: str | os.PathLike[str]) -> Path:
    """Write ``dit_accel.safetensors``: learned parameters, with the configuration as JSON in the file's metadata.

    The file is written whole or not at all. Host weights that :func:`load_attention` had overwritten are included.

    Args:
        pipe_or_model: pipeline or denoiser with an installed mechanism.
        folder: made if it is not there.

    Returns: path of the file.
    Raises: ValueError: nothing is installed; OSError: the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    components: dict[str, Any] = {}
    for component, model in denoisers(pipe_or_model).items():
        layers = installed_layers(model)
        if not layers:
            continue
        groups: dict[AcceleratedAttnProcessor, list[str]] = {}
        for name, layer in layers.items():
            saved = replace(layer.mechanism, backend=None)  # a property of this machine, not of what was learned
            groups.setdefault(saved, []).append(name)
            for key, value in layer.named_parameters():
                tensors[f"{component}.{name}.dit_accel.{key}"] = value.detach().cpu().contiguous()
        installation = installation_of(model)
        for key in installation.overwritten if installation else ():
            tensors[f"{component}.{key}"] = model.get_parameter(key).detach().cpu().contiguous()
        components[component] = {
            "class": type(model).__name__,
            "attention": [{**_to_json(processor), "layers": names} for processor, names in groups.items()],
        }
    if not components:
        raise ValueError("nothing to save: call dit_accel.set_attn_processor(...) first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    configuration = json.dumps({"format": _FORMAT, "components": components})
    target = folder / FILE_NAME
    with replacing(target) as temporary:
        save_file(tensors, temporary, metadata={"dit_accel": configuration})
    return target


def _to_json(processor: AcceleratedAttnProcessor) -> dict[str, Any]:
    options = {name: value for name, value in asdict(processor).items() if name != "backend"}
    return {"mechanism": processor.name, "options": options}


def _from_json(entry: dict[str, Any], path: Path) -> AcceleratedAttnProcessor:
    name = entry.get("mechanism")
    if name not in PROCESSORS:
        raise ValueError(
            f"{path} holds the mechanism {name!r}, which is not known here; known: {', '.join(PROCESSORS)}"
        )
    return PROCESSORS[name](**entry["options"])


def load_attention(
    pipe_or_model: Any, folder_or_hub_id: str | os.PathLike[str], *, component: str | None = None
) -> None:
    """Install what :func:`save_attention` wrote, and load its parameters strictly.

    Args:
        pipe_or_model: pipeline, or one denoiser.
        folder_or_hub_id: folder or file, or a repository on the Hugging Face hub.
        component: which part of the file belongs to a bare model, where the file has several.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: not a file of dit_accel, truncated, of another mechanism than the one that is installed, or keys or
            shapes that do not fit the model (all missing and unexpected keys are named). The model is then as before.
    """
    path = _find(folder_or_hub_id)
    configuration, tensors = _read(path)
    models = _match(denoisers(pipe_or_model), isinstance(pipe_or_model, nn.Module), configuration, component, path)
    plans = []
    for name, model in models.items():
        entries = configuration["components"][name]["attention"]
        plan = [(_from_json(entry, path), list(entry["layers"])) for entry in entries]
        _check_installed(model, plan, path)
        prefix = f"{name}."
        mine = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        _check_keys(model, plan, mine, path)
        plans.append((model, plan, mine))
    for model, plan, mine in plans:
        for processor, layers in plan:
            set_attn_processor(model, processor, layers=layers)
        _copy(model, mine)


def _find(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    if path.is_dir():
        path = path / FILE_NAME
    if path.is_file():
        return path
    if path.exists() or path.is_absolute() or str(source).startswith(".") or str(source).count("/") != 1:
        raise FileNotFoundError(f"no attention file at {path}; expected a folder with {FILE_NAME}, or a hub id")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), FILE_NAME))
    except Exception as error:
        raise FileNotFoundError(
            f"{source} is no folder here, and {FILE_NAME} could not be had from the hub: {error}"
        ) from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    try:
        configuration = json.loads(metadata["dit_accel"])
        known = configuration["format"] == _FORMAT and isinstance(configuration["components"], dict)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} was not written by dit_accel.save_attention: no configuration in its metadata"
        ) from error
    if not known:
        raise ValueError(
            f"{path} has format {configuration['format']!r}; this version reads {_FORMAT}: update dit_accel"
        )
    return configuration, tensors


def _match(
    models: dict[str, nn.Module], bare: bool, configuration: dict[str, Any], component: str | None, path: Path
) -> dict[str, nn.Module]:
    """Models by their component name in the file."""
    there = list(configuration["components"])
    if component is not None and component not in there:
        raise ValueError(f"{path} has no component {component!r}; it has {', '.join(there)}")
    if bare:
        (name, model), *_ = models.items()
        name = component or (name if name in there else there[0] if len(there) == 1 else name)
        if name not in there:
            raise ValueError(f"{path} has components {', '.join(there)}: say which one is meant with component=")
        return {name: model}
    wanted = [component] if component is not None else there
    lacking = [name for name in wanted if name not in models]
    if lacking:
        raise ValueError(f"{path} is for {', '.join(lacking)}, which this pipeline lacks (it has {', '.join(models)})")
    return {name: models[name] for name in wanted}


def _check_installed(model: nn.Module, plan: list[tuple[AcceleratedAttnProcessor, list[str]]], path: Path) -> None:
    installed = installed_layers(model)
    for processor, layers in plan:
        other = next((n for n in layers if n in installed and installed[n].mechanism.name != processor.name), None)
        if other is not None:
            raise ValueError(
                f"{path} is for {processor.name}, but {installed[other].mechanism.name} is installed on {other}: "
                "call dit_accel.reset_attn_processor(...) first"
            )


def _check_keys(
    model: nn.Module, plan: list[tuple[AcceleratedAttnProcessor, list[str]]], tensors: dict[str, Tensor], path: Path
) -> None:
    """Every learned parameter is in the file with its shape, and nothing else but weights that the host has."""
    modules = dict(model.named_modules())
    absent = [name for _, layers in plan for name in layers if name not in modules]
    if absent:
        raise ValueError(f"{path} has layers that {type(model).__name__} lacks: {_some(absent)}")
    expected: dict[str, torch.Size] = {}
    for processor, layers in plan:
        for name in layers:
            initial = processor.initial_parameters(head_dim_of(modules[name], name))
            expected.update({f"{name}.dit_accel.{key}": value.shape for key, value in initial.items()})
    host = {key: value.shape for key, value in model.named_parameters() if ".dit_accel." not in key}
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected and key not in host]
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: missing {_some(missing)}; unexpected {_some(unexpected)}"
        )
    for key, value in tensors.items():
        shape = expected.get(key, host.get(key))
        if value.shape != shape:
            raise ValueError(
                f"{path}: {key} is {tuple(value.shape)}, the model needs {tuple(shape or ())} (another head size?)"
            )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "") if keys else "none"


@torch.no_grad()
def _copy(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    installation = installation_of(model)
    assert installation is not None
    for key, value in tensors.items():
        parameter = model.get_parameter(key)
        if ".dit_accel." not in key and key not in installation.overwritten:
            installation.overwritten[key] = parameter.detach().to("cpu", copy=True)
        parameter.copy_(value)
