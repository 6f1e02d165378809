"""Scenes that the embedded pipelines draw, and the language of their captions.

A `Scene` holds what a caption states: objects with colour, texture, shape, size and place (or count, or motion) on a
background. `render.py` draws a scene, `scene_checker.py` checks a picture against one. One scene in ten is held out of
training: `is_held_out` depends on a hash of the scene, not on the phrasing of its caption.
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
# lanes off the middle for objects of a clip, each with the motions that stay in the lane
LANE_MOTIONS = {
    **dict.fromkeys(("top", "bottom"), ("left", "right", "still")),
    **dict.fromkeys(("left", "right"), ("up", "down", "still")),
}
OPPOSITE = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}
# used by training and held-out captions; renderer and checker support all of SHAPES and COUNTS
TAUGHT_SHAPES = ("circle", "square", "triangle", "cross")
TAUGHT_COUNTS = (2, 3)
HELD_OUT_ONE_IN = 10
MAX_OBJECTS = 4
TEXT_LENGTH = 40


@dataclass(frozen=True)
class Thing:
    """Object of a caption; None for attributes that the caption leaves open."""

    shape: str
    colour: str
    texture: str = "plain"
    size: str = "medium"
    place: str | None = None
    motion: str | None = None


@dataclass(frozen=True)
class Scene:
    """Content of a caption. `count` > 1: copies of the only thing, in a row or a column.

    Two moving copies are side by side, perpendicular to their motion.
    """

    things: tuple[Thing, ...]
    background: str
    count: int = 1
    arrangement: str | None = None

    @property
    def is_clip(self) -> bool:
        return self.things[0].motion is not None

    @property
    def key(self) -> str:
        """Canonical description of the scene.

        The split of the trained pipelines depends on each letter of it; "None" is in the place of a removed attribute.
        """
        parts = sorted(f"{t.size} {t.colour} {t.texture} {t.shape} {t.place} {t.motion}" for t in self.things)
        return f"{'; '.join(parts)}; {self.count} {self.arrangement} None; {self.background}"


def is_held_out(scene: Scene) -> bool:
    """True for the one scene in ten that is not used in training."""
    digest = hashlib.blake2b(scene.key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


def sample_scene(rng: random.Random, clip: bool = False, held_out: bool = False) -> Scene:
    """Sample a scene from the training split or from the held-out split."""
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
    colours = [c for c in COLOURS if c != background]
    thing = replace(_sample_thing(rng, colours, 0.75), motion=rng.choice(MOTIONS))
    kind = rng.random()
    if kind < 0.45:
        return Scene((thing,), background)
    if kind < 0.55:
        arrangement = rng.choice((None, *ARRANGEMENTS)) if thing.motion == "still" else None
        return Scene((thing,), background, 2, arrangement)
    place = rng.choice(_places_for(thing.motion))
    placed = replace(thing, place=place)
    if kind < 0.75:
        return Scene((placed,), background)
    other = _sample_thing(rng, [c for c in colours if c != thing.colour], 0.75)
    other = replace(other, place=OPPOSITE[place], motion=rng.choice(LANE_MOTIONS[place]))
    return Scene((placed, other), background)


def _places_for(motion: str | None) -> list[str]:
    return [place for place, motions in LANE_MOTIONS.items() if motion in motions]


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Caption of a scene: a random phrasing, or the plainest one without `rng`."""
    pick: Callable[[Sequence[str]], str] = rng.choice if rng else lambda options: options[0]
    thing = scene.things[0]
    if scene.count > 1:
        text = f"{COUNTS[scene.count - 2]} {_adjectives(thing, pick)} {PLURALS[thing.shape]}"
        text += f" in a {scene.arrangement}" if scene.arrangement else ""
        text += _describe_motion(thing.motion)
    else:
        text = " and ".join(_describe(t, pick) for t in scene.things)
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
    if thing.place:
        other = {"center": "in the center", "left": "on the left", "right": "on the right"}
        corner = f"in the {thing.place} corner" if " " in thing.place else f"at the {thing.place}"
        text += " " + pick((f"at the {thing.place}", other.get(thing.place, corner)))
    return text + _describe_motion(thing.motion)


def _describe_motion(motion: str | None) -> str:
    if motion is None:
        return ""
    return " standing still" if motion == "still" else f" moving {motion}"


