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

from ..common.attention_group import AttentionGroup, GivenLayout, ReadLayout, is_self_attention, self_attention_layers
from ..layout import TokenLayout
from ..mechanisms.processor import AcceleratedAttnProcessor
from .families import attention_groups_of, family_of, supported_models
from .hooks import LayoutHook, StepClock, StepHook, forward_parameters
from .host_weights import check_reachable, record_replaced, sample, stop_recording, warn_of_changes, write_host_weight
from .intercept import InterceptedProcessor, LayoutSlot, MechanismLayer, host_of, intercept_processor

__all__ = ["Installation", "attention", "denoisers", "installation_of", "reset_attn_processor", "set_attn_processor"]

Layers = Iterable[str] | str | re.Pattern[str] | Callable[[str], bool]

# components that hold a pipeline's denoiser, for models whose class is not known and whose layout is given by hand
_DENOISER_NAMES = ("transformer", "transformer_2", "unet", "unet_2", "prior", "decoder")
_ATTRIBUTE = "_dit_accel"


@dataclass
class Installation:
    """State of one installed denoiser: enough to remove the installation. Kept on the model as a plain object."""

    steps: StepHook
    handle: Any  # of the steps' hook
    originals: dict[str, Any] = field(default_factory=dict)  # layer name -> the host's own processor object
    hooks: list[LayoutHook] = field(default_factory=list)  # one per layout slot that an installed layer uses
    overwritten: dict[str, Tensor] = field(default_factory=dict)  # host weights before a load, on the CPU
    written: dict[str, Tensor] = field(default_factory=dict)  # samples of what a load has written over them
    attention_layers: int = 0  # self-attention layers of the model, installed or not


@dataclass(eq=False)
class _Scope:
    """State of one denoiser when a ``with`` block begins, and the host weights that the block has replaced."""

    clock: StepClock | None
    layers: dict[str, MechanismLayer]
    overwritten: dict[str, Tensor]
    written: dict[str, Tensor]
    attention_layers: int
    replaced: dict[str, Tensor]  # host weights as they were when the block began


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


def _names(plans: Mapping[str, list[AttentionGroup]]) -> dict[str, list[str]]:
    return {name: [layer for group in plan for layer in group.layers] for name, plan in plans.items()}


def install_processors(
    models: Mapping[str, nn.Module],
    chosen: Mapping[str, Mapping[str, AcceleratedAttnProcessor]],
    layout: TokenLayout | ReadLayout | None = None,
) -> None:
    """Install a processor on each named layer of each denoiser: on all, or on none if one of them cannot take it.

    Args:
        models: denoisers by component name.
        chosen: for each of them, processors by the name of the attention module.
        layout: as :func:`set_attn_processor`.

    Raises: ValueError: as :func:`set_attn_processor`.
    """
    plans = {name: _plan(models[name], layout) for name in chosen}
    for name, processors in chosen.items():
        _choose({name: [layer for group in plans[name] for layer in group.layers]}, list(processors))
    _install(models, plans, chosen)


def _install(
    models: Mapping[str, nn.Module],
    plans: Mapping[str, list[AttentionGroup]],
    chosen: Mapping[str, Mapping[str, AcceleratedAttnProcessor]],
) -> None:
    made = {name: _make_layers(models[name], plans[name], layers) for name, layers in chosen.items()}
    clock = next((i.steps.clock for m in models.values() if (i := installation_of(m)) is not None), StepClock())
    for name, new in made.items():
        _set_layers(models[name], {**installed_layers(models[name]), **new}, clock)
        installation = installation_of(models[name])
        assert installation is not None
        installation.attention_layers = sum(len(group.layers) for group in plans[name])


def _plan(model: nn.Module, layout: TokenLayout | ReadLayout | None) -> list[AttentionGroup]:
    """The groups of a model that have layers."""
    groups = (
        attention_groups_of(model)
        if layout is None
        else [AttentionGroup("", GivenLayout(layout), self_attention_layers(model))]
    )
    if not any(group.layers for group in groups):
        raise ValueError(f"{type(model).__name__} has no self-attention layers that dit_accel could replace")
    return groups


