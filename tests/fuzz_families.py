"""Models, processors, layouts and the expected attention of the random sequences in test_fuzz_sequences.py."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
from tiny import TEXT, TINY, Tiny, sd3_inputs
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dit_accel import CLEARAttnProcessor, GNAAttnProcessor, LLSAAttnProcessor, SLAAttnProcessor, TokenLayout


def sd3_single() -> nn.Module:
    """SD3 without dual attention layers, whose projections diffusers can fuse."""
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=12, out_channels=4,
        pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip


def pixart() -> nn.Module:
    """A class that dit_accel does not know."""
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        cross_attention_dim=16, patch_size=2, caption_channels=12, norm_num_groups=4, use_additional_conditions=False,
    )  # fmt: skip


def pixart_inputs(size: tuple[int, ...], batch: int = 2) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 2 * size[0], 2 * size[1]),
        "encoder_hidden_states": torch.randn(batch, TEXT, 12),
        "timestep": torch.full((batch,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


FAMILIES: dict[str, Tiny] = {
    **TINY,
    "sd3_single": Tiny(sd3_single, sd3_inputs, (7, 10), (10, 7), 3, None),
    "pixart": Tiny(pixart, pixart_inputs, (7, 10), (10, 7), 3, None),
}
UNETS = ("sd15", "sdxl")
UNKNOWN = ("pixart",)
FUSED_BY_PROCESSOR = ("sd15", "sdxl", "sd3_single", "pixart")  # fuse_qkv_projections sets other processors

# sizes of the forwards: the second has as many tokens as the first, the third fewer
_WAN_SIZES = ((2, 4, 5), (4, 2, 5), (1, 4, 5))
SIZES = dict.fromkeys(FAMILIES, ((5, 6), (6, 5), (3, 5)))
SIZES |= {"sd15": ((6, 10), (10, 6), (4, 6)), "wan": _WAN_SIZES, "wan_i2v": _WAN_SIZES, "wan_vace": _WAN_SIZES}

PROCESSORS = {
    # everything visible
    "gna_all": GNAAttnProcessor(window=1000),
    "clear_all": CLEARAttnProcessor(radius=1000.0),
    "llsa_all": LLSAAttnProcessor(topk=10**6, enrich=False),
    "sla_all": SLAAttnProcessor(critical=1.0, negligible=0.0),  # dense plus its bias
    # dense in eval mode, sparse in training
    "clear_late": CLEARAttnProcessor(radius=2.5, dense_steps=1000),
    "gna_large_grids": GNAAttnProcessor(window=3, min_tokens=10**6),
    # sparse
    "gna3": GNAAttnProcessor(window=3),
    "gna4_stride2": GNAAttnProcessor(window=4, stride=2),
    "clear2": CLEARAttnProcessor(radius=2.5),
}


def layout_at(family: str, kind: str, size: tuple[int, ...], tokens: int | None = None) -> TokenLayout:
    """The layout that a forward of this size has in a layer of ``tokens`` tokens, written by hand.

    Args:
        kind: "native"; "flat", the same tokens on one axis; "turned", the last two axes exchanged; "fixed", the native
            one of the first size whatever the forward's; "wrong", one that fits no forward.
    """
    if kind == "wrong":
        return TokenLayout((3, 3))
    if kind == "fixed":
        return layout_at(family, "native", SIZES[family][0], tokens)
    grid = size
    if family in UNETS and tokens is not None and tokens != math.prod(size):
        grid = tuple((n + 1) // 2 for n in size)
    if kind == "flat":
        grid = (math.prod(grid),)
    elif kind == "turned":
        grid = (*grid[:-2], grid[-1], grid[-2])
    joint = family.startswith("sd3") and tokens != math.prod(size)
    return TokenLayout(grid, before=TEXT if family == "flux" else 0, after=TEXT if joint else 0)


@dataclass(frozen=True)
class ByHand:
    """A layout function as a user would pass it: picklable, of the forward arguments by name."""

    family: str
    kind: str

    def __call__(self, model: nn.Module, arguments: Any) -> TokenLayout:
        if self.family == "flux":
            size = tuple(int(n) + 1 for n in arguments["img_ids"][-1, 1:])
        else:
            height, width = arguments["hidden_states"].shape[-2:]
            size = (*arguments["hidden_states"].shape[2:-2], height // 2, width // 2)
        return layout_at(self.family, self.kind, size)


def layout_argument(family: str, kind: str | None) -> Any:
    """What is passed as ``layout=`` for a kind: a function or, for "fixed" and "wrong", a ``TokenLayout``; or None."""
    if kind in ("fixed", "wrong"):
        return layout_at(family, kind, SIZES[family][0])
    return None if kind is None else ByHand(family, kind)


def _inputs(family: str, size: tuple[int, ...]) -> dict[str, Any]:
    torch.manual_seed(hash(size) % 1000)
    return in_dtype(FAMILIES[family].inputs(size, batch=1), torch.float64)


inputs_of = functools.cache(_inputs)


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Copies of tensors and dicts (some hosts change their arguments' dicts), floating-point ones in this dtype."""
    if isinstance(value, dict):
        return {key: in_dtype(item, dtype) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()


def native_layers(model: nn.Module) -> list[str]:
    """Names of the self-attention modules, distinguished by the width of their keys' input alone."""
    names = []
    for name, module in model.named_modules():
        if hasattr(module, "to_q") and name.endswith((".attn", ".attn1", ".attn2")):
            cross = name.endswith(".attn2") and not hasattr(model, "context_embedder")
            names += [] if cross else [name]
    return names


def _gna_axis(length: int, window: int, stride: int) -> Tensor:
    window, stride = min(window, length), min(stride, length)
    seen = torch.zeros(length, length, dtype=torch.bool)
    left, right = window // 2, window // 2 + (window % 2 - 1)
    for x in range(length):
        leader = min(x // stride * stride + stride // 2, length - 1)
        centre = min(max(leader, left), length - 1 - right)
        seen[x, centre - left : centre + right + 1] = True
    return seen


@functools.cache
def mask_of(processor: str, layout: TokenLayout) -> Tensor | None:
    """(S, S) bool: keys that each query sees; None where it sees all."""
    if processor.endswith("_all"):
        return None
    options = PROCESSORS[processor]
    places = torch.cartesian_prod(*(torch.arange(n) for n in layout.grid)).reshape(layout.grid_len, -1)
    if isinstance(options, GNAAttnProcessor):
        seen = torch.ones(layout.grid_len, layout.grid_len, dtype=torch.bool)
        for axis, length in enumerate(layout.grid):
            x = places[:, axis]
            seen &= _gna_axis(length, options.window, options.stride)[x][:, x]
    else:
        seen = (places[:, None] - places[None]).square().sum(-1) < options.radius**2
    mask = torch.ones(layout.seq_len, layout.seq_len, dtype=torch.bool)
    mask[layout.grid_slice, layout.grid_slice] = seen
    return mask


@dataclass(eq=False)
class Installed:
    """What should be on one layer. Compared by identity: a context brings back the very layer."""

    processor: str
    kind: str | None  # of the layout given by hand
    bias: Tensor | None = None

    def is_dense(self, training: bool) -> bool:
        return self.processor == "gna_large_grids" or (self.processor == "clear_late" and not training)


class WrongLayout(Exception):
    """The layout of an installed layer has another length than its sequence: the forward must be refused."""


class ExpectedAttention(TorchFunctionMode):
    """Runs a model that was never installed on as if it were: the softmax of each layer under its boolean mask.

    The layer in progress is known by hooks on the attention modules; only its first softmax call is replaced.
    """

    def __init__(self, family: str, model: nn.Module) -> None:
        super().__init__()
        self.family, self.model = family, model
        self.spec: dict[str, Installed] = {}
        self.size: tuple[int, ...] = ()
        self.layer: str | None = None
        for name in native_layers(model):
            module = model.get_submodule(name)
            module.register_forward_pre_hook(functools.partial(self._enter, name))
            module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, name: str, *_: Any) -> None:
        self.layer = name

    def _leave(self, *_: Any) -> None:
        self.layer = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and self.layer is not None:
            installed, self.layer = self.spec.get(self.layer), None
            if installed is not None and not installed.is_dense(self.model.training):
                return self._masked(installed, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _masked(
        self, installed: Installed, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert attn_mask is None and not dropout_p and not is_causal
        tokens = query.shape[2] if installed.kind is None else None
        layout = layout_at(self.family, installed.kind or "native", self.size, tokens)
        if layout.seq_len != query.shape[2]:
            raise WrongLayout
        logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        mask = mask_of(installed.processor, layout)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        out = logits.softmax(-1) @ value
        if installed.bias is not None:
            grid = torch.zeros(layout.seq_len, 1, dtype=out.dtype)
            grid[layout.grid_slice] = 1
            out = out + grid * installed.bias.to(out.dtype)
        return out
