"""Grids from the position ids of Flux-like models, cached to avoid a device synchronisation per step."""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

__all__ = ["first_raster_grid", "raster_grids"]

_CACHE: dict[int, tuple[weakref.ref[Tensor], int, list[tuple[int, int]]]] = {}


def raster_grids(ids: Tensor) -> list[tuple[int, int]]:
    """Return the grids (H, W) of consecutive images with tokens in row-major order.

    Reading the ids synchronises with the GPU, so the result is cached until the tensor is changed or freed. Tensors
    created under ``torch.inference_mode()`` have no version counter: their ids are read in each call.

    Args:
        ids: (N, 3) of any dtype: image index, row, column. Rows and columns may be rounded (bfloat16 above 256).

    Raises: ValueError: ids that are not complete images in row-major order.
    """
    if ids.is_inference():
        return _read_grids(ids.to("cpu", torch.float64))
    cached = _CACHE.get(id(ids))
    if cached is not None and cached[0]() is ids and cached[1] == ids._version:
        return cached[2]
    grids = _read_grids(ids.detach().to("cpu", torch.float64))
    key = id(ids)
    _CACHE[key] = (weakref.ref(ids, lambda _: _CACHE.pop(key, None)), ids._version, grids)
    return grids


def _read_grids(ids: Tensor) -> list[tuple[int, int]]:
    if ids.ndim != 2 or ids.shape[1] != 3 or ids.shape[0] == 0:
        raise ValueError(f"position ids must be (N, 3) with N > 0, got {tuple(ids.shape)}")
    starts = [0, *((ids[1:, 0] != ids[:-1, 0]).nonzero().flatten() + 1).tolist(), ids.shape[0]]
    return [_grid(ids[start:stop, 1:]) for start, stop in itertools.pairwise(starts)]


def _grid(coordinates: Tensor) -> tuple[int, int]:
    """Return (H, W) of one image from the (row, column) of its tokens; the first row is exact in every dtype."""
    count = coordinates.shape[0]
    width = int((coordinates[:, 0] == coordinates[0, 0]).sum())
    height = count // width
    raster = coordinates[: height * width].reshape(height, width, 2)
    regular = (
        height * width == count
        and bool((raster[:, :, 0] == raster[:, :1, 0]).all())
        and bool((raster[:, :, 1] == raster[:1, :, 1]).all())
        and bool((raster.diff(dim=0)[..., 0] >= 0).all() and (raster.diff(dim=1)[..., 1] >= 0).all())
    )
    if not regular:
        raise ValueError(
            f"expected the {count} position ids to be a complete image in row-major order; for another order "
            "pass a layout: dit_accel.set_attn_processor(model, processor, layout=TokenLayout(...))"
        )
    return height, width


@torch.library.custom_op("dit_accel::first_raster_grid", mutates_args=())
def first_raster_grid(ids: Tensor) -> tuple[int, int]:
    """Return (H, W) of the first image in position ids (N, 3); the operator form of :func:`raster_grids`."""
    return raster_grids(ids)[0]


@first_raster_grid.register_fake
def _(ids: Tensor) -> tuple[int, int]:
    context = torch.library.get_ctx()
    return context.new_dynamic_size(min=0), context.new_dynamic_size(min=0)  # type: ignore[return-value]
