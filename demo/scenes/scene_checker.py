"""Check of pictures and clips against captions by classical image analysis, without a learned network.

The background is the colour of the picture's rim. Pixels that differ from it form connected components. Each component
is classified by the colour of its pixels, by its outline (its profile, compared with those of rendered shapes) and by
the grid cell of its centroid. A caption is right if the picture shows exactly the objects it names, with their colour,
shape and place; in clips, also their motion and side. Sizes and textures are not checked.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import ConvexHull

from dit_accel.demo.scenes.render import (
    FIELDS,
    MOTION_VECTORS,
    PALETTE,
    PRESENT,
    RADIUS,
    SHAPE,
    X,
    Y,
    render,
    second_colour,
)
from dit_accel.demo.scenes.scene import COLOURS, PLACES, SHAPES, Scene, Thing, parse_caption

ANGLES = 72
MIN_AREA = 0.004
FOREGROUND = 0.14
CLIP_MOMENTS = 5
# axis and direction from the picture's middle in which the middle of a track must lie, by at least ASIDE
SIDES = {"top": (1, -1), "bottom": (1, 1), "left": (0, -1), "right": (0, 1)}
ASIDE = 0.08
ROUNDING = 0.1


@dataclass(frozen=True)
class Blob:
    """Connected component; `centre` (x, y) and `area` are fractions of the picture."""

    colour: str
    shape: str
    centre: tuple[float, float]
    area: float


@dataclass
class Verdict:
    """Result of a check: whether the drawing matches the caption, and the differences."""

    ok: bool
    problems: list[str] = field(default_factory=list)


def check_picture(picture: np.ndarray, caption: str | Scene) -> Verdict:
    """Check a picture against a caption.

    Args:
        picture: (H, W, 3) RGB, floats in 0…1 or uint8.
    """
    scene = parse_caption(caption) if isinstance(caption, str) else caption
    background, blobs = find_blobs(_as_float(picture))
    problems = [] if background == scene.background else [f"background {background}, not {scene.background}"]
    problems += _compare_things(scene, blobs)
    return Verdict(not problems, problems)


def check_clip(frames: np.ndarray, caption: str | Scene) -> Verdict:
    """Check a clip (T, H, W, 3) against a caption, in five frames from the first to the last."""
    scene = parse_caption(caption) if isinstance(caption, str) else caption
    moments = np.linspace(0, len(frames) - 1, CLIP_MOMENTS).round().astype(int)
    found = [find_blobs(_as_float(frames[i])) for i in moments]
    problems = [f"background {b}, not {scene.background}" for b, _ in found[:1] if b != scene.background]
    expected, counts = len(scene.things) * scene.count, [len(blobs) for _, blobs in found]
    if sum(n == expected for n in counts) < CLIP_MOMENTS - 1:
        problems.append(f"{counts} objects in the frames, not {expected}")
    for thing in scene.things:
        complete = _frames_with(thing, scene.count, [blobs for _, blobs in found])
        if len(complete) < CLIP_MOMENTS - 1:
            problems.append(
                f"not {scene.count} {thing.colour} in {CLIP_MOMENTS - len(complete)} of {CLIP_MOMENTS} frames"
            )
            continue
        if scene.arrangement and _arrangement_of(complete[0]) != scene.arrangement:
            problems.append(f"not in a {scene.arrangement}")
        for track in zip(*complete, strict=True):
            problems += _compare_track(thing, track)
    return Verdict(not problems, problems)


def _frames_with(thing: Thing, count: int, frames: list[list[Blob]]) -> list[list[Blob]]:
    """Blobs of an object, or of its copies in a fixed order, for each frame that shows all of them.

    Moving copies are sorted along the axis perpendicular to their motion, still ones along the axis of their row or
    column.
    """
    same = [sorted((b for b in blobs if b.colour == thing.colour), key=lambda b: -b.area)[:count] for blobs in frames]
    same = [blobs for blobs in same if len(blobs) == count]
    if not same or count == 1:
        return same
    dx, dy = MOTION_VECTORS[thing.motion or "still"]
    axis = 1 if dx else 0 if dy else ("row", "column").index(_arrangement_of(same[0]))
    return [sorted(blobs, key=lambda b: b.centre[axis]) for blobs in same]


def _compare_track(thing: Thing, track: Sequence[Blob]) -> list[str]:
    """Differences between a thing and its track over a clip."""
    problems = []
    if sum(blob.shape == thing.shape for blob in track) * 2 <= len(track):
        problems.append(f"{thing.colour} {track[0].shape}, not {thing.shape}")
    motion = _motion_of(track)
    if thing.motion and motion != thing.motion:
        problems.append(f"{thing.colour} {thing.shape} moves {motion}, not {thing.motion}")
    middle = np.mean([blob.centre for blob in track], axis=0) - 0.5
    for axis, sign in (SIDES[word] for word in (thing.place or "").split() if word in SIDES):
        if sign * middle[axis] <= ASIDE:
            problems.append(f"{thing.colour} {thing.shape} not at the {thing.place}")
    return problems


def _as_float(picture: np.ndarray) -> np.ndarray:
    picture = np.asarray(picture)
    if picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"expected a picture of shape (H, W, 3), got {picture.shape}")
    return picture.astype(np.float32) / 255 if picture.dtype == np.uint8 else picture.astype(np.float32)


def _compare_things(scene: Scene, blobs: list[Blob]) -> list[str]:
    expected = list(scene.things) * scene.count
    if len(blobs) != len(expected):
        return [f"{len(blobs)} objects, not {len(expected)}"]
    best: list[str] | None = None
    for order in itertools.permutations(blobs) if scene.count == 1 else [tuple(blobs)]:
        problems = []
        for thing, blob in zip(expected, order, strict=True):
            place = _place_of(blob.centre)
            if blob.colour != thing.colour:
                problems.append(f"{blob.colour}, not {thing.colour}")
            if blob.shape != thing.shape:
                problems.append(f"{blob.shape}, not {thing.shape}")
            if thing.place and place != thing.place:
                problems.append(f"at the {place}, not {thing.place}")
        if best is None or len(problems) < len(best):
            best = problems
    if scene.arrangement and _arrangement_of(blobs) != scene.arrangement:
        best = [*(best or []), f"not in a {scene.arrangement}"]
    return best or []


def _place_of(centre: tuple[float, float]) -> str:
    column, row = (min(2, int(c * 3)) for c in centre)
    return PLACES[3 * row + column]


def _arrangement_of(blobs: list[Blob]) -> str:
    width, height = np.ptp([blob.centre for blob in blobs], axis=0)
    return "row" if width > height else "column"


def _motion_of(track: Sequence[Blob]) -> str:
    dx, dy = np.subtract(track[-1].centre, track[0].centre)
    if max(abs(dx), abs(dy)) < 0.1:
        return "still"
    horizontal = (int(np.sign(dx)), 0), (0, int(np.sign(dy)))
    vector = horizontal[0] if abs(dx) > abs(dy) else horizontal[1]
    return next(name for name, v in MOTION_VECTORS.items() if v == vector)


def find_blobs(picture: np.ndarray) -> tuple[str, list[Blob]]:
    """Colour name of the background, and the objects, of a picture (H, W, 3) in 0…1."""
    rim = np.concatenate([picture[:4].reshape(-1, 3), picture[-4:].reshape(-1, 3)])
    rim = np.concatenate([rim, picture[:, :4].reshape(-1, 3), picture[:, -4:].reshape(-1, 3)])
    ground = np.median(rim, axis=0)
    background = min(PALETTE, key=lambda name: float(np.abs(PALETTE[name] - ground).sum()))
    mask = np.abs(picture - ground).max(-1) > FOREGROUND
    mask = ndimage.binary_opening(mask, iterations=max(1, picture.shape[0] // 256))
    labels, count = ndimage.label(mask)
    blobs = []
    for label, box in enumerate(ndimage.find_objects(labels, count), start=1):
        component = labels[box] == label
        area = component.sum() / mask.size
        if area < MIN_AREA:
            continue
        y, x = ndimage.center_of_mass(ndimage.binary_fill_holes(component))
        centre = ((x + box[1].start + 0.5) / mask.shape[1], (y + box[0].start + 0.5) / mask.shape[0])
        blobs.append(Blob(_colour_of(picture[box], component, background), _shape_of(component), centre, float(area)))
    return background, blobs


@functools.cache
def _references() -> tuple[np.ndarray, list[str]]:
    names = [name for name in COLOURS for _ in range(2)]
    values = [colour for name in COLOURS for colour in (PALETTE[name], second_colour(name))]
    return np.array(values, dtype=np.float32), names


def _colour_of(picture: np.ndarray, component: np.ndarray, background: str) -> str:
    core = ndimage.binary_erosion(component, iterations=2)
    pixels = picture[core if core.sum() > 20 else component]
    values, names = _references()
    allowed = [i for i, name in enumerate(names) if name != background]
    nearest = np.abs(pixels[:, None] - values[None, allowed]).sum(-1).argmin(1)
    votes = np.bincount(nearest, minlength=len(allowed))
    totals = {name: 0 for name in names}
    for i, index in enumerate(allowed):
        totals[names[index]] += int(votes[i])
    return max(totals, key=lambda name: totals[name])


def _profile(component: np.ndarray) -> np.ndarray:
    """Features of a shape: radius of the outline over the angle, solidity, roundness and central hole.

    The radius is represented by its Fourier magnitudes, which are invariant to rotation. Solidity is the area of the
    filled component divided by that of its convex hull. Roundness is the hull's area divided by that of a circle with
    the same perimeter. The weights equalize the spread of the features within a shape.
    """
    filled = ndimage.binary_fill_holes(component)
    y, x = ndimage.center_of_mass(filled)
    reach = int(np.hypot(*component.shape)) + 2
    angles = np.arange(ANGLES) * 2 * np.pi / ANGLES
    steps = np.arange(0, reach, 0.5)
    ys = y + np.sin(angles)[:, None] * steps
    xs = x + np.cos(angles)[:, None] * steps
    inside = ndimage.map_coordinates(filled.astype(np.float32), [ys, xs], order=1, mode="constant") > 0.5
    radius = (inside * steps).max(1) + 0.5
    spectrum = np.abs(np.fft.rfft(radius / radius.mean())) / ANGLES
    area, perimeter = _hull_of(filled)
    solidity, roundness = filled.sum() / area, 4 * np.pi * area / perimeter**2
    weighted = [4 * solidity, 8 * roundness, min(1.0, 12 * _central_hole(component, filled))]
    return np.concatenate([spectrum[1:11] * 10, weighted])


def _hull_of(filled: np.ndarray) -> tuple[float, float]:
    """Area and perimeter of the convex hull of the component's pixels."""
    rim = np.argwhere(filled & ~ndimage.binary_erosion(filled))
    corners = rim[:, None] + [[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]
    hull = ConvexHull(corners.reshape(-1, 2))
    return float(hull.volume), float(hull.area)


def _central_hole(component: np.ndarray, filled: np.ndarray) -> float:
    """Area of the hole at the centre as a share of the filled component; other holes belong to textures."""
    holes, _ = ndimage.label(filled & ~component)
    y, x = (round(c) for c in ndimage.center_of_mass(filled))
    return float((holes == holes[y, x]).sum() / filled.sum()) if holes[y, x] else 0.0


@functools.cache
def _templates() -> np.ndarray:
    """Profiles of each shape as rendered, then of each shape dilated and with rounded corners."""
    rows = torch.zeros(len(SHAPES), 1, FIELDS)
    rows[..., X] = rows[..., Y] = 0.5
    rows[..., RADIUS], rows[..., PRESENT] = 0.3, 1.0
    rows[:, 0, SHAPE] = torch.arange(len(SHAPES), dtype=torch.float32)
    covers = (1 - render(rows, torch.ones(len(SHAPES), 3), 128)[:, 0].numpy()) / 2
    rounded = ndimage.gaussian_filter(covers, (0, ROUNDING * 0.3 * 128, ROUNDING * 0.3 * 128))
    return np.stack([_profile(p > 0.5) for p in covers] + [_profile(p > FOREGROUND) for p in rounded])


def _shape_of(component: np.ndarray) -> str:
    return SHAPES[int(np.abs(_templates() - _profile(component)).sum(1).argmin()) % len(SHAPES)]
