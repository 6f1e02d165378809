"""Caption language, renderer, tokenizers and scene checker."""

import hashlib
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from dit_accel.demo.scenes import scene_checker
from dit_accel.demo.scenes.render import PRESENT, layout_scene, render
from dit_accel.demo.scenes.scene import (
    COLOURS,
    HELD_OUT_ONE_IN,
    PLACES,
    PLURALS,
    SHAPES,
    SIZES,
    TEXT_LENGTH,
    TEXTURES,
    Scene,
    Thing,
    altered_captions,
    caption,
    is_held_out,
    parse_caption,
    sample_scene,
    words_of_language,
)
from dit_accel.demo.scenes.scene_checker import check_clip, check_picture, find_blobs
from dit_accel.demo.scenes.vocabulary import build_clip_tokenizer, build_t5_tokenizer
from dit_accel.demo.training.batches import NUM_CLASSES, SceneStream

MOMENTS = torch.linspace(0, 1, 5)
KINDS = ("single", "placed", "pair", "copies")


@pytest.fixture(autouse=True)
def one_thread():
    """The pictures are small: more threads would be slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scenes(count: int, clip: bool, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, clip, held_out=i % 2 == 0) for i in range(count)]


def truth(scene: Scene, rng: random.Random, size: int, blur: int = 0) -> np.ndarray:
    """Rendered scene, (H, W, 3) or (T, H, W, 3); blurred and noisy like a drawn picture with `blur`."""
    rows, background = layout_scene(scene, rng)
    times = MOMENTS if scene.is_clip else None
    picture = (render(torch.tensor([rows]), torch.tensor([background]), size, times)[0] + 1) / 2
    if blur:
        picture = picture if scene.is_clip else picture[:, None]
        flat = torch.nn.functional.avg_pool2d(picture, blur, 1, blur // 2, count_include_pad=False)
        noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
        picture = (flat + 0.02 * noise).clamp(0, 1)
        picture = picture if scene.is_clip else picture[:, 0]
    return picture.movedim(0, -1).numpy()


@pytest.mark.parametrize("clip", [False, True])
def test_each_phrasing_of_a_caption_parses_to_its_scene(clip):
    rng = random.Random(1)
    for scene in scenes(500, clip):
        assert parse_caption(caption(scene, rng)) == scene
        assert parse_caption(caption(scene)) == scene
        assert len(caption(scene, rng).split()) < TEXT_LENGTH


@pytest.mark.parametrize(
    "text",
    [
        "a large red square at the top moving left and a small blue circle at the bottom standing still",
        "a red square at the left moving up and a blue dotted circle at the right moving down",
        "two small red striped circles moving left",
        "two red circles in a column standing still",
    ],
)
def test_clip_captions_state_places_before_motions(text):
    text += " on a green background"
    assert caption(parse_caption(text)) == text and parse_caption(text).is_clip


def test_vocabulary_and_split_are_unchanged():
    words = words_of_language()
    assert (len(words), words[0], words[-1]) == (60, "a", "yellow")
    assert hashlib.sha256(" ".join(words).encode()).hexdigest().startswith("6e2dc917ac0f7fb7")
    assert (
        parse_caption("a red circle on a green background").key
        == "medium red plain circle None None; 1 None None; green"
    )


@pytest.mark.parametrize(
    "text",
    [
        "a red circle",
        "a red thing on a green background",
        "a circle on a green background",
        "a red circle above a blue square on a green background",
        "a red circle in the center moving left on a green background",
        "a red circle at the top moving up on a green background",
    ],
)
def test_caption_outside_the_language_raises(text):
    with pytest.raises(ValueError, match="caption"):
        parse_caption(text)


@pytest.mark.parametrize("clip", [False, True])
def test_held_out_split_is_disjoint_and_one_in_ten(clip):
    rng = random.Random(2)
    trained = {sample_scene(rng, clip).key for _ in range(3000)}
    held_out = [sample_scene(rng, clip, held_out=True) for _ in range(300)]
    assert not trained & {scene.key for scene in held_out}
    assert all(is_held_out(scene) for scene in held_out)
    fresh = [parse_caption(text) for scene in scenes(400, clip) for text in altered_captions(scene, rng).values()]
    share = np.mean([is_held_out(scene) for scene in fresh])
    assert 0.5 / HELD_OUT_ONE_IN < share < 2 / HELD_OUT_ONE_IN


def test_split_does_not_depend_on_the_order_of_objects():
    rng = random.Random(3)
    pairs = [s for clip in (False, True) for s in scenes(200, clip) if len(s.things) == 2]
    assert len(pairs) > 100
    for scene in pairs:
        turned = Scene(scene.things[::-1], scene.background)
        assert is_held_out(turned) == is_held_out(scene), caption(scene, rng)


@pytest.mark.parametrize(
    ("clip", "size", "blur", "count"),
    [
        (False, 256, 0, 20),
        (False, 512, 9, 10),
        (True, 128, 3, 12),
        pytest.param(False, 256, 0, 100, marks=pytest.mark.sweep),
        pytest.param(False, 512, 9, 40, marks=pytest.mark.sweep),
        pytest.param(True, 128, 3, 60, marks=pytest.mark.sweep),
    ],
)
def test_check_accepts_true_and_rejects_altered_captions(clip, size, blur, count):
    rng = random.Random(4)
    check = check_clip if clip else check_picture
    right, refused = [], []
    for scene in scenes(count, clip, seed=5):
        picture = truth(scene, rng, size, blur)
        right.append(check(picture, caption(scene, rng)).ok)
        refused += [not check(picture, wrong).ok for wrong in altered_captions(scene, rng).values()]
    assert np.mean(right) >= 0.99
    assert np.mean(refused) >= 0.95


def kind_of(scene: Scene) -> str:
    """Kind of a clip: copies, a pair, one object with a place, or one without."""
    if scene.count > 1:
        return "copies"
    return "pair" if len(scene.things) > 1 else "placed" if scene.things[0].place else "single"


def clips(kind: str, count: int, seed: int) -> list[Scene]:
    rng, found = random.Random(seed), []
    while len(found) < count:
        scene = sample_scene(rng, clip=True)
        found += [scene] if kind_of(scene) == kind else []
    return found


def test_clip_kinds_have_the_expected_frequencies():
    kinds = [kind_of(scene) for scene in scenes(2000, clip=True)]
    shares = {kind: kinds.count(kind) / len(kinds) for kind in KINDS}
    assert shares == pytest.approx({"single": 0.45, "placed": 0.2, "pair": 0.25, "copies": 0.1}, abs=0.03)


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("kind", KINDS)
def test_clip_check_accepts_true_and_rejects_altered_captions(kind, count, monkeypatch):
    known: dict[bytes, tuple] = {}

    def cached(frame: np.ndarray) -> tuple:  # a clip is checked against many captions
        key = hashlib.sha256(frame.tobytes()).digest()
        known[key] = known.get(key) or find_blobs(frame)
        return known[key]

    monkeypatch.setattr(scene_checker, "find_blobs", cached)
    rng, right, refused = random.Random(4), [], []
    for scene in clips(kind, count, seed=6):
        clip = truth(scene, rng, 128, 3)
        right.append(check_clip(clip, caption(scene, rng)).ok)
        altered = altered_captions(scene, rng)
        assert {"colour", "shape", "motion", "count"} <= altered.keys()
        assert ("place" in altered) == (kind in ("placed", "pair"))
        assert ("colours swapped" in altered) == (kind == "pair")
        refused += [not check_clip(clip, wrong).ok for wrong in altered.values()]
    assert np.mean(right) >= 0.99
    assert np.mean(refused) >= 0.98


@pytest.mark.parametrize("count", [12, pytest.param(40, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("kind", KINDS)
def test_clip_objects_stay_apart_and_inside_the_frame(kind, count):
    rng = random.Random(11)
    for scene in clips(kind, count, seed=7):
        large = replace(scene, things=tuple(replace(thing, size="large") for thing in scene.things))
        for frame in truth(large, rng, 128):
            assert len(find_blobs(frame)[1]) == len(scene.things) * scene.count, scene.key
            rim = np.concatenate([frame[0], frame[-1], frame[:, 0], frame[:, -1]])
            assert kind == "single" or np.ptp(rim, axis=0).max() < 1e-6, scene.key


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("a red square at the top moving left on a white background", "at the bottom"),
        ("a red square on the left standing still on a white background", "on the right"),
        ("a red square on the left standing still on a white background", "at the top"),
    ],
)
def test_clip_check_requires_only_places_in_the_caption(text, wrong):
    place = next(p for p in ("at the top", "on the left") if p in text)
    clip = truth(parse_caption(text), random.Random(12), 128)
    assert check_clip(clip, text).ok and check_clip(clip, text.replace(f"{place} ", "")).ok
    assert not check_clip(clip, text.replace(place, wrong)).ok


def test_more_than_two_copies_in_a_clip_raise():
    scene = parse_caption("three red circles moving left on a white background")
    with pytest.raises(ValueError, match="at most two copies"):
        layout_scene(scene, random.Random(0))


def test_clip_batches_have_nouns_and_labels():
    batch = SceneStream(clip=True, device=torch.device("cpu"), seed=0, workers=0).next(256)
    assert batch.rows.shape[1] == 2 and batch.labels.shape == (*batch.nouns.shape, len(NUM_CLASSES))
    drawn = batch.rows[..., PRESENT].sum(1)
    pairs, copies = batch.labels[:, 1, 0] >= 0, batch.labels[:, 0, 7] == 1
    assert bool((drawn == 1 + (pairs | copies)).all()) and not bool((pairs & copies).any())
    assert bool(pairs.any()) and bool(copies.any()) and bool(((batch.nouns[:, 1] > 0) == pairs).all())
    tokenizer = build_t5_tokenizer()
    for ids, nouns, labels in zip(batch.t5_ids, batch.nouns, batch.labels, strict=True):
        scene = parse_caption(tokenizer.decode(ids, skip_special_tokens=True))
        words = tokenizer.convert_ids_to_tokens(ids[nouns[: len(scene.things)]])
        assert [word.strip("▁") for word in words] == [
            PLURALS[thing.shape] if scene.count > 1 else thing.shape for thing in scene.things
        ]
        places = [0 if thing.place is None else 1 + PLACES.index(thing.place) for thing in scene.things]
        assert labels[: len(scene.things), 4].tolist() == places


def deform(picture: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Deform a picture: distorted outlines, thick arms, rounded corners, noise."""
    side = len(picture)
    shift = ndimage.gaussian_filter(rng.standard_normal((2, side, side)), (0, *2 * [rng.uniform(0.2, 0.4) * radius]))
    shift *= rng.uniform(0.02, 0.05) * radius / shift.std()
    at = np.indices((side, side)) + shift
    warped = [ndimage.map_coordinates(channel, at, order=1, mode="nearest") for channel in np.moveaxis(picture, -1, 0)]
    soft = ndimage.gaussian_filter(np.stack(warped, -1), (*2 * [rng.uniform(0, 0.1) * radius], 0))
    return np.clip(soft + 0.02 * rng.standard_normal(soft.shape), 0, 1)


