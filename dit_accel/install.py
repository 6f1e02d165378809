"""Install a mechanism into diffusers models, and take it off again bit for bit."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .families import family_of, sites_of, supported_models
from .hooks import ReadStep, SiteHook, StepClock, forward_parameters
from .intercept import LayoutCell, MechanismLayer, Rerouted, reroute
from .layout import TokenLayout
from .processor import AcceleratedAttnProcessor
from .site import ReadLayout, Site, is_self_attention, self_attention_layers

__all__ = ["Installation", "attention", "denoisers", "installation_of", "reset_attn_processor", "set_attn_processor"]

Layers = Iterable[str] | str | re.Pattern[str] | Callable[[str], bool]

# components that hold a pipeline's denoiser, for models whose class is not known and whose layout is given by hand
_DENOISER_NAMES = ("transformer", "transformer_2", "unet", "unet_2", "prior", "decoder")
_ATTRIBUTE = "_dit_accel"


@dataclass
class Installation:
    """What stands on one denoiser: enough to take it off again. Kept on the model as a plain object."""

    steps: ReadStep
    originals: dict[str, Any] = field(default_factory=dict)  # layer name -> the host's own processor object
    hooks: dict[tuple[str, tuple[str, ...]], SiteHook] = field(default_factory=dict)  # by a site's owner and layers
    handles: list[Any] = field(default_factory=list)
    overwritten: dict[str, Tensor] = field(default_factory=dict)  # host weights before a load, on the CPU
    attention_layers: int = 0  # self-attention layers of the model, installed or not


def unwrap(model: nn.Module) -> nn.Module:
    """The diffusers model inside ``torch.compile``'s and the distributed wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def installation_of(model: nn.Module) -> Installation | None:
    """What dit_accel has installed on this model, or None."""
    return unwrap(model).__dict__.get(_ATTRIBUTE)


def denoisers(pipe_or_model: Any) -> dict[str, nn.Module]:
    """Denoisers by component name; a bare model is named as its pipeline would name it.

    Raises:
        TypeError: neither a pipeline nor a model.
        ValueError: a pipeline without a denoiser.
    """
    if isinstance(pipe_or_model, nn.Module):
        model = unwrap(pipe_or_model)
        return {"unet" if "UNet" in type(model).__name__ else "transformer": model}
    components = getattr(pipe_or_model, "components", None)
    if not isinstance(components, Mapping):
        raise TypeError(f"expected a diffusers pipeline or model, got {type(pipe_or_model).__name__}")
    modules = {name: unwrap(part) for name, part in components.items() if isinstance(part, nn.Module)}
    known = {name: part for name, part in modules.items() if family_of(part) is not None}
    named = {name: part for name, part in modules.items() if name in _DENOISER_NAMES}
    if not (known or named):
        raise ValueError(
            f"{type(pipe_or_model).__name__} has no denoiser with attention among its components "
            f"({', '.join(f'{name}: {type(part).__name__}' for name, part in modules.items()) or 'none'}); "
            f"known denoisers: {', '.join(supported_models())}"
        )
    return known or named


def set_attn_processor(
    pipe_or_model: Any,
    processor: AcceleratedAttnProcessor,
    layers: Layers | None = None,
    layout: TokenLayout | ReadLayout | None = None,
) -> None:
    """Replace softmax self-attention by a mechanism, on all layers or on some.

    Layers that hold another mechanism get the new one; layers that are not named keep what they have. Cross-attention
    and the extra calls of IP-Adapters are never replaced. ``pipe.set_attn_processor(processor)`` and
    ``pipe.transformer.set_attn_processor(processor)`` do the same for all layers.

    Args:
        pipe_or_model: any diffusers pipeline, or its denoiser.
        processor: one of ``SLAAttnProcessor``, ``CLEARAttnProcessor``, ``LLSAAttnProcessor``, ``GNAAttnProcessor``,
            ``LinFusionAttnProcessor``.
        layers: names of attention modules (``"transformer_blocks.0.attn"``, with or without the component in front),
            a regular expression searched in the name with the component, or a predicate of that name; default all.
        layout: the token layout, for models that dit_accel does not know: a ``TokenLayout``, or a function
            ``(model, arguments) -> TokenLayout`` of the forward arguments by name.

    Raises:
        TypeError: not a pipeline, model or processor.
        ValueError: unknown model, no attention, no layer of that name.
    """
    if not isinstance(processor, AcceleratedAttnProcessor):
        raise TypeError(
            f"expected an attention processor of dit_accel such as SLAAttnProcessor(), got {type(processor).__name__}"
        )
    models = denoisers(pipe_or_model)
    plans = {name: _plan(model, layout) for name, model in models.items()}
    chosen = _choose(_names(plans), layers)
    _install(models, plans, {name: dict.fromkeys(found, processor) for name, found in chosen.items() if found})


