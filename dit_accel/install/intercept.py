"""Put a mechanism in place of the softmax call of a diffusers attention module, and keep everything around it.

The host's own processor keeps running: projections, norms, rotary embedding, LoRA, IP-Adapter. It is copied into a
subclass of its own class whose ``__call__`` runs the host's under a ``TorchFunctionMode`` that catches the first
``scaled_dot_product_attention``; later ones (IP-Adapter's) go through. State lives in ``attn.dit_accel``, not in the
processor, since diffusers makes new processors with ``processor.__class__()``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..common.attention_group import AttentionGroup
from ..layout import TokenLayout
from ..mechanisms.processor import AcceleratedAttnProcessor

__all__ = [
    "InterceptedProcessor",
    "LayoutSlot",
    "MechanismLayer",
    "ThreadSlot",
    "host_of",
    "intercept_processor",
    "key_padding",
]


class ThreadSlot:
    """A value per thread; None in a thread that has set none. Copies and unpickled ones are empty.

    ``threading.local`` and not a ``ContextVar``: dynamo traces the former alone, and guards on the thread's own value.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def value(self) -> Any:
        return getattr(self._local, "value", None)

    @value.setter
    def value(self, value: Any) -> None:
        self._local.value = value

    def __reduce__(self) -> tuple[type[ThreadSlot], tuple[()]]:
        return ThreadSlot, ()


class LayoutSlot:
    """The token layout that the layers of a group share.

    Args:
        group: the layers' group; its ``owner`` and ``read`` say where the layout comes from.

    Attributes:
        layout: layout of the forward in progress in this thread; None between forwards.
        last: layout of the latest forward in any thread; None before the first.
    """

    def __init__(self, group: AttentionGroup | None = None) -> None:
        self.group = group
        self.last: TokenLayout | None = None
        self._layout = ThreadSlot()

    @property
    def layout(self) -> TokenLayout | None:
        return self._layout.value

    @layout.setter
    def layout(self, layout: TokenLayout | None) -> None:
        self._layout.value = layout


class MechanismLayer(nn.Module):
    """One attention layer's mechanism: its options and its learned parameters, at ``attn.dit_accel``.

    Called as a module, so that ``.to()``, offloading hooks, FSDP and compilation see its parameters.
    """

    def __init__(
        self,
        processor: AcceleratedAttnProcessor,
        slot: LayoutSlot,
        parameters: dict[str, Tensor],
        input_projections: dict[str, nn.Module],
    ) -> None:
        super().__init__()
        self.mechanism = processor
        self.slot = slot
        self._dense_here = ThreadSlot()
        self.parameter_names = tuple(parameters)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))
        self.input_projections = {name: f"{name}_" for name in input_projections}  # the host's projection -> ours
        for name, module in input_projections.items():
            self.add_module(self.input_projections[name], module)

    @property
    def dense(self) -> bool:
        """Whether this thread's forward in progress is one of the first ``dense_steps``."""
        return bool(self._dense_here.value)

    @dense.setter
    def dense(self, dense: bool) -> None:
        self._dense_here.value = dense

    def stays_dense(self) -> bool:
        """Whether the host's own attention is asked for in the forward in progress."""
        layout, least = self.slot.layout, self.mechanism.min_tokens
        return self.dense or bool(least and layout is not None and layout.grid_len < least)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """The host's softmax call: same arguments as ``F.scaled_dot_product_attention``."""
        layout = self.slot.layout
        if layout is None:
            raise RuntimeError(
                "dit_accel has no token layout for this forward pass: call the model itself, model(...), since "
                "model.forward(...) skips the hooks that read it; or pass layout= to dit_accel.set_attn_processor"
            )
        if self.stays_dense():
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if is_causal or dropout_p:
            raise ValueError(
                f"{self.mechanism.name}: the host asked for is_causal={is_causal}, dropout_p={dropout_p}; "
                "neither can be combined with this mechanism: leave this layer out with layers="
            )
        if torch.is_autocast_enabled(query.device.type):  # as autocast does for the call that this one replaces
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if enable_gqa and key.shape[1] != query.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        learned = {name: getattr(self, name) for name in self.parameter_names}
        return self.mechanism.attend(
            query,
            key,
            value,
            layout,
            key_mask=None if attn_mask is None else key_padding(attn_mask, query, key),
            host_scale=scale,
            # a layer installed after group offloading is in no group: bring its few numbers along
            parameters={name: value.to(query.device, query.dtype) for name, value in learned.items()},
        )


