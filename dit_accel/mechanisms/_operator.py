"""Mechanisms as torch operators: forward, fake implementation for tracing, and a backward that recomputes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dit_accel.layout import TokenLayout
from dit_accel.mechanisms.backend import ENV_VARIABLE, resolve

from ._inputs import AttentionInputs
from ._options import to_hashable

__all__ = ["autograd_inside_op", "check_no_tangents", "define_operator"]

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? key_mask"
_LAYOUT = "SymInt[] grid, SymInt before, SymInt after"


def define_operator(kind: Any) -> Any:
    """Register ``dit_accel::<name>_attention`` and ``dit_accel::<name>_attention_backward`` for a processor class.

    The operator returns the output and, for backends with their own backward pass, the log-sum-exp (B, H, S) that it
    needs; for others an empty tensor. Its arguments are, in order: query, key, value, key_mask, the learned tensors,
    grid, before, after, the options, scale, fit, backend (optional). Grid lengths may be symbolic while tracing, but
    are numbers inside the operator. Checks that depend on them (is the window larger than its axis?) are therefore made
    here, after ``fit`` has capped the options if requested. For a backend without a backward pass of its own, the
    backward pass recomputes the output with torch and differentiates it by autograd.

    Args: kind: a processor class with ``operator_options``.
    Returns: the operator.
    """
    mechanism, name = kind.name, f"{kind.name}_attention"
    backward = kind.backward_backends
    n_tensors = 4 + len(kind.learned)
    tensors = ", ".join([_TENSORS, *(f"Tensor? {x}" for x in kind.learned)])
    options = [f"{option.schema} {option.name}" for option in kind.operator_options]
    arguments = ", ".join([tensors, _LAYOUT, *options, "float? scale", "bool fit", "str? backend=None"])
    n_rest = 3 + len(options) + 3

    def run(
        tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...], forward: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> Any:
        """Output of compute for the backend, or the gradients if ``forward`` gives grad, out and lse."""
        query = tensors[0]
        assert query is not None
        rest += (None,) * (n_rest - len(rest))  # the dispatcher omits a last argument equal to its default
        grid, before, after, *values, scale, shrink, backend = rest
        layout = TokenLayout(tuple(grid), before, after)
        if layout.seq_len != query.shape[2]:
            raise ValueError(
                f"layout {layout} has {layout.seq_len} tokens but query has {query.shape[2]}: "
                "pass the layout of this sequence, with all global tokens in before or after"
            )
        processor = _processor(kind, tuple(map(to_hashable, values)), layout if shrink else None)
        backend = resolve(backend, query.device, kind)
        if forward is not None and backend not in backward:
            backend = "torch"
        _check_gpu(mechanism, backend, query)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        # kernels are launched on the current device, which may not be the tensors' device
        with (
            torch.cuda.device_of(query),
            _no_autocast(query.device.type),
            _explained(
                mechanism if forward is None else f"the backward pass of {mechanism}", backend, kind.backends, query
            ),
        ):
            if forward is None:
                return processor.compute(backend, _inputs(tensors, layout, scale))
            if backend in backward:
                return processor.backward(*forward, _inputs(tensors, layout, scale))
            return _by_autograd(lambda *x: processor.compute(backend, _inputs(x, layout, scale)), forward[0], tensors)

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        query = args[0]
        if query.numel() == 0:
            return fake(*args)
        found = run(args[:n_tensors], args[n_tensors:])
        out, lse = found if isinstance(found, tuple) else (found, query.new_empty(0, dtype=torch.float32))
        return _dense(out), lse

    def fake(*args: Any) -> tuple[Tensor, Tensor]:
        query, backend = args[0], args[-1] if len(args) == n_tensors + n_rest else None
        has_lse = resolve(backend, query.device, kind) in backward
        return _empty(query), query.new_empty(query.shape[:3] if has_lse else (0,), dtype=torch.float32)

    def compute_gradients(grad: Tensor, out: Tensor, lse: Tensor, *args: Any) -> list[Tensor]:
        tensors, rest = args[:n_tensors], args[n_tensors:]
        if grad.numel() == 0:
            return [torch.zeros_like(tensors[i]) for i in _differentiable(tensors)]
        return [_dense(g) for g in run(tensors, rest, (grad, out, lse))]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output, *inputs[:n_tensors])
        ctx.rest = inputs[n_tensors:]
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        grads = backward_op(grad, out, lse, *tensors, *ctx.rest)
        given: list[Tensor | None] = [None] * (n_tensors + len(ctx.rest))
        for i, g in zip(_differentiable(tensors), grads, strict=True):
            given[i] = g
        return tuple(given)

    forward_op = torch.library.custom_op(
        f"dit_accel::{name}", forward, mutates_args=(), schema=f"({arguments}) -> (Tensor, Tensor)"
    )
    forward_op.register_fake(fake)
    backward_op = torch.library.custom_op(
        f"dit_accel::{name}_backward",
        compute_gradients,
        mutates_args=(),
        schema=f"(Tensor grad, Tensor out, Tensor lse, {arguments}) -> Tensor[]",
    )
    backward_op.register_fake(lambda _g, _o, _l, *args: [_empty(args[i]) for i in _differentiable(args[:n_tensors])])
    forward_op.register_autograd(differentiate, setup_context=setup_context)
    return getattr(torch.ops.dit_accel, name)


def _inputs(tensors: tuple[Any, ...], layout: TokenLayout, scale: float) -> AttentionInputs:
    query, key, value, key_mask, *learned = tensors
    return AttentionInputs(query, key, value, key_mask, tuple(learned), layout, scale)


@lru_cache(maxsize=1024)
def _processor(kind: Any, values: tuple[Any, ...], layout: TokenLayout | None) -> Any:
    """Processor for the options of an operator call, capped to the layout if one is given."""
    processor = kind(**{option.name: value for option, value in zip(kind.operator_options, values, strict=True)})
    return processor if layout is None else processor.fit(layout)


def check_no_tangents(mechanism: str, *tensors: Tensor | None) -> None:
    """Refuse forward-mode differentiation: torch drops the tangents of an operator's arguments and returns 0. Costs 0.1
    µs outside forward mode.

    Raises: NotImplementedError: a tensor with a tangent.
    """
    if forward_ad._current_level < 0:
        return
    for x in tensors:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{mechanism} has no forward-mode derivative (torch.func.jvp, jacfwd, torch.autograd.forward_ad): use "
                "reverse mode (torch.autograd.grad, torch.func.vjp), or detach its inputs"
            )


def _by_autograd(compute: Callable[..., Tensor], grad: Tensor, tensors: tuple[Tensor | None, ...]) -> Sequence[Tensor]:
    """Gradients of the differentiable tensors, by recomputing the output in plain torch."""
    arguments = list(tensors)
    leaves = []
    for i in _differentiable(tensors):
        leaf = arguments[i].detach().requires_grad_()  # type: ignore[union-attr]
        arguments[i] = leaf
        leaves.append(leaf)
    with autograd_inside_op():
        out = compute(*arguments)
        return torch.autograd.grad(out, leaves, grad, allow_unused=True, materialize_grads=True)


def _check_gpu(mechanism: str, backend: str, query: Tensor) -> None:
    """Raises: ValueError: an NVIDIA GPU older than Ampere. Triton does not list these as supported: since 3.3 it
    compiles kernels for them without matrix units, and ours then spill kilobytes per thread.
    """
    if backend != "triton" or query.device.type != "cuda" or torch.version.hip:
        return
    major, minor = torch.cuda.get_device_capability(query.device)
    if major < 8:
        dtype = ", in float16 or float32: it has no bfloat16 either" if query.dtype == torch.bfloat16 else ""
        raise ValueError(
            f"{mechanism}: the Triton kernels need compute capability 8.0 (Ampere) or later, and "
            f'{torch.cuda.get_device_name(query.device)} has {major}.{minor}: choose backend="torch" '
            f"({ENV_VARIABLE}=torch){dtype}"
        )


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Disable autocast; free if it is not enabled."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@contextmanager
def _explained(what: str, backend: str, backends: Iterable[str], query: Tensor) -> Iterator[None]:
    """Extend memory errors by what was computed and what may help.

    Raises: torch.OutOfMemoryError: the GPU's memory is full; RuntimeError: a Triton kernel does not fit the GPU.
    """
    dtype, others = str(query.dtype).removeprefix("torch."), [x for x in backends if x != backend]
    try:
        yield
    except torch.OutOfMemoryError as error:
        leaner = ', or choose backend="triton", which needs less' if "triton" in others else ""
        raise torch.OutOfMemoryError(
            f"{what} (backend {backend}) ran out of memory on {query.device}, with query, key and value of shape "
            f"{tuple(query.shape)} in {dtype}: make the batch, the picture or the clip smaller, offload what is not in "
            f"use (pipe.enable_model_cpu_offload()){leaner}. {error}"
        ) from error
    except _too_large() as error:
        unit = "bytes of " if "memory" in error.name else ""
        narrower = "convert to float16 or bfloat16, or " if query.element_size() > 2 else ""
        choices = " or ".join(f'backend="{x}"' for x in others)
        raise RuntimeError(
            f"{what}: a Triton kernel for head dim {query.shape[-1]} in {dtype} needs {error.required} {unit}"
            f"{error.name}, and {_name(query.device)} has {error.limit}: {narrower}choose {choices} "
            f"({ENV_VARIABLE}={others[0]})"
        ) from error


def _too_large() -> tuple[type[Any], ...]:
    """Triton's error for a kernel that does not fit, if Triton was imported."""
    errors = sys.modules.get("triton.runtime.errors")
    return () if errors is None else (errors.OutOfResources,)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@contextmanager
def autograd_inside_op() -> Iterator[None]:
    """Enable autograd inside an operator, where both the grad mode and the dispatch keys below it are off."""
    keys = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)
    with ExitStack() as stack:
        for key in keys:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield


def _differentiable(tensors: tuple[Tensor | None, ...]) -> list[int]:
    """Indices of query, key, value and the learned tensors that were given."""
    return [0, 1, 2, *(i for i in range(4, len(tensors)) if tensors[i] is not None)]


def _empty(like: Tensor) -> Tensor:
    """Uninitialized (B, H, S, D), dense in the order (B, S, H, D): the host flattens the heads next, without a copy."""
    if like.dim() != 4:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)
    batch, heads, length, dim = like.shape
    return torch.empty((batch, length, heads, dim), dtype=like.dtype, device=like.device).transpose(1, 2)


def _dense(x: Tensor) -> Tensor:
    """Copy x to the strides of :func:`_empty` if they differ."""
    if x.dim() != 4:
        return x.contiguous()
    _, heads, length, dim = x.shape
    return x if x.stride() == (length * heads * dim, dim, heads * dim, 1) else _empty(x).copy_(x)
