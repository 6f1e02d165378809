"""Draw the mask of each mechanism into docs/images, from the library's reference implementations.

    python docs/tools/draw_masks.py

A reference returns ``weights @ value``. With ``value = I`` (head dim = number of tokens) it returns the attention
weights themselves, so each picture shows what the reference computes. SLA and LLSA choose blocks from the data: their
queries and keys are fixed smooth features of the token's place. Every file stays under 60 KiB.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.mechanisms import clear, gna, linfusion, llsa, sla

IMAGES = Path(__file__).resolve().parents[1] / "images"
MOST_BYTES = 60 * 1024
SIDE, TEXT = 16, 16
GRID = TokenLayout((SIDE, SIDE), before=TEXT)
PLACES = ((7, 8), (1, 13))  # query tokens whose keys are shown on the grid
NOT_SEEN, EXACT, LINEAR, POOLED = range(4)
COLOURS = ("#eef0f4", "#3949ab", "#ffb74d", "#26a69a")
NAMES = ("not computed", "softmax over tokens", "linear attention", "pooled tokens")


def features(layout: TokenLayout) -> Tensor:
    """(1, 1, S, S) smooth features of the token's place, the same for queries and keys; the rest is zero."""
    torch.manual_seed(4)
    ys, xs = torch.meshgrid(*(torch.linspace(0, 1, n) for n in layout.grid), indexing="ij")
    place = torch.stack([ys, xs], -1).flatten(0, 1)
    waves = torch.cos(place @ torch.randn(2, 48) * 5 + torch.rand(48) * 6.28)
    out = torch.zeros(1, 1, layout.seq_len, layout.seq_len)
    out[0, 0, layout.grid_slice, :48] = waves
    return out


def identity(layout: TokenLayout) -> Tensor:
    return torch.eye(layout.seq_len)[None, None]


def draw_clear() -> None:
    zero, eye = torch.zeros_like(identity(GRID)), identity(GRID)
    weights = clear.reference(zero, zero, eye, GRID, radius=4)[0, 0]
    draw("clear", (weights > 0).int() * EXACT)


def draw_gna() -> None:
    zero, eye = torch.zeros_like(identity(GRID)), identity(GRID)
    weights = gna.reference(zero, zero, eye, GRID, window=8, stride=4)[0, 0]
    draw("gna", (weights > 0).int() * EXACT)


def draw_sla() -> None:
    """The linear part is what an identity projection adds to the softmax."""
    x, eye = features(GRID), identity(GRID)
    options = {"critical": 0.15, "negligible": 0.25, "block_q": 16, "block_kv": 16, "tile_order": True}
    exact = sla.reference(x, x, eye, GRID, **options)[0, 0]
    both = sla.reference(x, x, eye, GRID, weight=eye[0, 0], **options)[0, 0]
    kinds = ((both - exact).abs() > 1e-9).int() * LINEAR
    draw("sla", torch.where(exact > 0, EXACT, kinds))


def draw_llsa() -> None:
    """Pooled tokens are shown at the tokens that they stand for."""
    x, eye = features(GRID), identity(GRID)
    options = {"block_size": 4, "topk": 3, "levels": 2}
    fine = llsa.reference(x, x, eye, GRID, enrich=False, **options)[0, 0]
    both = llsa.reference(x, x, eye, GRID, **options)[0, 0]
    draw("llsa", torch.where(fine > 0, EXACT, (both > 0).int() * POOLED))


def draw_linfusion() -> None:
    layout = TokenLayout((SIDE, SIDE))  # without text: it is for U-Nets
    weights = linfusion.reference(features(layout), features(layout), identity(layout), layout)[0, 0]
    draw("linfusion", (weights > 0).int() * LINEAR, layout)


def draw(name: str, kinds: Tensor, layout: TokenLayout = GRID) -> None:
    """Left and middle: the keys of one query on the grid. Right: the whole mask, in order of the sequence."""
    figure = Figure(figsize=(10.2, 3.9), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.12))
    colours, limits = ListedColormap(COLOURS), {"vmin": -0.5, "vmax": len(COLOURS) - 0.5, "interpolation": "nearest"}
    for ax, (y, x) in zip(axes, PLACES, strict=False):
        row = kinds[layout.token((y, x)), layout.grid_slice].reshape(layout.grid)
        ax.imshow(row.numpy(), cmap=colours, **limits)
        ax.set_xticks(torch.arange(0.5, SIDE).tolist(), []), ax.set_yticks(torch.arange(0.5, SIDE).tolist(), [])
        ax.grid(color="white", linewidth=0.8)
        ax.tick_params(length=0)
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#d50000", linewidth=2.4))
        ax.set_title(f"keys of the query at row {y}, column {x}", fontsize=10)
    axes[2].imshow(kinds.numpy(), cmap=colours, **limits)
    axes[2].set_xticks([]), axes[2].set_yticks([])
    axes[2].set_xlabel("key tokens", fontsize=9), axes[2].set_ylabel("query tokens", fontsize=9)
    text = f"{TEXT} text tokens, then " if layout.before else ""
    axes[2].set_title(f"mask: {text}{SIDE}×{SIDE} tokens", fontsize=10)
    for ax in axes:
        for spine in ax.spines.values():
            spine.set_visible(False)
    there = sorted(set(kinds.flatten().tolist()))
    handles = [Patch(facecolor=COLOURS[kind], label=NAMES[kind], edgecolor="#9e9e9e", linewidth=0.5) for kind in there]
    handles.append(Patch(facecolor="white", edgecolor="#d50000", linewidth=2, label="query"))
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=10)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.92, bottom=0.13, wspace=0.1)
    save(figure, IMAGES / f"mask-{name}.png")


def save(figure: Figure, path: Path) -> None:
    """As a PNG with a palette. Raises: ValueError: a file that is too large."""
    raw = io.BytesIO()
    figure.savefig(raw, format="png", facecolor="white")
    picture = Image.open(raw).convert("RGB").quantize(48, dither=Image.Dither.NONE)
    path.parent.mkdir(exist_ok=True)
    picture.save(path, optimize=True)
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, expected at most {MOST_BYTES:,}")
    print(path, f"{path.stat().st_size:,} bytes")


def main() -> int:
    for draw_one in (draw_sla, draw_clear, draw_llsa, draw_gna, draw_linfusion):
        draw_one()
    return 0


if __name__ == "__main__":
    sys.exit(main())