def key_padding(attn_mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """(B, S) bool from a host's mask that hides whole keys: (B or 1, 1 or H, 1, S), bool or additive 0 / very negative.

    Raises: ValueError: a mask that differs between queries, or an additive bias that is not a mask.
    """
    batch, keys = query.shape[0], key.shape[-2]
    mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + tuple(attn_mask.shape))
    if mask.shape[-2] != 1 or mask.shape[-1] != keys or mask.shape[0] not in (1, batch):
        raise ValueError(
            f"the model passes an attention mask of shape {tuple(attn_mask.shape)}; dit_accel takes masks that hide "
            f"whole keys, (B, 1, 1, {keys}): leave these layers out with layers="
        )
    if not torch.compiler.is_compiling() and not bool((mask == mask[:, :1]).all()):
        raise ValueError(
            "the model passes an attention mask that differs between heads: leave these layers out with layers="
        )
    mask = mask[:, 0, 0]
    if mask.dtype != torch.bool:
        hidden = mask <= -1000.0
        if not torch.compiler.is_compiling() and not bool((hidden | (mask == 0)).all()):
            raise ValueError(
                "the model passes an additive attention bias that is neither 0 nor a mask (<= -1000): "
                "dit_accel cannot add it to the logits; leave these layers out with layers="
            )
        mask = ~hidden
    return mask.expand(batch, keys)


