"""Attention weights and masks of one query token, dense and under a mechanism, computed with the library's functions.

A recording holds query and key of each self-attention layer while a pipeline draws with dense attention. Mechanisms are
used through their attention function only. Its output is linear in the values, so the derivative of one query's output
with respect to the values is that query's row of attention weights. With scale 0, all keys that a query attends to have
equal weight, so the attention mask is the set of keys with a positive weight.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.install.hooks import StepClock
from dit_accel.install.installation import attention, denoisers, installation_of, installed_layers
from dit_accel.install.intercept import MechanismLayer, key_padding
from dit_accel.layout import TokenLayout
from dit_accel.mechanisms.clear import CLEARAttnProcessor
from dit_accel.mechanisms.processor import AcceleratedAttnProcessor

__all__ = [
    "CRITICAL",
    "LEFT_OUT",
    "LINEAR",
    "Attended",
    "AttentionCall",
    "BlockMap",
    "Coverage",
    "Recording",
    "attend",
    "attended_mask",
    "block_map",
    "coverage",
    "dense_weights",
    "mechanism_weights",
    "record_calls",
    "spread_steps",
]

_ALWAYS_DENSE = CLEARAttnProcessor(radius=1, dense_steps=sys.maxsize)  # intercepts the calls; all steps stay dense
_ARGUMENTS = inspect.signature(MechanismLayer.forward)
_MAX_SAMPLED_QUERIES = 1024  # queries per layer over which the coverage is averaged
_MAX_BLOCKS = 1024  # per side: larger maps cannot be read
LEFT_OUT, LINEAR, CRITICAL = 0, 1, 2


@dataclass(frozen=True)
class AttentionCall:
    """Softmax attention call of one layer at one step, for one sample.

    query, key: (1, H, S, D). key_mask: (1, S), True = attend, False on padding.
    """

    query: Tensor
    key: Tensor
    layout: TokenLayout
    scale: float | None
    key_mask: Tensor | None

    @property
    def n_heads(self) -> int:
        return self.query.shape[1]

    @property
    def n_bytes(self) -> int:
        return self.query.nbytes + self.key.nbytes

    def head(self, number: int, device: torch.device | None = None) -> AttentionCall:
        """Return the call restricted to one head, in float32."""
        query, key = (x[:, number : number + 1].to(device, torch.float32) for x in (self.query, self.key))
        return replace(self, query=query, key=key, key_mask=None if self.key_mask is None else self.key_mask.to(device))


@dataclass
class Recording:
    """Recorded calls by (step, counted from 0, and layer)."""

    steps: tuple[int, ...]
    layers: tuple[str, ...]
    max_bytes: int
    calls: dict[tuple[int, str], AttentionCall] = field(default_factory=dict)
    dense: dict[tuple[int, str, int], tuple[Tensor, Tensor]] = field(default_factory=dict)  # cached by `coverage`

    @property
    def n_bytes(self) -> int:
        return sum(call.n_bytes for call in self.calls.values())

    def thin(self, n_bytes: int) -> None:
        """Drop steps, then layers, evenly, if calls of `n_bytes` each would exceed `max_bytes`."""
        affordable = max(1, self.max_bytes // n_bytes)
        each = max(1, affordable // len(self.layers))
        self.steps = _spread(self.steps, min(each, len(self.steps)))
        self.layers = _spread(self.layers, min(affordable, len(self.layers)))


def _spread(items: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """At most `count` items, evenly spaced, including the first and the last; the first if `count` is 1."""
    if count >= len(items):
        return items
    return tuple(items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count))


def spread_steps(steps: int, most: int = 4) -> tuple[int, ...]:
    """At most `most` evenly spaced steps of `steps`, counted from 0."""
    return _spread(tuple(range(steps)), most)


@contextmanager
def record_calls(pipe: Any, steps: Collection[int], max_bytes: int = 1 << 29) -> Iterator[Recording]:
    """Record the attention calls of these steps inside the context; the pipeline's output does not change.

    For each step and layer, the first call is recorded (with guidance: the prompt's), and of its batch the last sample.
    """
    models = denoisers(pipe)
    with attention(pipe, _ALWAYS_DENSE):
        layers: dict[str, tuple[MechanismLayer, StepClock]] = {}
        for component, model in models.items():
            installation = installation_of(model)
            assert installation is not None
            for name, layer in installed_layers(model).items():
                label = f"{component}.{name}" if len(models) > 1 else name
                layers[label] = (layer, installation.steps.clock)
        recording = Recording(tuple(sorted(steps)), tuple(layers), max_bytes)
        handles = [
            layer.register_forward_pre_hook(partial(_record_call, recording, name, clock), with_kwargs=True)
            for name, (layer, clock) in layers.items()
        ]
        try:
            yield recording
        finally:
            for handle in handles:
                handle.remove()


def _record_call(
    recording: Recording, name: str, clock: StepClock, layer: MechanismLayer, args: Any, kwargs: Any
) -> None:
    if clock.step not in recording.steps or name not in recording.layers or (clock.step, name) in recording.calls:
        return
    given = _ARGUMENTS.bind(layer, *args, **kwargs).arguments
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    assert layer.slot.layout is not None
    key_mask = None if mask is None else key_padding(mask, query, key)[-1:].cpu()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)  # grouped queries
    query, key = (x[-1:].detach().to("cpu", copy=True).contiguous() for x in (query, key))
    call = AttentionCall(query, key, layer.slot.layout, given.get("scale"), key_mask)
    if not recording.calls:
        recording.thin(call.n_bytes)
    if name in recording.layers and recording.n_bytes + call.n_bytes <= recording.max_bytes:
        recording.calls[clock.step, name] = call


def _logits(call: AttentionCall, rows: Tensor) -> Tensor:
    """(rows, S) logits of one head; -inf on padding."""
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    logits = call.query[0, 0, rows] @ call.key[0, 0].mT * scale
    return logits if call.key_mask is None else logits.masked_fill(~call.key_mask, -torch.inf)


def dense_weights(call: AttentionCall, token: int) -> Tensor:
    """(S,) dense attention weights of one query token. ``call`` has one head."""
    return torch.softmax(_logits(call, torch.tensor([token], device=call.query.device))[0], -1)


def _attend(call: AttentionCall, processor: AcceleratedAttnProcessor, value: Tensor, **options: Any) -> Tensor:
    scale = options.pop("scale", call.scale)
    return processor.attend(
        call.query, call.key, value, call.layout, key_mask=call.key_mask, host_scale=scale, **options
    )


def mechanism_weights(
    call: AttentionCall, processor: AcceleratedAttnProcessor, token: int, scale: float | None = None
) -> Tensor:
    """(S,) attention weights of one query token under the mechanism.

    The weight of a pooled token is spread over the tokens that it pools. For SLA: the softmax part only.
    """
    processor = replace(processor, backend="torch")
    with torch.enable_grad():
        value = torch.zeros_like(call.key).requires_grad_()
        out = _attend(call, processor, value, scale=call.scale if scale is None else scale)
        one = torch.zeros_like(out)
        one[0, 0, token, 0] = 1
        (row,) = torch.autograd.grad(out, value, one)
    return row[0, 0, :, 0]


def _without_pooling(processor: AcceleratedAttnProcessor) -> AcceleratedAttnProcessor:
    """Return the processor without pooled tokens, at the host's scale, with the torch backend."""
    return replace(processor.without_pooled_tokens(), scale=None, backend="torch")


def attended_mask(call: AttentionCall, processor: AcceleratedAttnProcessor, token: int) -> Tensor:
    """(S,) bool: True on the keys that a query token attends to, pooled tokens excluded. ``call`` has one head."""
    return mechanism_weights(call, _without_pooling(processor), token, scale=0.0) > 0


def _partition_sum(call: AttentionCall, processor: AcceleratedAttnProcessor) -> Tensor:
    """(S,) Σ exp(logit) over the keys that each query attends to.

    Computed from the weight of one more global key with logit 0, which is 1 / (1 + Σ).
    """
    layout = replace(call.layout, after=call.layout.after + 1)
    query, key = (F.pad(x, (0, 0, 0, 1)) for x in (call.query, call.key))
    key_mask = None if call.key_mask is None else F.pad(call.key_mask, (0, 1), value=True)
    value = torch.zeros_like(key)
    value[:, :, -1, 0] = 1
    weight = _attend(replace(call, query=query, key=key, layout=layout, key_mask=key_mask), processor, value)[
        0, 0, :-1, 0
    ]
    return weight.reciprocal() - 1


@dataclass(frozen=True)
class Attended:
    """Attention of one query token in one layer, step and head.

    dense, weights, mask: over the grid tokens, (T, H, W) or (H, W).
    """

    dense: Tensor
    dense_global: float  # share of dense attention on global tokens
    weights: Tensor
    on_global: float  # share of the mechanism's attention on global tokens
    mask: Tensor
    coverage: float  # share of dense attention on the attended tokens, global tokens included
    pooled: float  # share of the mechanism's attention on pooled tokens


@torch.no_grad()
def attend(call: AttentionCall, processor: AcceleratedAttnProcessor, token: int) -> Attended:
    """Compare dense attention and the mechanism for one query token. ``call`` has one head.

    Raises: ValueError, TypeError: a mechanism that does not fit the layout.
    """
    dense, weights = dense_weights(call, token), mechanism_weights(call, processor, token)
    mask = attended_mask(call, processor, token)
    on_grid = (x[call.layout.grid_slice].view(call.layout.grid).cpu() for x in (dense, weights, mask))
    dense_grid, grid, mask_grid = on_grid
    return Attended(
        dense=dense_grid,
        dense_global=float(dense.sum()) - float(dense_grid.sum()),
        weights=grid,
        on_global=float(weights.sum()) - float(grid.sum()),
        mask=mask_grid,
        coverage=float(dense[mask].sum()),
        pooled=_pooled_share(call, processor, token),
    )


def _pooled_share(call: AttentionCall, processor: AcceleratedAttnProcessor, token: int) -> float:
    pools = getattr(processor, "enrich", False) or getattr(processor, "down_factor", 1) > 1
    if not pools or getattr(processor, "train_tokens", None) is not None:
        return 0.0
    whole = replace(processor, scale=None, backend="torch")
    return 1 - float(_partition_sum(call, _without_pooling(processor))[token] / _partition_sum(call, whole)[token])


@dataclass(frozen=True)
class Coverage:
    """Share of dense attention on the tokens that a mechanism attends to, mean over heads and sampled queries."""

    mass: float
    on_global: float  # part of the mass that lies on global tokens
    logits: float  # share of the logits that the mechanism computes
    n_queries: int
    n_grid_tokens: int


@torch.no_grad()
def coverage(
    recording: Recording, step: int, layer: str, processor: AcceleratedAttnProcessor, device: torch.device
) -> Coverage:
    """Share of dense attention that a mechanism covers in one layer.

    Pooled tokens are not counted. Global tokens, which are always attended to, are.
    """
    call = recording.calls[step, layer]
    layout, plain = call.layout, _without_pooling(processor)
    number = min(_MAX_SAMPLED_QUERIES, layout.grid_len)
    rows = layout.before + torch.arange(number, device=device) * layout.grid_len // number
    mass, on_global = [], []
    for head in range(call.n_heads):
        one = call.head(head, device)
        key = (step, layer, head)
        if key not in recording.dense:
            recording.dense[key] = _dense_mass(one, rows)
        total, global_share = (x.to(device) for x in recording.dense[key])
        mass.append((_partition_sum(one, plain)[rows].log() - total).exp())
        on_global.append(global_share)
    logits = processor.layer_logits(layout) / layout.seq_len**2
    mean_mass, mean_global = (float(torch.stack(x).mean()) for x in (mass, on_global))
    return Coverage(mean_mass, mean_global, logits, n_queries=number, n_grid_tokens=layout.grid_len)


def _dense_mass(call: AttentionCall, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of these queries over all tokens, and the share of dense attention on global tokens."""
    logits = _logits(call, rows)
    total = torch.logsumexp(logits, -1)
    grid = torch.logsumexp(logits[:, call.layout.grid_slice], -1)
    return total, 1 - (grid - total).exp()


@dataclass(frozen=True)
class BlockMap:
    """Block selection of one head.

    states: (query blocks, key blocks) of LEFT_OUT, LINEAR, CRITICAL. query_block: (N,) query block of each grid token.
    """

    states: Tensor
    query_block: Tensor


@torch.no_grad()
def block_map(call: AttentionCall, processor: AcceleratedAttnProcessor) -> BlockMap | None:
    """Key blocks that each query block selected. ``call`` has one head.

    None for windows, which select no blocks, and for more than 1,024 blocks per side.
    """
    tables = processor.for_layout(call.layout).block_tables(processor.grid_layout(call.layout))
    if tables is None or max(map(len, tables)) > _MAX_BLOCKS:
        return None
    query_block, key_block = (_block_of(table, call.layout.grid_len) for table in tables)
    first = call.layout.before + tables[0][:, 0]  # one token per query block: all of its tokens select the same blocks
    plain = _without_pooling(processor)
    chosen, linear = [], []
    dim = call.key.shape[-1]
    for start in range(0, len(tables[1]), dim):  # one key block per value column
        value = torch.zeros_like(call.key)
        own = F.one_hot((key_block - start).clamp(-1, dim) + 1, dim + 2)[:, 1:-1]
        value[0, 0, call.layout.grid_slice] = own.to(value.dtype)
        sparse = _attend(call, plain, value, scale=0.0)[0, 0, first]
        chosen.append(sparse > 0)
        identity = processor.identity_parameters(dim)
        if identity is not None:  # adds the linear part, with the identity as its projection
            parameters = {name: x.to(value) for name, x in identity.items()}
            both = _attend(call, plain, value, scale=0.0, parameters=parameters)
            linear.append(both[0, 0, first] > sparse)
    states = torch.cat(chosen, -1).int() * CRITICAL
    if linear:
        states = torch.maximum(states, torch.cat(linear, -1).int() * LINEAR)
    return BlockMap(states[:, : len(tables[1])].cpu(), query_block.cpu())


def _block_of(table: Tensor, n_tokens: int) -> Tensor:
    """(N,) block of each grid token."""
    block = torch.empty(n_tokens, dtype=torch.int64)
    valid = table >= 0
    block[table[valid]] = torch.arange(len(table))[:, None].expand(table.shape)[valid]
    return block
