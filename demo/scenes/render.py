"""Renderer of scenes as pictures and clips: vectorised torch, anti-aliased, any device, any size.

`layout_scene` samples what a caption leaves open (position within the cell, rotation, shade, speed) as one row of
numbers per object. `render` turns a batch of such rows into pixels. Nothing is read from disk.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import torch

from dit_accel.demo.scenes.scene import LANE_MOTIONS, MAX_OBJECTS, PLACES, SHAPES, TEXTURES, Scene, Thing

# columns of an object's row; positions and radius are fractions of the side, velocities fractions per clip
X, Y, RADIUS, ROTATION, SHAPE, TEXTURE, ANGLE, PRESENT, VX, VY, RED, DARK_RED = 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13
FIELDS = 16
IMAGE_SIZE, CLIP_SIZE, CLIP_FRAMES = 512, 256, 25  # pixels per side and frames of the embedded pipelines
IMAGE_RADIUS = {"small": 0.11, "medium": 0.14, "large": 0.165}
CLIP_RADIUS = {"small": 0.155, "medium": 0.19, "large": 0.225}
LANES = {"top": 0.26, "bottom": 0.74, "left": 0.26, "right": 0.74}
LANE_SHRINKS = 0.8  # lanes off the middle have less room, and two objects pass each other
COPIES_RADIUS = {2: 0.12, 3: 0.115, 4: 0.085}
PALETTE = {
    "red": (0.90, 0.08, 0.08),
    "orange": (1.00, 0.52, 0.00),
    "yellow": (0.98, 0.92, 0.10),
    "green": (0.08, 0.66, 0.14),
    "cyan": (0.10, 0.85, 0.90),
    "blue": (0.10, 0.22, 0.92),
    "purple": (0.62, 0.12, 0.80),
    "white": (0.97, 0.97, 0.97),
    "black": (0.04, 0.04, 0.04),
    "gray": (0.50, 0.50, 0.50),
}
DARKER = 0.55
TURN, CLIP_TURN = 0.35, 0.12  # maximum rotation in radians
MOTION_VECTORS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}


def second_colour(name: str) -> tuple[float, float, float]:
    """Second colour of a textured object: a darker shade, or a lighter one for black."""
    if name == "black":
        return (0.27, 0.27, 0.27)
    factor = 0.74 if name == "white" else DARKER
    red, green, blue = PALETTE[name]
    return (red * factor, green * factor, blue * factor)


def layout_scene(scene: Scene, rng: random.Random) -> tuple[list[list[float]], list[float]]:
    """Sample one row of FIELDS numbers per object (MAX_OBJECTS rows, absent ones zero) and the background's RGB."""
    if scene.is_clip:
        rows = [_lay_out_moving(thing, rng) for thing in _in_lanes(scene, rng)]
    elif scene.count > 1:
        rows = _lay_out_copies(scene, rng)
    else:
        rows = [_lay_out_placed(thing, rng) for thing in scene.things]
    rows += [[0.0] * FIELDS for _ in range(MAX_OBJECTS - len(rows))]
    return rows, list(_vary(PALETTE[scene.background], rng, 0.03))


def _row(
    thing: Thing,
    x: float,
    y: float,
    radius: float,
    rng: random.Random,
    velocity: tuple[float, float] = (0.0, 0.0),
    turn: float = TURN,
) -> list[float]:
    shade = 1 + rng.uniform(-0.06, 0.06)
    colours = [min(1.0, c * shade) for c in (*PALETTE[thing.colour], *second_colour(thing.colour))]
    rotation = rng.uniform(-turn, turn)
    head = [x, y, radius * rng.uniform(0.94, 1.06), rotation, SHAPES.index(thing.shape), TEXTURES.index(thing.texture)]
    return [*map(float, head), rng.uniform(0, math.pi), 1.0, *velocity, *colours]