class _CatchSoftmaxCall(TorchFunctionMode):
    """Send the first ``scaled_dot_product_attention`` to the layer; everything else goes its way."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.caught = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not self.caught:
            self.caught = True
            return self.layer(*args, **kwargs)
        if func is torch.Tensor.unflatten:  # the method is Python that dynamo cannot trace under a mode
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)


class _ChangedInputs:
    """An attention module as its processor sees it, where a mechanism adds to the inputs of some projections.

    Projections are looked up at every call: a LoRA may be put around them, and taken off, at any time.
    """

    def __init__(self, attn: nn.Module, layer: MechanismLayer) -> None:
        self._attn = attn
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._attn, name)
        ours = self._layer.input_projections.get(name)
        if ours is None:
            return found
        change = getattr(self._layer, ours)
        return lambda x, *args: found(x + _brought_along(change, x), *args)


def _brought_along(module: nn.Module, x: Tensor) -> Tensor:
    """What a module gives. Where it was installed after offloading no hook brings its parameters to the input's device:
    they are copied there for the call."""
    if all(p.device == x.device for p in module.parameters()) or any(
        hasattr(part, hook) for part in module.modules() for hook in ("_diffusers_hook", "_hf_hook")
    ):
        return module(x)
    return torch.func.functional_call(module, {name: p.to(x.device) for name, p in module.named_parameters()}, x)


_HOST = "_dit_accel_host"


class InterceptedProcessor:
    """Marks the processors whose softmax call is caught."""


def _run_host(processor: Any, attn: nn.Module, call: Callable[[Any], Any]) -> Any:
    layer = getattr(attn, "dit_accel", None)
    if layer is None:
        raise RuntimeError(
            f"a {type(processor).__name__} that dit_accel had installed was moved to an attention module where nothing "
            "is installed; call dit_accel.set_attn_processor on this model, or set the model's own processor"
        )
    if getattr(processor, "_parallel_config", None) is not None:
        raise RuntimeError(
            "context parallelism (Ulysses, ring) splits the tokens before attention, which dit_accel cannot follow; "
            "disable it or call dit_accel.reset_attn_processor"
        )
    seen = _ChangedInputs(attn, layer) if layer.input_projections and not layer.stays_dense() else attn
    mode = _CatchSoftmaxCall(layer)
    with mode:
        output = call(seen)
    if not mode.caught:
        raise RuntimeError(
            f"{type(processor).__name__} never called scaled_dot_product_attention, so nothing was replaced: the model "
            'uses another attention backend; call model.set_attention_backend("native")'
        )
    return output


@functools.cache
def intercepted_class(host: type) -> type:
    """Subclass of a processor class whose softmax call is caught, with the host's own parameter list.

    diffusers drops keyword arguments that ``inspect.signature(processor.__call__)`` does not name, and dynamo follows
    neither ``__signature__`` nor an instance's ``__call__``: hence a method generated with the very list.
    """
    attn, *parameters = list(inspect.signature(host.__call__).parameters.values())[1:]
    namespace: dict[str, Any] = {"_run_host": _run_host, "_host_call": host.__call__}
    declared, passed, star = [attn.name], [attn.name], False
    for parameter in parameters:
        text = parameter.name
        if parameter.kind is parameter.VAR_POSITIONAL:
            declared.append(f"*{text}")
            passed.append(f"*{text}")
            star = True
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            declared.append(f"**{text}")
            passed.append(f"**{text}")
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            declared.append("*")
            star = True
        passed.append(f"{text}={text}" if parameter.kind is parameter.KEYWORD_ONLY else text)
        if parameter.default is not parameter.empty:
            namespace[f"_default_{text}"] = parameter.default
            text = f"{text}=_default_{text}"
        declared.append(text)
    source = (
        f"def __call__(self, {', '.join(declared)}):\n"
        f"    return _run_host(self, {attn.name}, lambda {attn.name}: _host_call(self, {', '.join(passed)}))\n"
    )
    exec(source, namespace)  # from the parameter names of the host's own method
    members: dict[str, Any] = {
        "__call__": namespace["__call__"],
        "__module__": host.__module__,
        "__doc__": host.__doc__,
    }
    members["__reduce__"] = lambda self: (_unpickle, (host,), self.__dict__)
    if hasattr(host, "_attention_backend"):
        members["_attention_backend"] = _native_backend()
    return type(host.__name__, (host, InterceptedProcessor), members)


def _unpickle(host: type) -> Any:
    return object.__new__(intercepted_class(host))


def _native_backend() -> Any:
    from diffusers.models.attention_dispatch import AttentionBackendName

    return AttentionBackendName.NATIVE


def host_of(processor: Any, default: Any) -> Any:
    """The host's own processor behind an intercepted one; the default for one that diffusers constructed anew."""
    return processor.__dict__.get(_HOST, default)


def intercept_processor(host: Any) -> Any:
    """Copy of a processor, sharing its weights, whose softmax call is caught.

    Raises: ValueError: a processor that computes attention without ``scaled_dot_product_attention``.
    """
    code = getattr(type(host).__call__, "__code__", None)
    names = set(code.co_names) if code is not None else set()
    calls = {"scaled_dot_product_attention", "dispatch_attention_fn"}
    if names & {"get_attention_scores", "memory_efficient_attention"} and not names & calls:
        raise ValueError(
            f"{type(host).__name__} does not use torch's scaled_dot_product_attention, so dit_accel cannot take its "
            "place; set the model's default processors first (disable attention slicing and xformers)"
        )
    processor = copy.copy(host)
    kind: type = type(host)
    processor.__class__ = intercepted_class(kind)
    processor.__dict__[_HOST] = host  # past nn.Module.__setattr__: a host with weights must not become a submodule
    if "_attention_backend" in processor.__dict__:
        processor._attention_backend = _native_backend()
    return processor