@pytest.mark.parametrize("count", [16, pytest.param(100, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("shape", SHAPES)
def test_check_recognizes_and_distinguishes_deformed_shapes(shape, count):
    rng, noise = random.Random(10), np.random.default_rng(10)
    right, refused, taken_for = [], [], []
    for i in range(count):
        colour, ground = rng.sample(COLOURS, 2)
        thing = Thing(shape, colour, rng.choice(TEXTURES), rng.choice(SIZES), rng.choice(PLACES))
        scene = Scene((thing,), ground)
        size = (128, 192)[i % 2]
        picture = deform(truth(scene, rng, size), 0.14 * size, noise)
        right.append(check_picture(picture, scene).ok)
        refused += [not check_picture(picture, wrong).ok for wrong in altered_captions(scene, rng).values()]
        others = [Scene((replace(thing, shape=other),), ground) for other in SHAPES if other != shape]
        taken_for += [other.things[0].shape for other in others if check_picture(picture, other).ok]
    assert np.mean(right) >= 0.99
    assert np.mean(refused) >= 0.95
    assert len(taken_for) <= 1, taken_for


def test_check_lists_the_differences():
    rng = random.Random(6)
    scene = parse_caption("a large red circle at the top left on a green background")
    picture = truth(scene, rng, 256)
    assert check_picture(picture, scene).problems == []
    wrong = "a large blue square at the bottom right on a white background"
    problems = " ".join(check_picture(picture, wrong).problems)
    assert all(word in problems for word in ("not blue", "not square", "not bottom right", "not white"))


@pytest.mark.parametrize("blank", [0.0, 0.5, 1.0])
def test_check_rejects_an_empty_picture_and_noise(blank):
    noise = np.random.default_rng(0).random((256, 256, 3), dtype=np.float32)
    for picture in (np.full((256, 256, 3), blank, dtype=np.float32), noise):
        assert not check_picture(picture, "a red circle at the top left on a green background").ok


def test_check_raises_for_a_wrong_picture_shape():
    with pytest.raises(ValueError, match="H, W, 3"):
        check_picture(np.zeros((3, 64, 64)), "a red circle on a green background")


def test_renders_at_two_sizes_show_the_same_scene():
    rng = random.Random(7)
    rows, backgrounds = zip(*(layout_scene(s, rng) for s in scenes(8, clip=False)), strict=True)
    large, small = (render(torch.tensor(rows), torch.tensor(backgrounds), size) for size in (512, 128))
    assert (torch.nn.functional.avg_pool2d(large, 4) - small).abs().mean() < 0.01


@pytest.mark.parametrize("place", PLACES)
def test_object_is_drawn_in_the_cell_of_its_place(place):
    scene = parse_caption(f"a small black square at the {place} on a white background")
    picture = truth(scene, random.Random(8), 96)
    y, x = np.argwhere(picture.mean(-1) < 0.5).mean(0) / 96 * 3
    assert PLACES[3 * int(y) + int(x)] == place


@pytest.mark.parametrize(("build", "frame"), [(build_clip_tokenizer, 2), (build_t5_tokenizer, 1)])
def test_tokenizers_give_one_token_per_word_after_reloading(build, frame, tmp_path):
    tokenizer = build()
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    words = words_of_language()
    ids = [loaded(word, add_special_tokens=False).input_ids for word in words]
    assert all(len(each) == 1 for each in ids) and len({each[0] for each in ids}) == len(words)
    rng = random.Random(9)
    for scene in [*scenes(100, False), *scenes(100, True)]:
        text = caption(scene, rng)
        assert len(loaded(text).input_ids) == len(text.split()) + frame <= TEXT_LENGTH
        assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded("a zebra, née Ünder 猫").input_ids