def _choose(names: dict[str, list[str]], layers: Layers | None) -> dict[str, list[str]]:
    """Layer names by component that ``layers`` selects."""
    full = {f"{component}.{name}": (component, name) for component, found in names.items() for name in found}
    if layers is None:
        return names
    if isinstance(layers, (str, re.Pattern)):
        expression = _compiled(layers)
        wanted = [name for name in full if expression.search(name)]
        missing = [] if wanted else [str(layers)]
    elif callable(layers):
        wanted = [name for name in full if layers(name)]
        missing = [] if wanted else ["(predicate)"]
    else:
        if not isinstance(layers, Iterable):
            raise TypeError(
                f"layers= must be names, a regular expression or a predicate of a name, got {type(layers).__name__}"
            )
        given = list(layers)
        if not given:
            raise ValueError("layers= is empty, so nothing would be set: name the layers, or leave layers= out for all")
        wanted = [name for name, (_, short) in full.items() if name in given or short in given]
        missing = [name for name in given if name not in full and all(name != short for _, short in full.values())]
    if missing:
        near = difflib.get_close_matches(missing[0], [*full, *(short for _, short in full.values())], n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; there are: {', '.join(list(full)[:4])} …"
        raise ValueError(f"layers= selects no self-attention layer: {', '.join(missing)}{hint}")
    return {component: [full[name][1] for name in wanted if full[name][0] == component] for component in names}


def _compiled(expression: str | re.Pattern[str]) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"layers={expression!r} is not a regular expression: {error}") from None


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
    """The mechanism of an attention module, with its learned parameters as they are before any training. Its layout
    slot belongs to no group yet."""
    initial = processor.initial_parameters(head_dim_of(attn, name))
    return MechanismLayer(processor, LayoutSlot(), initial, processor.input_projections(attn))


def _make_layers(
    model: nn.Module, groups: list[AttentionGroup], chosen: Mapping[str, AcceleratedAttnProcessor]
) -> dict[str, MechanismLayer]:
    """A new layer for each chosen attention module; the model is not touched yet.

    Raises: ValueError: a module that the mechanism cannot be installed on.
    """
    made = {}
    slots = list({id(layer.slot): layer.slot for layer in installed_layers(model).values()}.values())
    for group in groups:
        here = [name for name in group.layers if name in chosen]
        slot = next((slot for slot in slots if slot.group is not None and _same_source(slot.group, group)), None)
        slot = slot or LayoutSlot(group)
        for name in here:
            attn = model.get_submodule(name)
            if not is_self_attention(attn):
                raise ValueError(f"{name} is not a self-attention module with a processor")
            like = next((p for p in attn.parameters() if p.is_floating_point()), None)
            device = torch.device("cpu") if like is None or like.is_meta else like.device
            dtype = torch.float32 if like is None else like.dtype
            chosen[name].check_host(attn, name)
            _intercepted(attn.processor)  # raises if it has no softmax call
            made[name] = new_layer(chosen[name], attn, name).to(device, dtype).train(attn.training)
            made[name].slot = slot
    return made


def _same_source(a: AttentionGroup, b: AttentionGroup) -> bool:
    """Whether two groups read one layout: they share a layout slot."""
    return a.owner == b.owner and a.read == b.read


def _set_layers(model: nn.Module, layers: Mapping[str, MechanismLayer], clock: StepClock) -> None:
    """Make these the installed layers of a model, and no others; without layers nothing of the installation is left.

    The one place that changes attention modules: all else of an installation follows from its layers.
    """
    intercepted = {name: _intercepted(model.get_submodule(name).processor) for name in layers}
    installation = installation_of(model)
    if installation is None:
        if not layers:
            return
        steps = StepHook(clock, forward_parameters(model))
        installation = Installation(steps, model.register_forward_pre_hook(steps, with_kwargs=True))
        setattr(model, _ATTRIBUTE, installation)
    for name in [name for name in installation.originals if name not in layers]:
        _uninstall(model, name, installation.originals.pop(name))
    for name, layer in layers.items():
        attn = model.get_submodule(name)
        if not isinstance(attn.processor, InterceptedProcessor):
            installation.originals[name] = attn.processor
            attn.processor = intercepted[name]
        attn.dit_accel = layer
    slots = {id(layer.slot): layer.slot for layer in layers.values()}
    for hook in [hook for hook in installation.hooks if id(hook.slot) not in slots]:
        hook.remove()
        installation.hooks.remove(hook)
    hooked = {id(hook.slot) for hook in installation.hooks}
    for slot in (slot for key, slot in slots.items() if key not in hooked):
        assert slot.group is not None
        installation.hooks.append(LayoutHook(slot, model.get_submodule(slot.group.owner)))
    installation.steps.counts = any(layer.mechanism.dense_steps for layer in layers.values())
    if not layers:
        installation.handle.remove()
        delattr(model, _ATTRIBUTE)


def _intercepted(processor: Any) -> Any:
    return processor if isinstance(processor, InterceptedProcessor) else intercept_processor(processor)


def _uninstall(model: nn.Module, name: str, original: Any) -> None:
    """Restore the host's own processor of an attention module, also among those that diffusers stored."""
    attn = model.get_submodule(name)
    if isinstance(attn.processor, InterceptedProcessor):  # else the user has set another one since
        attn.processor = host_of(attn.processor, original)
    stored = getattr(model, "original_attn_processors", None)  # by fuse_qkv_projections, for unfuse_qkv_projections
    ours = stored.get(f"{name}.processor") if isinstance(stored, dict) else None
    if isinstance(ours, InterceptedProcessor):
        stored[f"{name}.processor"] = host_of(ours, original)  # type: ignore[index]
    del attn.dit_accel


