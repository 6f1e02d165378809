"""What one place of a picture attends to: dense, and under a mechanism, read off the library's own functions.

A recording holds query and key of every self-attention layer while a pipeline draws densely. Of a mechanism only its
attention function is asked, never its inside. Its output is linear in the values, so that the derivative of one query's
output with respect to them is that query's row of weights. With a factor of 0 on the logits all weights over what is
seen are equal: whatever then has a weight is seen.
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

from dit_accel.hooks import StepClock
from dit_accel.install import attention, denoisers, installation_of, installed_layers
from dit_accel.intercept import MechanismLayer, key_padding
from dit_accel.layout import TokenLayout
from dit_accel.mechanisms._boxes import box_blocks, box_shape
from dit_accel.mechanisms._tree import default_levels, make_tree
from dit_accel.processor import AcceleratedAttnProcessor, CLEARAttnProcessor, LLSAAttnProcessor, SLAAttnProcessor

__all__ = [
    "CRITICAL",
    "LEFT_OUT",
    "LINEAR",
    "Attended",
    "AttentionCall",
    "BlockMap",
    "Caught",
    "Recording",
    "attend",
    "block_map",
    "caught",
    "dense_weights",
    "mechanism_weights",
    "recording",
    "spread_steps",
    "visible",
]

_WATCHED = CLEARAttnProcessor(radius=1, dense_steps=sys.maxsize)  # never computed: every step stays dense
_ARGUMENTS = inspect.signature(MechanismLayer.forward)
_SAMPLED = 1024  # queries a layer that the caught mass is averaged over, at most
_MOST_BLOCKS = 1024  # a side of a map that can still be read
LEFT_OUT, LINEAR, CRITICAL = 0, 1, 2


@dataclass(frozen=True)
class AttentionCall:
    """One layer's softmax call at one step, of one sample. query, key: (1, H, S, D); real: (1, S), False on padding."""

    query: Tensor
    key: Tensor
    layout: TokenLayout
    scale: float | None
    real: Tensor | None

    @property
    def n_heads(self) -> int:
        return self.query.shape[1]

    @property
    def n_bytes(self) -> int:
        return self.query.nbytes + self.key.nbytes

    def head(self, number: int, device: torch.device | None = None) -> AttentionCall:
        """One head of it, in float32."""
        query, key = (x[:, number : number + 1].to(device, torch.float32) for x in (self.query, self.key))
        return replace(self, query=query, key=key, real=None if self.real is None else self.real.to(device))


