"""A mechanism as torch operators: forward, shapes for tracing, and a backward that recomputes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from dit_accel.backend import resolve
from dit_accel.layout import TokenLayout

__all__ = ["define_operator"]

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? key_padding_mask"
_LAYOUT = "SymInt[] grid, SymInt before, SymInt after"


def define_operator(
    name: str,
    compute: dict[str, Callable[..., Tensor]],
    fit: Callable[..., dict[str, Any]],
    *,
    learned: tuple[str, ...],
    options: str,
) -> Callable[..., Tensor]:
    """Register ``dit_accel::<name>`` and ``dit_accel::<name>_backward``.

    The operator's arguments are, in order: query, key, value, key_padding_mask, the learned tensors, grid, before,
    after, the options, scale, fit, backend (optional). Grid lengths may be symbolic while tracing: here, inside, they
    are numbers, so what depends on them (is the window larger than its axis?) is checked here, and with ``fit`` options
    are shrunk first.

    Args:
        name: the operator's name.
        compute: for each backend ``compute(query, key, value, key_padding_mask, *learned, layout, scale, **options)``.
        fit: the mechanism's ``fit``.
        learned: names of the learned tensors.
        options: the options as operator schema, such as ``"float critical, bool smooth_key"``.
    """
    n_tensors = 4 + len(learned)
    tensors = ", ".join([_TENSORS, *(f"Tensor? {x}" for x in learned)])
    option_names = [x.split()[-1] for x in options.split(", ")]
    arguments = f"{tensors}, {_LAYOUT}, {options}, float? scale, bool fit, str? backend=None"

    mechanism = name.removesuffix("_attention")
    n_rest = 3 + len(option_names) + 3

    def run(tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...], force: str | None = None) -> Tensor:
        query = tensors[0]
        assert query is not None
        rest += (None,) * (n_rest - len(rest))  # the dispatcher leaves out a last argument at its default
        grid, before, after, *values, scale, shrink, backend = rest
        layout = TokenLayout(tuple(grid), before, after)
        if layout.seq_len != query.shape[2]:
            raise ValueError(
                f"layout {layout} has {layout.seq_len} tokens but query has {query.shape[2]}: "
                "pass the layout of this sequence, with every token off the grid in before or after"
            )
        chosen = dict(zip(option_names, values, strict=True))
        if shrink:
            chosen = fit(layout, **chosen)
        backend = resolve(backend if force is None else force, query.device, mechanism)
        if query.numel() == 0:
            return query.clone()
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        # kernels are launched on the current device, which need not be the tensors'
        with torch.cuda.device_of(query), torch.autocast(query.device.type, enabled=False):
            return compute[backend](*tensors, layout=layout, scale=scale, **chosen)

    def forward(*args: Any) -> Tensor:
        return _dense(run(args[:n_tensors], args[n_tensors:]))

    def backward(grad: Tensor, *args: Any) -> list[Tensor]:
        tensors, rest = args[:n_tensors], args[n_tensors:]
        places = _differentiable(tensors)
        leaves = [tensors[i].detach().requires_grad_() for i in places]
        filled = list(tensors)
        for i, leaf in zip(places, leaves, strict=True):
            filled[i] = leaf
        with _recording():
            out = run(tuple(filled), rest, force="torch")  # what the forward took has no derivative of its own
            grads = torch.autograd.grad(out, leaves, grad, allow_unused=True, materialize_grads=True)
        return [_dense(g) for g in grads]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:n_tensors])
        ctx.rest = inputs[n_tensors:]

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        grads = backward_op(grad, *tensors, *ctx.rest)
        given: list[Tensor | None] = [None] * (n_tensors + len(ctx.rest))
        for i, g in zip(_differentiable(tensors), grads, strict=True):
            given[i] = g
        return tuple(given)

    forward_op = torch.library.custom_op(
        f"dit_accel::{name}", forward, mutates_args=(), schema=f"({arguments}) -> Tensor"
    )
    forward_op.register_fake(lambda *args: _empty(args[0]))
    backward_op = torch.library.custom_op(
        f"dit_accel::{name}_backward", backward, mutates_args=(), schema=f"(Tensor grad, {arguments}) -> Tensor[]"
    )
    backward_op.register_fake(lambda grad, *args: [_empty(args[i]) for i in _differentiable(args[:n_tensors])])
    forward_op.register_autograd(differentiate, setup_context=setup_context)
    return forward_op


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd inside an operator: there it is shut off not by the grad mode alone but below the dispatcher, too."""
    keys = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)
    with ExitStack() as stack:
        for key in keys:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield


def _differentiable(tensors: tuple[Tensor | None, ...]) -> list[int]:
    """Places of query, key, value and the learned tensors that were given."""
    return [0, 1, 2, *(i for i in range(4, len(tensors)) if tensors[i] is not None)]


def _empty(like: Tensor) -> Tensor:
    """For (B, H, S, D) dense in the order (B, S, H, D): the host flattens the heads next, and need not copy."""
    if like.dim() != 4:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)
    batch, heads, length, dim = like.shape
    return torch.empty((batch, length, heads, dim), dtype=like.dtype, device=like.device).transpose(1, 2)


def _dense(x: Tensor) -> Tensor:
    """x in the strides of :func:`_empty`."""
    like = _empty(x)
    return x if x.stride() == like.stride() else like.copy_(x)
