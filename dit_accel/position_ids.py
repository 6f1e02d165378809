"""Grids read off position ids, as Flux-like models pass them, without a device synchronisation per step."""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

__all__ = ["raster_grids", "raster_width"]

_SEEN: dict[int, tuple[weakref.ref[Tensor], int, list[tuple[int, int]]]] = {}


def raster_grids(ids: Tensor) -> list[tuple[int, int]]:
    """Grids (H, W) of the images whose tokens follow one another row by row.

    Reading the ids waits for the GPU, so the answer is kept for as long as the tensor lives unchanged. Tensors made
    under ``torch.inference_mode()`` do not count their changes: their ids are read at every call.

    Args:
        ids: (N, 3) of any dtype: image index, row, column. Rows and columns may be rounded (bfloat16 above 256).

    Raises: ValueError: ids that are not whole images in row-major order.
    """
    if ids.is_inference():
        return _read(ids.to("cpu", torch.float64))
    seen = _SEEN.get(id(ids))
    if seen is not None and seen[0]() is ids and seen[1] == ids._version:
        return seen[2]
    grids = _read(ids.detach().to("cpu", torch.float64))
    key = id(ids)
    _SEEN[key] = (weakref.ref(ids, lambda _: _SEEN.pop(key, None)), ids._version, grids)
    return grids


def _read(ids: Tensor) -> list[tuple[int, int]]:
    if ids.ndim != 2 or ids.shape[1] != 3 or ids.shape[0] == 0:
        raise ValueError(f"position ids must be (N, 3) with N > 0, got {tuple(ids.shape)}")
    starts = [0, *((ids[1:, 0] != ids[:-1, 0]).nonzero().flatten() + 1).tolist(), ids.shape[0]]
    return [_grid(ids[start:stop, 1:]) for start, stop in itertools.pairwise(starts)]


def _grid(places: Tensor) -> tuple[int, int]:
    """(H, W) of one image from the (row, column) of its tokens; the first row is exact in every dtype."""
    count = places.shape[0]
    width = int((places[:, 0] == places[0, 0]).sum())
    height = count // width
    raster = places[: height * width].reshape(height, width, 2)
    regular = (
        height * width == count
        and bool((raster[:, :, 0] == raster[:, :1, 0]).all())
        and bool((raster[:, :, 1] == raster[:1, :, 1]).all())
        and bool((raster.diff(dim=0)[..., 0] >= 0).all() and (raster.diff(dim=1)[..., 1] >= 0).all())
    )
    if not regular:
        raise ValueError(
            f"the {count} position ids do not describe a whole image in row-major order; "
            "pass the layout by hand: dit_accel.set_attn_processor(model, processor, layout=TokenLayout(...))"
        )
    return height, width


@torch.library.custom_op("dit_accel::raster_width", mutates_args=())
def raster_width(ids: Tensor) -> tuple[int, int]:
    """(H, W) of the first image in position ids (N, 3): :func:`raster_grids` as an operator, for compiled graphs."""
    return raster_grids(ids)[0]


@raster_width.register_fake
def _(ids: Tensor) -> tuple[int, int]:
    context = torch.library.get_ctx()
    return context.new_dynamic_size(min=0), context.new_dynamic_size(min=0)  # type: ignore[return-value]