def set_by_layer(
    pipe_or_model: Any, choices: Iterable[tuple[Layers | None, AcceleratedAttnProcessor]]
) -> dict[str, dict[str, AcceleratedAttnProcessor]]:
    """As :func:`set_attn_processor` for each of these layers and processors, the later over the earlier; all or none.

    Returns: processors by the name of the attention module, by component.
    """
    models = denoisers(pipe_or_model)
    chosen = processors_by_layer(models, choices)
    _install(models, {name: _plan(models[name], None) for name in chosen}, chosen)
    return chosen


def processors_by_layer(
    models: Mapping[str, nn.Module], choices: Iterable[tuple[Layers | None, AcceleratedAttnProcessor]]
) -> dict[str, dict[str, AcceleratedAttnProcessor]]:
    """What :func:`set_by_layer` sets; nothing is changed.

    Raises: ValueError: layers that are not there.
    """
    names = _names({name: _plan(model, None) for name, model in models.items()})
    chosen: dict[str, dict[str, AcceleratedAttnProcessor]] = {}
    for layers, processor in choices:
        for name, found in _choose(names, layers).items():
            if found:
                chosen.setdefault(name, {}).update(dict.fromkeys(found, processor))
    return chosen


def _names(plans: Mapping[str, list[Site]]) -> dict[str, list[str]]:
    return {name: [layer for site in plan for layer in site.layers] for name, plan in plans.items()}


def install_processors(
    models: Mapping[str, nn.Module], chosen: Mapping[str, Mapping[str, AcceleratedAttnProcessor]]
) -> None:
    """Install a processor on each named layer of each denoiser: on all, or on none if one of them cannot take it.

    Args:
        models: denoisers by component name.
        chosen: for each of them, processors by the name of the attention module.

    Raises: ValueError: as :func:`set_attn_processor`.
    """
    plans = {name: _plan(models[name], None) for name in chosen}
    for name, processors in chosen.items():
        _choose({name: [layer for site in plans[name] for layer in site.layers]}, list(processors))
    _install(models, plans, chosen)


def _install(
    models: Mapping[str, nn.Module],
    plans: Mapping[str, list[Site]],
    chosen: Mapping[str, Mapping[str, AcceleratedAttnProcessor]],
) -> None:
    made = {name: _make_layers(models[name], plans[name], layers) for name, layers in chosen.items()}
    clock = next((i.steps.clock for m in models.values() if (i := installation_of(m)) is not None), StepClock())
    for name, new in made.items():
        _apply(models[name], plans[name], new, clock)


def _plan(model: nn.Module, layout: TokenLayout | ReadLayout | None) -> list[Site]:
    """The sites of a model; those that are installed already keep their identity."""
    if layout is None:
        sites = sites_of(model)
    else:
        read = (lambda _model, _arguments: layout) if isinstance(layout, TokenLayout) else layout
        sites = [Site("", read, tuple(self_attention_layers(model)))]
    if not any(site.layers for site in sites):
        raise ValueError(f"{type(model).__name__} has no self-attention layers that dit_accel could replace")
    return sites