def reset_attn_processor(pipe_or_model: Any) -> None:
    """Take everything off again: the same processor objects, state_dict and outputs as before the first install.

    Weights that :func:`dit_accel.load_attention` overwrote are put back. If they were changed since, by training or a
    LoRA that was merged and unloaded, that change is lost, and the log warns of it. Nothing happens if nothing is
    installed.

    Raises:
        TypeError: neither a pipeline nor a model.
        RuntimeError: weights to be put back are offloaded to another place.
    """
    for model in denoisers(pipe_or_model).values():
        _reset(model)


def _reset(model: nn.Module) -> None:
    installation = installation_of(model)
    if installation is None:
        return
    check_reachable(model, installation.overwritten)
    warn_of_changes(model, installation.overwritten, installation.written)
    _set_layers(model, {}, installation.steps.clock)
    for name, value in installation.overwritten.items():
        write_host_weight(model, name, value)


def overwrite_host_weight(model: nn.Module, name: str, value: Tensor) -> None:
    """Overwrite a parameter of the host as a load does: :func:`reset_attn_processor` puts back what was there first."""
    installation = installation_of(model)
    assert installation is not None
    if name not in installation.overwritten:
        installation.overwritten[name] = model.get_parameter(name).detach().to("cpu", copy=True)
    write_host_weight(model, name, value)
    installation.written[name] = sample(model.get_parameter(name))


def keep_layers(model: nn.Module, names: Iterable[str]) -> None:
    """Remove the mechanism from all layers but these; the others have the host's own attention again."""
    kept = set(names)
    installation = installation_of(model)
    if installation is None:
        return
    layers = {name: layer for name, layer in installed_layers(model).items() if name in kept}
    _set_layers(model, layers, installation.steps.clock)


@contextlib.contextmanager
def restored_afterwards(models: Iterable[nn.Module], *, on_success: bool = True) -> Iterator[None]:
    """Bring installed layers, their layouts and the host's weights back to what they were, whatever the block did.

    Args:
        models: denoisers.
        on_success: False = only if the block raises.
    """
    scopes = [(model, _open_scope(model)) for model in models]
    restore = True
    try:
        yield
        restore = on_success
    finally:
        for model, scope in scopes:
            stop_recording(model, scope.replaced)
            if restore:
                _restore(model, scope)


def _open_scope(model: nn.Module) -> _Scope:
    installation = installation_of(model)
    if installation is None:
        return _Scope(None, {}, {}, {}, 0, record_replaced(model))
    weights = dict(installation.overwritten), dict(installation.written)
    layers = installed_layers(model)
    return _Scope(installation.steps.clock, layers, *weights, installation.attention_layers, record_replaced(model))


def _restore(model: nn.Module, scope: _Scope) -> None:
    installation = installation_of(model)
    if installation is not None:
        warn_of_changes(model, scope.replaced, installation.written)
    for name, value in scope.replaced.items():
        write_host_weight(model, name, value)
    _set_layers(model, scope.layers, scope.clock or StepClock())
    installation = installation_of(model)
    if installation is not None:
        installation.overwritten, installation.written = dict(scope.overwritten), dict(scope.written)
        installation.attention_layers = scope.attention_layers


@contextlib.contextmanager
def attention(pipe_or_model: Any, processor: AcceleratedAttnProcessor, **options: Any) -> Iterator[Any]:
    """``with dit_accel.attention(pipe, processor): ...`` sets a processor, and restores what was there before.

    Args are those of :func:`set_attn_processor`. Afterwards the layers that were installed before are installed again
    with their weights and layouts, and weights that :func:`dit_accel.load_attention` overwrote inside are put back.
    """
    with restored_afterwards(denoisers(pipe_or_model).values()):
        set_attn_processor(pipe_or_model, processor, **options)
        yield pipe_or_model


def installed_layers(model: nn.Module) -> dict[str, MechanismLayer]:
    """The installed layers of a denoiser by the name of their attention module."""
    installation = installation_of(model)
    if installation is None:
        return {}
    found = {name: getattr(unwrap(model).get_submodule(name), "dit_accel", None) for name in installation.originals}
    return {name: layer for name, layer in found.items() if isinstance(layer, MechanismLayer)}


def wrap_new_processors(model: nn.Module, processors: Mapping[str, Any]) -> dict[str, Any]:
    """Intercept the processors that host tooling (an IP-Adapter's loader) made for installed layers."""
    installation = installation_of(model)
    adopted = dict(processors)
    for name in installation.originals if installation is not None else ():
        key = f"{name}.processor"
        if key in adopted and not isinstance(adopted[key], InterceptedProcessor):
            assert installation is not None
            installation.originals[name] = adopted[key]
            adopted[key] = intercept_processor(adopted[key])
    return adopted
