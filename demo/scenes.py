"""Scenes that the embedded pipelines draw, and the small language of their captions.

A `Scene` is what a caption fixes: objects with colour, texture, shape, size and place (or count, or motion) on a
background. `render.py` draws a scene, `check.py` judges a picture against one. One scene in ten is held out: which,
`is_held_out` decides from a hash of what the caption says, whatever its phrasing, so that training never meets it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white", "black")
BACKGROUNDS = (*COLOURS, "gray")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLURALS = {**{shape: shape + "s" for shape in SHAPES}, "cross": "crosses"}
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "medium", "large")
PLACES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
COUNTS = ("two", "three", "four")
ARRANGEMENTS = ("row", "column")
MOTIONS = ("left", "right", "up", "down", "still")
RELATIONS = ("above", "below", "to the left of", "to the right of")
# what training and the held-out captions draw from; the renderer and the check know all of SHAPES and COUNTS, and
# two objects in a clip by RELATIONS (what was taught of those, a denoiser of this size mixed up)
TAUGHT_SHAPES = ("circle", "square", "triangle", "cross")
TAUGHT_COUNTS = (2, 3)
HELD_OUT_ONE_IN = 10
MAX_OBJECTS = 4
TEXT_LENGTH = 40


@dataclass(frozen=True)
class Thing:
    """One object of a caption; None where the caption leaves it open."""

    shape: str
    colour: str
    texture: str = "plain"
    size: str = "medium"
    place: str | None = None
    motion: str | None = None


@dataclass(frozen=True)
class Scene:
    """What a caption fixes. `count` > 1 means that many copies of the only thing, in a row or a column."""

    things: tuple[Thing, ...]
    background: str
    count: int = 1
    arrangement: str | None = None
    relation: str | None = None

    @property
    def is_clip(self) -> bool:
        return self.things[0].motion is not None

    @property
    def key(self) -> str:
        """What the caption says, in one canonical order."""
        parts = [f"{t.size} {t.colour} {t.texture} {t.shape} {t.place} {t.motion}" for t in self.things]
        if self.relation is None:
            parts.sort()
        return f"{'; '.join(parts)}; {self.count} {self.arrangement} {self.relation}; {self.background}"


def is_held_out(scene: Scene) -> bool:
    """True for the one scene in ten that training never sees."""
    digest = hashlib.blake2b(scene.key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


def sample_scene(rng: random.Random, clip: bool = False, held_out: bool = False) -> Scene:
    """A random scene from the training part, or from the part held out."""
    while True:
        scene = _sample_clip_scene(rng) if clip else _sample_image_scene(rng)
        if is_held_out(scene) == held_out:
            return scene


def _apart(first: str, second: str) -> bool:
    (ay, ax), (by, bx) = divmod(PLACES.index(first), 3), divmod(PLACES.index(second), 3)
    return abs(ax - bx) + abs(ay - by) >= 2


_PLACE_PAIRS = [(a, b) for a in PLACES for b in PLACES if _apart(a, b)]


def _sample_thing(rng: random.Random, colours: Sequence[str], plain: float = 0.6) -> Thing:
    texture = "plain" if rng.random() < plain else rng.choice(TEXTURES[1:])
    size = "medium" if rng.random() < 0.4 else rng.choice(SIZES)
    return Thing(rng.choice(TAUGHT_SHAPES), rng.choice(colours), texture, size)


def _sample_image_scene(rng: random.Random) -> Scene:
    background = rng.choice(BACKGROUNDS)
    colours = [c for c in COLOURS if c != background]
    first = _sample_thing(rng, colours)
    kind = rng.random()
    if kind < 0.45:
        place = None if rng.random() < 0.2 else rng.choice(PLACES)
        return Scene((replace(first, place=place),), background)
    if kind < 0.82:
        place, other_place = rng.choice(_PLACE_PAIRS)
        other = _sample_thing(rng, colours)
        return Scene((replace(first, place=place), replace(other, place=other_place)), background)
    arrangement = rng.choice((None, *ARRANGEMENTS))
    return Scene((replace(first, size="medium"),), background, rng.choice(TAUGHT_COUNTS), arrangement)


def _sample_clip_scene(rng: random.Random) -> Scene:
    background = rng.choice(BACKGROUNDS)
    thing = _sample_thing(rng, [c for c in COLOURS if c != background], 0.75)
    return Scene((replace(thing, motion=rng.choice(MOTIONS)),), background)


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """A caption of the scene: one phrasing of several, or the plainest without `rng`."""
    pick: Callable[[Sequence[str]], str] = rng.choice if rng else lambda options: options[0]
    thing = scene.things[0]
    if scene.count > 1:
        text = f"{COUNTS[scene.count - 2]} {_adjectives(thing, pick)} {PLURALS[thing.shape]}"
        text += f" in a {scene.arrangement}" if scene.arrangement else ""
    else:
        joint = f" {scene.relation} " if scene.relation else " and "
        text = joint.join(_describe(t, pick) for t in scene.things)
    colour = scene.background
    article = "an" if colour == "orange" else "a"
    text += pick((f" on {article} {colour} background", f" with {article} {colour} background"))
    return pick(("", "", "", f"a {'clip' if scene.is_clip else 'picture'} of ")) + text


def _adjectives(thing: Thing, pick: Callable[[Sequence[str]], str]) -> str:
    texture = "" if thing.texture == "plain" else thing.texture
    look = pick((f"{thing.colour} {texture}", f"{texture} {thing.colour}"))
    size = "" if thing.size == "medium" else thing.size
    return " ".join(f"{size} {look}".split())


def _describe(thing: Thing, pick: Callable[[Sequence[str]], str]) -> str:
    look = _adjectives(thing, pick)
    text = f"{'an' if look.startswith('orange') else 'a'} {look} {thing.shape}"
    if thing.motion:
        text += " standing still" if thing.motion == "still" else f" moving {thing.motion}"
    if thing.place:
        other = {"center": "in the center", "left": "on the left", "right": "on the right"}
        corner = f"in the {thing.place} corner" if " " in thing.place else f"at the {thing.place}"
        text += " " + pick((f"at the {thing.place}", other.get(thing.place, corner)))
    return text


def parse_caption(text: str) -> Scene:
    """The scene that a caption of this language describes.

    Raises: ValueError: the caption names no shape, no colour or no background.
    """
    words = text.lower().replace(",", " ").replace(".", " ").split()
    if "background" not in words or words[words.index("background") - 1] not in BACKGROUNDS:
        raise ValueError(f"caption {text!r} names no background; write '… on a green background'")
    end = words.index("background")
    background = words[end - 1]
    body = " ".join(words[: max(i for i in range(end) if words[i] in ("on", "with"))])
    relation = next((r for r in RELATIONS if f" {r} a" in f" {body} "), None)
    segments = body.split(f" {relation} ") if relation else body.split(" and ")
    things = tuple(_parse_thing(segment.split(), text) for segment in segments)
    count = next((n + 2 for n, word in enumerate(COUNTS) if word in words), 1)
    arrangement = next((a for a in ARRANGEMENTS if a in words), None)
    return Scene(things, background, count, arrangement, relation)


def _parse_thing(words: list[str], text: str) -> Thing:
    singular = {plural: shape for shape, plural in PLURALS.items()}
    names = [singular.get(w, w) for w in words]
    shape = next((n for n in names if n in SHAPES), None)
    colour = next((n for n in names if n in COLOURS), None)
    if shape is None or colour is None:
        raise ValueError(f"caption {text!r}: {' '.join(words)!r} needs a shape of {SHAPES} and a colour of {COLOURS}")
    tail = names[names.index(shape) + 1 :]
    motion = None
    if "still" in tail:
        motion = "still"
    elif "moving" in tail:
        motion = tail[tail.index("moving") + 1]
    place = " ".join(n for n in tail if n in ("top", "bottom", "left", "right", "center")) if motion is None else ""
    return Thing(
        shape,
        colour,
        next((t for t in TEXTURES if t in names), "plain"),
        next((s for s in SIZES if s in names), "medium"),
        place if place in PLACES else None,
        motion,
    )


def words_of_language() -> list[str]:
    """Every word that a caption can contain, sorted."""
    phrases = ["a an and on with at in the of standing moving corner background picture clip", "row column"]
    groups = (COLOURS, BACKGROUNDS, SHAPES, PLURALS.values(), TEXTURES, SIZES, PLACES, COUNTS, MOTIONS, RELATIONS)
    for group in groups:
        phrases.extend(group)
    return sorted({word for phrase in phrases for word in phrase.split()})


def altered_captions(scene: Scene, rng: random.Random) -> dict[str, str]:
    """Captions that are wrong for a picture of `scene`, one changed attribute each: what was changed → caption."""
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    taken = {scene.background, *(t.colour for t in scene.things)}
    changes = {
        "colour": {"colour": rng.choice([c for c in COLOURS if c not in taken])},
        "shape": {"shape": rng.choice([s for s in SHAPES if s not in {t.shape for t in scene.things}])},
    }
    if thing.place:
        changes["place"] = {"place": rng.choice([p for p in PLACES if p not in {t.place for t in scene.things}])}
    if thing.motion:
        changes["motion"] = {"motion": rng.choice([m for m in MOTIONS if m != thing.motion])}
    wrong = {}
    for name, change in changes.items():
        things = list(scene.things)
        things[index] = replace(thing, **change)
        wrong[name] = caption(replace(scene, things=tuple(things)))
    if scene.count > 1:
        wrong["count"] = caption(replace(scene, count=rng.choice([n for n in (2, 3, 4) if n != scene.count])))
    if scene.relation:
        opposite = RELATIONS[RELATIONS.index(scene.relation) ^ 1]
        wrong["place"] = caption(replace(scene, relation=opposite))
    return wrong