@dataclass
class Recording:
    """Calls by (step from 0, layer)."""

    steps: tuple[int, ...]
    layers: tuple[str, ...]
    most_bytes: int
    calls: dict[tuple[int, str], AttentionCall] = field(default_factory=dict)
    dense: dict[tuple[int, str, int], tuple[Tensor, Tensor]] = field(default_factory=dict)  # what `caught` needs anew

    @property
    def n_bytes(self) -> int:
        return sum(call.n_bytes for call in self.calls.values())

    def thin(self, n_bytes: int) -> None:
        """Leave out steps, then layers, evenly, if calls of this size would take too much memory."""
        affordable = max(1, self.most_bytes // n_bytes)
        each = max(1, affordable // len(self.layers))
        self.steps = _spread(self.steps, min(each, len(self.steps)))
        self.layers = _spread(self.layers, min(affordable, len(self.layers)))


def _spread(items: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """So many of the items, evenly, the first and the last among them; the first, if one."""
    if count >= len(items):
        return items
    return tuple(items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count))


def spread_steps(steps: int, most: int = 4) -> tuple[int, ...]:
    """The steps, from 0, that are kept of a drawing of so many."""
    return _spread(tuple(range(steps)), most)


@contextmanager
def recording(pipe: Any, steps: Collection[int], most_bytes: int = 1 << 29) -> Iterator[Recording]:
    """Inside, the pipeline draws as it always does, and the calls of these steps are kept.

    Of a step's calls of a layer the first is kept (with guidance that is the prompt's), and the last of its batch.
    """
    models = denoisers(pipe)
    with attention(pipe, _WATCHED):
        layers: dict[str, tuple[MechanismLayer, StepClock]] = {}
        for component, model in models.items():
            installation = installation_of(model)
            assert installation is not None
            for name, layer in installed_layers(model).items():
                label = f"{component}.{name}" if len(models) > 1 else name
                layers[label] = (layer, installation.steps.clock)
        kept = Recording(tuple(sorted(steps)), tuple(layers), most_bytes)
        handles = [
            layer.register_forward_pre_hook(partial(_keep, kept, name, clock), with_kwargs=True)
            for name, (layer, clock) in layers.items()
        ]
        try:
            yield kept
        finally:
            for handle in handles:
                handle.remove()


def _keep(kept: Recording, name: str, clock: StepClock, layer: MechanismLayer, args: Any, kwargs: Any) -> None:
    if clock.step not in kept.steps or name not in kept.layers or (clock.step, name) in kept.calls:
        return
    given = _ARGUMENTS.bind(layer, *args, **kwargs).arguments
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    assert layer.slot.layout is not None
    real = None if mask is None else key_padding(mask, query, key)[-1:].cpu()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)  # grouped queries
    query, key = (x[-1:].detach().to("cpu", copy=True).contiguous() for x in (query, key))
    call = AttentionCall(query, key, layer.slot.layout, given.get("scale"), real)
    if not kept.calls:
        kept.thin(call.n_bytes)
    if name in kept.layers and kept.n_bytes + call.n_bytes <= kept.most_bytes:
        kept.calls[clock.step, name] = call


def _logits(call: AttentionCall, rows: Tensor) -> Tensor:
    """(rows, S) of one head; -inf on padding."""
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    logits = call.query[0, 0, rows] @ call.key[0, 0].mT * scale
    return logits if call.real is None else logits.masked_fill(~call.real, -torch.inf)


def dense_weights(call: AttentionCall, token: int) -> Tensor:
    """(S,) with which a token attends to all, under dense attention. ``call``: of one head."""
    return torch.softmax(_logits(call, torch.tensor([token], device=call.query.device))[0], -1)


def _function(call: AttentionCall, processor: AcceleratedAttnProcessor, value: Tensor, **options: Any) -> Tensor:
    scale = options.pop("scale", call.scale)
    return processor.attend(call.query, call.key, value, call.layout, key_mask=call.real, host_scale=scale, **options)


def mechanism_weights(
    call: AttentionCall, processor: AcceleratedAttnProcessor, token: int, scale: float | None = None
) -> Tensor:
    """(S,) with which a token attends to all under the mechanism; pooled tokens' lie on the tokens they stand for.

    Of SLA the softmax part.
    """
    processor = replace(processor, backend="torch")
    with torch.enable_grad():
        value = torch.zeros_like(call.key).requires_grad_()
        out = _function(call, processor, value, scale=call.scale if scale is None else scale)
        one = torch.zeros_like(out)
        one[0, 0, token, 0] = 1
        (row,) = torch.autograd.grad(out, value, one)
    return row[0, 0, :, 0]


def _plain(processor: AcceleratedAttnProcessor) -> AcceleratedAttnProcessor:
    """The mechanism without pooled tokens, at the host's scale, in plain torch."""
    changes: dict[str, Any] = {"scale": None, "backend": "torch"}
    if isinstance(processor, CLEARAttnProcessor):
        changes |= {"down_factor": 1, "train_tokens": None}
    elif isinstance(processor, LLSAAttnProcessor):
        changes["enrich"] = False
    return replace(processor, **changes)


def visible(call: AttentionCall, processor: AcceleratedAttnProcessor, token: int) -> Tensor:
    """(S,) bool: which tokens themselves, not pooled with others, a token attends to. ``call``: of one head."""
    return mechanism_weights(call, _plain(processor), token, scale=0.0) > 0


def _partition(call: AttentionCall, processor: AcceleratedAttnProcessor) -> Tensor:
    """(S,) Σ exp(logit) over what each token sees: one more global key, of logit 0, has the weight 1 / (1 + Σ)."""
    layout = replace(call.layout, after=call.layout.after + 1)
    query, key = (F.pad(x, (0, 0, 0, 1)) for x in (call.query, call.key))
    real = None if call.real is None else F.pad(call.real, (0, 1), value=True)
    value = torch.zeros_like(key)
    value[:, :, -1, 0] = 1
    weight = _function(replace(call, query=query, key=key, layout=layout, real=real), processor, value)[0, 0, :-1, 0]
    return weight.reciprocal() - 1


@dataclass(frozen=True)
class Attended:
    """What one place attends to in one layer, step and head. dense, weights, seen: on the grid, (T, H, W) or (H, W)."""

    dense: Tensor
    dense_text: float  # the share of dense attention on tokens off the grid
    weights: Tensor
    text: float  # and of the mechanism's
    seen: Tensor
    caught: float  # the share of dense attention on what is seen, text included
    pooled: float  # the share of the mechanism's on pooled tokens


@torch.no_grad()
def attend(call: AttentionCall, processor: AcceleratedAttnProcessor, token: int) -> Attended:
    """``call``: of one head.

    Raises: ValueError, TypeError: a mechanism that does not fit the layout.
    """
    dense, weights = dense_weights(call, token), mechanism_weights(call, processor, token)
    seen = visible(call, processor, token)
    on_grid = (x[call.layout.grid_slice].view(call.layout.grid).cpu() for x in (dense, weights, seen))
    dense_grid, grid, seen_grid = on_grid
    return Attended(
        dense=dense_grid,
        dense_text=float(dense.sum()) - float(dense_grid.sum()),
        weights=grid,
        text=float(weights.sum()) - float(grid.sum()),
        seen=seen_grid,
        caught=float(dense[seen].sum()),
        pooled=_pooled_share(call, processor, token),
    )


def _pooled_share(call: AttentionCall, processor: AcceleratedAttnProcessor, token: int) -> float:
    pools = getattr(processor, "enrich", False) or getattr(processor, "down_factor", 1) > 1
    if not pools or getattr(processor, "train_tokens", None) is not None:
        return 0.0
    whole = replace(processor, scale=None, backend="torch")
    return 1 - float(_partition(call, _plain(processor))[token] / _partition(call, whole)[token])


@dataclass(frozen=True)
class Caught:
    """Shares of dense attention, mean over heads and sampled places: on what the mechanism sees, and on text alone."""

    mass: float
    text: float
    logits: float  # the share of the logits that the mechanism computes
    places: int
    all_places: int


@torch.no_grad()
def caught(kept: Recording, step: int, layer: str, processor: AcceleratedAttnProcessor, device: torch.device) -> Caught:
    """How much of dense attention a mechanism sees in a layer. Pooled tokens, which stand for what is not seen, are not
    counted; text, which is always seen, is."""
    call = kept.calls[step, layer]
    layout, plain = call.layout, _plain(processor)
    number = min(_SAMPLED, layout.grid_len)
    rows = layout.before + torch.arange(number, device=device) * layout.grid_len // number
    mass, text = [], []
    for head in range(call.n_heads):
        one = call.head(head, device)
        key = (step, layer, head)
        if key not in kept.dense:
            kept.dense[key] = _dense_mass(one, rows)
        total, on_text = (x.to(device) for x in kept.dense[key])
        mass.append((_partition(one, plain)[rows].log() - total).exp())
        text.append(on_text)
    grid = processor.grid_layout(layout)
    options = processor.mechanism.fit(grid, **processor.layer_options(layout))
    logits = processor.mechanism.count_logits(grid, **options) / layout.seq_len**2
    mean_mass, mean_text = (float(torch.stack(x).mean()) for x in (mass, text))
    return Caught(mean_mass, mean_text, logits, places=number, all_places=layout.grid_len)


def _dense_mass(call: AttentionCall, rows: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ exp(logit) of these queries over all tokens, and the share of those off the grid."""
    logits = _logits(call, rows)
    total = torch.logsumexp(logits, -1)
    grid = torch.logsumexp(logits[:, call.layout.grid_slice], -1)
    return total, 1 - (grid - total).exp()


@dataclass(frozen=True)
class BlockMap:
    """states: (query blocks, key blocks) of LEFT_OUT, LINEAR, CRITICAL; query_block: (N,) the block of each place."""

    states: Tensor
    query_block: Tensor


@torch.no_grad()
def block_map(call: AttentionCall, processor: AcceleratedAttnProcessor) -> BlockMap | None:
    """Which key blocks each query block chose. None for windows, which choose nothing, and for more blocks than can be
    shown. ``call``: of one head."""
    tables = _tables(call.layout, processor)
    if tables is None or max(map(len, tables)) > _MOST_BLOCKS:
        return None
    query_block, key_block = (_block_of(table, call.layout.grid_len) for table in tables)
    first = call.layout.before + tables[0][:, 0]  # a token of each query block stands for it
    plain = _plain(processor)
    chosen, linear = [], []
    dim = call.key.shape[-1]
    for start in range(0, len(tables[1]), dim):  # so many key blocks at once as values have columns
        value = torch.zeros_like(call.key)
        own = F.one_hot((key_block - start).clamp(-1, dim) + 1, dim + 2)[:, 1:-1]
        value[0, 0, call.layout.grid_slice] = own.to(value.dtype)
        sparse = _function(call, plain, value, scale=0.0)[0, 0, first]
        chosen.append(sparse > 0)
        if isinstance(processor, SLAAttnProcessor):  # with the identity as its projection the linear part is added
            both = _function(call, plain, value, scale=0.0, parameters={"weight": torch.eye(dim).to(value)})
            linear.append(both[0, 0, first] > sparse)
    states = torch.cat(chosen, -1).int() * CRITICAL
    if linear:
        states = torch.maximum(states, torch.cat(linear, -1).int() * LINEAR)
    return BlockMap(states[:, : len(tables[1])].cpu(), query_block.cpu())


def _tables(layout: TokenLayout, processor: AcceleratedAttnProcessor) -> tuple[Tensor, Tensor] | None:
    """(M, block) places of each query block and of each key block, -1 where one is short."""
    layout = processor.grid_layout(layout)
    options = processor.mechanism.fit(layout, **processor.layer_options(layout))
    cpu = torch.device("cpu")
    if isinstance(processor, LLSAAttnProcessor):
        size, levels = options["block_size"], options["levels"]
        levels = levels or default_levels(layout.grid, size, options["topk"])
        blocks = make_tree(layout.grid, size, levels, cpu)[0].children
        return blocks, blocks
    if not isinstance(processor, SLAAttnProcessor):
        return None
    sizes = (options["block_q"], options["block_kv"])
    if options["tile_order"]:
        pair = [box_blocks(layout.grid, box_shape(size, layout.grid), cpu)[0] for size in sizes]
    else:
        pair = [box_blocks((layout.grid_len,), (size,), cpu)[0] for size in sizes]
    return pair[0], pair[1]


def _block_of(table: Tensor, places: int) -> Tensor:
    """(N,) the block that each place is in."""
    block = torch.empty(places, dtype=torch.int64)
    filled = table >= 0
    block[table[filled]] = torch.arange(len(table))[:, None].expand(table.shape)[filled]
    return block