def parse_caption(text: str) -> Scene:
    """Parse a caption into a scene.

    Raises: ValueError: no background, a phrase without exactly one shape or without a colour, or a place that does not
        fit the motion.
    """
    words = text.lower().replace(",", " ").replace(".", " ").split()
    if "background" not in words or words[words.index("background") - 1] not in BACKGROUNDS:
        raise ValueError(f"caption {text!r} names no background: add '… on a green background'")
    end = words.index("background")
    background = words[end - 1]
    body = " ".join(words[: max(i for i in range(end) if words[i] in ("on", "with"))])
    things = tuple(_parse_thing(phrase.split(), text) for phrase in body.split(" and "))
    count = next((n + 2 for n, word in enumerate(COUNTS) if word in words), 1)
    arrangement = next((a for a in ARRANGEMENTS if a in words), None)
    return Scene(things, background, count, arrangement)


def _parse_thing(words: list[str], text: str) -> Thing:
    singular = {plural: shape for shape, plural in PLURALS.items()}
    names = [singular.get(w, w) for w in words]
    shapes = [n for n in names if n in SHAPES]
    colour = next((n for n in names if n in COLOURS), None)
    if len(shapes) != 1 or colour is None:
        raise ValueError(
            f"caption {text!r}: expected one shape of {SHAPES} and a colour of {COLOURS}, got {' '.join(words)!r}"
        )
    tail = " ".join(names[names.index(shapes[0]) + 1 :])
    moves = {"still" if m == "still" else f"moving {m}": m for m in MOTIONS}
    phrase = next((p for p in moves if p in tail), None)
    rest = tail.replace(phrase, "") if phrase else tail
    place = " ".join(n for n in rest.split() if n in ("top", "bottom", "left", "right", "center"))
    motion = moves[phrase] if phrase else None
    if motion and place and motion not in LANE_MOTIONS.get(place, ()):
        raise ValueError(f"caption {text!r}: motion {motion!r} needs a place of {_places_for(motion)}, got {place!r}")
    return Thing(
        shapes[0],
        colour,
        next((t for t in TEXTURES if t in names), "plain"),
        next((s for s in SIZES if s in names), "medium"),
        place if place in PLACES else None,
        motion,
    )


def words_of_language() -> list[str]:
    """Sorted list of all words of captions, the vocabulary of the trained pipelines."""
    phrases = ["a an and on with at in the of standing moving corner background picture clip", "row column"]
    phrases.append("above below to")  # from removed captions; the trained vocabulary contains them
    groups = (COLOURS, BACKGROUNDS, SHAPES, PLURALS.values(), TEXTURES, SIZES, PLACES, COUNTS, MOTIONS)
    for group in groups:
        phrases.extend(group)
    return sorted({word for phrase in phrases for word in phrase.split()})


def altered_captions(scene: Scene, rng: random.Random) -> dict[str, str]:
    """Captions that differ from `scene` in one attribute each: attribute → caption."""
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    taken = {scene.background, *(t.colour for t in scene.things)}
    changes = {
        "colour": {"colour": rng.choice([c for c in COLOURS if c not in taken])},
        "shape": {"shape": rng.choice([s for s in SHAPES if s not in {t.shape for t in scene.things}])},
    }
    if thing.place and not scene.is_clip:
        changes["place"] = {"place": rng.choice([p for p in PLACES if p not in {t.place for t in scene.things}])}
    if thing.motion:
        motions = LANE_MOTIONS.get(thing.place or "", MOTIONS)
        changes["motion"] = {"motion": rng.choice([m for m in motions if m != thing.motion])}
    wrong = {}
    for name, change in changes.items():
        things = list(scene.things)
        things[index] = replace(thing, **change)
        wrong[name] = replace(scene, things=tuple(things))
    if scene.is_clip:
        wrong |= _altered_clips(scene, rng)
    elif scene.count > 1:
        wrong["count"] = replace(scene, count=rng.choice([n for n in (2, 3, 4) if n != scene.count]))
    if scene.arrangement:
        wrong["arrangement"] = replace(scene, arrangement=next(a for a in ARRANGEMENTS if a != scene.arrangement))
    return {name: caption(each) for name, each in wrong.items()}


def _altered_clips(scene: Scene, rng: random.Random) -> dict[str, Scene]:
    """Altered scenes of a clip: one object more or less, another lane, or swapped attributes of two objects."""
    first, *others = scene.things
    if not others:
        alone = replace(first, place=None)
        wrong = {"count": replace(scene, things=(alone,), count=3 - scene.count, arrangement=None)}
        if first.place:
            place = rng.choice([p for p in _places_for(first.motion) if p != first.place])
            wrong["place"] = replace(scene, things=(replace(first, place=place),))
        return wrong
    wrong, other = {"count": replace(scene, things=(first,))}, others[0]
    for name in ("place", "motion", "colour"):
        mine, its = getattr(first, name), getattr(other, name)
        if mine != its:
            things = (replace(first, **{name: its}), replace(other, **{name: mine}))
            wrong["place" if name == "place" else f"{name}s swapped"] = replace(scene, things=things)
    return wrong