def _choose(names: dict[str, list[str]], layers: Layers | None) -> dict[str, list[str]]:
    """Layer names by component that ``layers`` selects."""
    full = {f"{component}.{name}": (component, name) for component, found in names.items() for name in found}
    if layers is None:
        return names
    if isinstance(layers, (str, re.Pattern)):
        wanted = [name for name in full if re.search(layers, name)]
        missing = [] if wanted else [str(layers)]
    elif callable(layers):
        wanted = [name for name in full if layers(name)]
        missing = [] if wanted else ["(predicate)"]
    else:
        given = list(layers)
        wanted = [name for name, (_, short) in full.items() if name in given or short in given]
        missing = [name for name in given if name not in full and all(name != short for _, short in full.values())]
    if missing:
        near = difflib.get_close_matches(missing[0], [*full, *(short for _, short in full.values())], n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; there are: {', '.join(list(full)[:4])} …"
        raise ValueError(f"layers= selects no self-attention layer: {', '.join(missing)}{hint}")
    return {component: [full[name][1] for name in wanted if full[name][0] == component] for component in names}


def head_dim_of(attn: nn.Module, name: str) -> int:
    """Size of an attention head."""
    size = getattr(attn, "head_dim", None)
    if isinstance(size, int):
        return size
    inner, heads = getattr(attn, "inner_dim", None), getattr(attn, "heads", None)
    if not (isinstance(inner, int) and isinstance(heads, int)):
        raise ValueError(f"cannot tell the head size of {name} ({type(attn).__name__}): no head_dim, inner_dim, heads")
    return inner // heads


def new_layer(processor: AcceleratedAttnProcessor, attn: nn.Module, name: str) -> MechanismLayer:
    """The mechanism of an attention module, with its learned parameters as they are before any training."""
    initial = processor.initial_parameters(head_dim_of(attn, name))
    return MechanismLayer(processor, LayoutCell(), initial, processor.input_projections(attn))


def _make_layers(
    model: nn.Module, sites: list[Site], chosen: Mapping[str, AcceleratedAttnProcessor]
) -> dict[str, tuple[Site, MechanismLayer, Any]]:
    """A new layer and a rerouted processor for each chosen attention module; the model is not touched yet."""
    made = {}
    for site in sites:
        for name in site.layers:
            if name not in chosen:
                continue
            attn = model.get_submodule(name)
            if not is_self_attention(attn):
                raise ValueError(f"{name} is not a self-attention module with a processor")
            like = next((p for p in attn.parameters() if p.is_floating_point()), None)
            device = torch.device("cpu") if like is None or like.is_meta else like.device
            dtype = torch.float32 if like is None else like.dtype
            processor = chosen[name]
            processor.check_host(attn, name)
            host = attn.processor
            rerouted = host if isinstance(host, Rerouted) else reroute(host)
            made[name] = (site, new_layer(processor, attn, name).to(device, dtype), rerouted)
    return made


def _apply(
    model: nn.Module, sites: list[Site], new: dict[str, tuple[Site, MechanismLayer, Any]], clock: StepClock
) -> None:
    installation = installation_of(model)
    if installation is None:
        installation = Installation(ReadStep(clock, forward_parameters(model)))
        setattr(model, _ATTRIBUTE, installation)
        installation.handles.append(_pre_hook(model, installation.steps))
    installation.attention_layers = sum(len(site.layers) for site in sites)
    for name, (site, layer, processor) in new.items():
        attn = model.get_submodule(name)
        layer.cell = _cell(model, installation, site)
        layer.train(attn.training)
        if not isinstance(attn.processor, Rerouted):
            installation.originals[name] = attn.processor
            attn.processor = processor
        attn.dit_accel = layer
    installation.steps.counts = any(layer.mechanism.dense_steps for layer in installed_layers(model).values())


def _pre_hook(module: nn.Module, hook: Any) -> Any:
    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _cell(model: nn.Module, installation: Installation, site: Site) -> LayoutCell:
    """The layout cell of a site, with the hooks that fill and empty it."""
    key = (site.owner, tuple(site.layers))
    hook = installation.hooks.get(key)
    if hook is None:
        owner = model.get_submodule(site.owner)
        hook = installation.hooks[key] = SiteHook(LayoutCell(), site.read, forward_parameters(owner))
        installation.handles.append(_pre_hook(owner, hook))
        installation.handles.append(owner.register_forward_hook(hook.leave, always_call=True))
    hook.read = site.read  # a layout given by hand may have changed
    return hook.cell


def reset_attn_processor(pipe_or_model: Any) -> None:
    """Take everything off again: the same processor objects, state_dict and outputs as before the first install.

    Weights that :func:`dit_accel.load_attention` overwrote are put back. Nothing happens where nothing is installed.

    Raises: TypeError: neither a pipeline nor a model.
    """
    for model in denoisers(pipe_or_model).values():
        _reset(model)


def _reset(model: nn.Module) -> None:
    installation = installation_of(model)
    if installation is None:
        return
    _restore(model, {})
    for handle in installation.handles:
        handle.remove()
    with torch.no_grad():
        for name, value in installation.overwritten.items():
            model.get_parameter(name).copy_(value)
    delattr(model, _ATTRIBUTE)


def _restore(model: nn.Module, snapshot: Mapping[str, MechanismLayer]) -> None:
    """Bring the layers of a model back to an earlier state: these mechanism layers, and dense everywhere else."""
    installation = installation_of(model)
    assert installation is not None
    for name, original in list(installation.originals.items()):
        attn = model.get_submodule(name)
        if name in snapshot:
            attn.dit_accel = snapshot[name]
            continue
        if isinstance(attn.processor, Rerouted):  # else the user has set another one since
            attn.processor = original
        del attn.dit_accel
        del installation.originals[name]


def keep_layers(model: nn.Module, names: Iterable[str]) -> None:
    """Take the mechanism off all layers but these; the others have the host's own attention again."""
    kept = set(names)
    _restore(model, {name: layer for name, layer in installed_layers(model).items() if name in kept})


def put_back(model: nn.Module, layers: Mapping[str, MechanismLayer], loaded: Mapping[str, Tensor]) -> None:
    """Undo what was begun: these mechanism layers alone, and of the host's own weights these as an earlier load wrote
    them and all others as they were before any."""
    installation = installation_of(model)
    if installation is None:
        return
    if not layers:
        _reset(model)
        return
    _restore(model, layers)
    with torch.no_grad():
        for name, value in loaded.items():
            model.get_parameter(name).copy_(value)
        for name in [name for name in installation.overwritten if name not in loaded]:
            model.get_parameter(name).copy_(installation.overwritten.pop(name))


@contextlib.contextmanager
def attention(pipe_or_model: Any, processor: AcceleratedAttnProcessor, **options: Any) -> Iterator[Any]:
    """``with dit_accel.attention(pipe, processor): ...`` sets, and leaves things as they were before.

    Args are those of :func:`set_attn_processor`; what was installed before is there again afterwards, with its weights.
    """
    models = denoisers(pipe_or_model)
    before = {name: installed_layers(model) for name, model in models.items()}
    set_attn_processor(pipe_or_model, processor, **options)
    try:
        yield pipe_or_model
    finally:
        for name, model in models.items():
            if before[name]:
                _restore(model, before[name])
            else:
                _reset(model)


def installed_layers(model: nn.Module) -> dict[str, MechanismLayer]:
    """The installed layers of a denoiser by the name of their attention module."""
    installation = installation_of(model)
    if installation is None:
        return {}
    found = {name: getattr(unwrap(model).get_submodule(name), "dit_accel", None) for name in installation.originals}
    return {name: layer for name, layer in found.items() if isinstance(layer, MechanismLayer)}


def adopt(model: nn.Module, processors: Mapping[str, Any]) -> dict[str, Any]:
    """Processors that host tooling (an IP-Adapter's loader) made for all layers, rerouted where we are installed."""
    installation = installation_of(model)
    adopted = dict(processors)
    for name in installation.originals if installation is not None else ():
        key = f"{name}.processor"
        if key in adopted and not isinstance(adopted[key], Rerouted):
            assert installation is not None
            installation.originals[name] = adopted[key]
            adopted[key] = reroute(adopted[key])
    return adopted