def _lay_out_placed(thing: Thing, rng: random.Random) -> list[float]:
    cell = PLACES.index(thing.place) if thing.place else rng.randrange(9)
    x, y = ((cell % 3 + 0.5) / 3, (cell // 3 + 0.5) / 3)
    jitter = 0.025
    radius = IMAGE_RADIUS[thing.size]
    return _row(thing, x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter), radius, rng)


def _lay_out_copies(scene: Scene, rng: random.Random) -> list[list[float]]:
    arrangement = scene.arrangement or rng.choice(("row", "column"))
    rows, across = [], rng.uniform(0.3, 0.7)
    for i in range(scene.count):
        along = (i + 0.5) / scene.count + rng.uniform(-0.012, 0.012)
        off = across + rng.uniform(-0.02, 0.02)
        x, y = (along, off) if arrangement == "row" else (off, along)
        rows.append(_row(scene.things[0], x, y, COPIES_RADIUS[scene.count], rng))
    return rows


def _in_lanes(scene: Scene, rng: random.Random) -> list[Thing]:
    """Things of a clip; two copies become two things, each with the place of its lane."""
    thing = scene.things[0]
    if scene.count == 1:
        return list(scene.things)
    if scene.count > 2:
        raise ValueError(
            f"expected at most two copies of an object in a clip, got {scene.count}: draw more in a picture"
        )
    arrangement = scene.arrangement or rng.choice(("row", "column"))
    if thing.motion != "still":
        arrangement = "column" if thing.motion in LANE_MOTIONS["top"] else "row"
    places = ("left", "right") if arrangement == "row" else ("top", "bottom")
    return [replace(thing, place=place) for place in places]


def _lay_out_moving(thing: Thing, rng: random.Random) -> list[float]:
    lane = LANES.get(thing.place or "", 0.5) + rng.uniform(-0.025, 0.025)
    radius = CLIP_RADIUS[thing.size] * (LANE_SHRINKS if thing.place else 1)
    dx, dy = MOTION_VECTORS[thing.motion or "still"]
    travel = rng.uniform(0.40, 0.44)
    start = 0.5 - 0.5 * (dx + dy) * travel + rng.uniform(-0.025, 0.025)
    x, y = (lane, start) if dy != 0 or thing.place in ("left", "right") else (start, lane)
    return _row(thing, x, y, radius, rng, (dx * travel, dy * travel), CLIP_TURN)


def _vary(colour: tuple[float, float, float], rng: random.Random, amount: float) -> tuple[float, ...]:
    shade = 1 + rng.uniform(-amount, amount)
    return tuple(min(1.0, c * shade) for c in colour)


def signed_distances(u: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """Signed distance (in radii, negative inside) to each shape of SHAPES at local coordinates u, v."""
    length = torch.sqrt(u * u + v * v + 1e-12)
    a, b = u.abs(), v.abs()
    side = math.sqrt(3) / 2
    sector = math.pi / 5
    angle = torch.remainder(torch.atan2(u, -v) + sector, 2 * sector) - sector
    along, off = length * torch.cos(angle), length * torch.sin(angle).abs()
    tip, notch = 1.2, 0.52
    edge = (notch * math.cos(sector) - tip, notch * math.sin(sector))
    norm = math.hypot(*edge)
    return [
        length - 0.9,
        torch.maximum(a, b) - 0.78,
        torch.maximum(v, torch.maximum(side * u - 0.5 * v, -side * u - 0.5 * v)) - 0.56,
        ((along - tip) * edge[1] - off * edge[0]) / norm,
        torch.minimum(torch.maximum(a - 0.36, b - 1.02), torch.maximum(a - 1.02, b - 0.36)),
        (length - 0.70).abs() - 0.28,
    ]


def _texture_weights(u: torch.Tensor, v: torch.Tensor, angle: torch.Tensor, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Weight of the first colour for each texture of TEXTURES; `pixels` is the radius in pixels."""
    period = 0.56
    s, t = (
        (u * torch.cos(angle) + v * torch.sin(angle)) / period,
        (v * torch.cos(angle) - u * torch.sin(angle)) / period,
    )
    waves = [((w - torch.floor(w) - 0.5).abs() - 0.25) * period * pixels for w in (s, t)]
    stripes = (waves[0] + 0.5).clamp(0, 1)
    checks = 0.5 + 0.5 * (2 * waves[0]).clamp(-1, 1) * (2 * waves[1]).clamp(-1, 1)
    fs, ft = s - torch.floor(s) - 0.5, t - torch.floor(t) - 0.5
    dots = ((torch.sqrt(fs * fs + ft * ft + 1e-12) - 0.28) * period * pixels + 0.5).clamp(0, 1)
    return [torch.ones_like(u), stripes, dots, checks]


def render(
    rows: torch.Tensor,
    backgrounds: torch.Tensor,
    size: int,
    time: torch.Tensor | None = None,
    draw: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Render laid-out scenes.

    Args:
        rows: (B, MAX_OBJECTS, FIELDS) as `layout_scene` returns them.
        backgrounds: (B, 3) RGB in 0…1.
        time: (T,) moments in 0…1 for clips; None for pictures.
        draw: compiled `draw_object`; None = not compiled.
    Returns: (B, 3, size, size), or (B, 3, T, size, size) with `time`, in -1…1.
    """
    batch = rows.shape[0]
    if time is not None:
        count = time.shape[0]
        rows = rows[:, None].expand(-1, count, -1, -1).clone()
        rows[..., X] += rows[..., VX] * time[None, :, None]
        rows[..., Y] += rows[..., VY] * time[None, :, None]
        flat = render(rows.flatten(0, 1), backgrounds.repeat_interleave(count, 0), size, draw=draw)
        return flat.unflatten(0, (batch, count)).transpose(1, 2).contiguous()
    axis = (torch.arange(size, device=rows.device, dtype=rows.dtype) + 0.5) / size
    picture = backgrounds[:, :, None, None].expand(-1, -1, size, size)
    for i in range(rows.shape[1]):
        row = rows[:, i, :, None, None]
        if rows.device.type == "cpu" and not bool(row[:, PRESENT].any()):
            continue
        picture = (draw or draw_object)(picture, row, axis, size)
    return picture * 2 - 1


def draw_object(picture: torch.Tensor, row: torch.Tensor, axis: torch.Tensor, size: int) -> torch.Tensor:
    """Draw one object on each of the pictures (B, 3, size, size); `row` is (B, FIELDS, 1, 1)."""
    radius = row[:, RADIUS].clamp(min=1e-3)
    dx, dy = (axis[None, None, :] - row[:, X]) / radius, (axis[None, :, None] - row[:, Y]) / radius
    cos, sin = torch.cos(row[:, ROTATION]), torch.sin(row[:, ROTATION])
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    pixels = radius * size
    distance = torch.zeros_like(u)
    for kind, each in enumerate(signed_distances(u, v)):
        distance = torch.where(row[:, SHAPE] == kind, each, distance)
    weight = torch.zeros_like(u)
    for kind, each in enumerate(_texture_weights(u, v, row[:, ANGLE], pixels)):
        weight = torch.where(row[:, TEXTURE] == kind, each, weight)
    cover = ((0.5 - distance * pixels).clamp(0, 1) * row[:, PRESENT])[:, None]
    paint = weight[:, None] * row[:, RED : RED + 3] + (1 - weight[:, None]) * row[:, DARK_RED : DARK_RED + 3]
    return picture + cover * (paint - picture)
