"""The pictures' language, the renderer, the tokenizers and the check that judges drawn pictures."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from dit_accel.demo.check import check_clip, check_picture
from dit_accel.demo.render import layout_scene, render
from dit_accel.demo.scenes import (
    COLOURS,
    HELD_OUT_ONE_IN,
    PLACES,
    RELATIONS,
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
from dit_accel.demo.vocabulary import build_clip_tokenizer, build_t5_tokenizer

MOMENTS = torch.linspace(0, 1, 5)


@pytest.fixture(autouse=True)
def one_thread():
    """Small pictures: threads would only wait for one another on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scenes(count: int, clip: bool, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, clip, held_out=i % 2 == 0) for i in range(count)]


def truth(scene: Scene, rng: random.Random, size: int, blur: int = 0) -> np.ndarray:
    """The scene as rendered, (H, W, 3) or (T, H, W, 3); blurred and noisy like a drawn picture with `blur`."""
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
def test_parsing_a_caption_gives_back_its_scene_in_every_phrasing(clip):
    rng = random.Random(1)
    for scene in scenes(500, clip):
        assert parse_caption(caption(scene, rng)) == scene
        assert parse_caption(caption(scene)) == scene


@pytest.mark.parametrize(
    "text", ["a red circle", "a red thing on a green background", "a circle on a green background"]
)
def test_caption_outside_the_language_is_refused(text):
    with pytest.raises(ValueError, match="caption"):
        parse_caption(text)


@pytest.mark.parametrize("clip", [False, True])
def test_held_out_part_is_disjoint_and_one_in_ten(clip):
    rng = random.Random(2)
    trained = {sample_scene(rng, clip).key for _ in range(3000)}
    held_out = [sample_scene(rng, clip, held_out=True) for _ in range(300)]
    assert not trained & {scene.key for scene in held_out}
    assert all(is_held_out(scene) for scene in held_out)
    fresh = [parse_caption(text) for scene in scenes(400, clip) for text in altered_captions(scene, rng).values()]
    share = np.mean([is_held_out(scene) for scene in fresh])
    assert 0.5 / HELD_OUT_ONE_IN < share < 2 / HELD_OUT_ONE_IN


def test_order_of_two_objects_does_not_move_a_scene_across_the_split():
    rng = random.Random(3)
    pairs = [s for s in scenes(200, clip=False) if len(s.things) == 2]
    assert len(pairs) > 50
    for scene in pairs:
        turned = Scene(scene.things[::-1], scene.background)
        assert is_held_out(turned) == is_held_out(scene), caption(scene, rng)


@pytest.mark.parametrize(
    ("clip", "size", "blur", "count"), [(False, 256, 0, 100), (False, 512, 9, 40), (True, 128, 3, 60)]
)
def test_check_accepts_truth_and_refuses_altered_captions(clip, size, blur, count):
    rng = random.Random(4)
    check = check_clip if clip else check_picture
    right, refused = [], []
    for scene in scenes(count, clip, seed=5):
        picture = truth(scene, rng, size, blur)
        right.append(check(picture, caption(scene, rng)).ok)
        refused += [not check(picture, wrong).ok for wrong in altered_captions(scene, rng).values()]
    assert np.mean(right) >= 0.99
    assert np.mean(refused) >= 0.95


def pair_clips(count: int) -> list[Scene]:
    """Two objects beside each other, which no caption of training has."""
    rng, found = random.Random(6), []
    for _ in range(count):
        colours, relation = rng.sample(COLOURS, 3), rng.choice(RELATIONS)
        motions = ("left", "right", "still") if relation in RELATIONS[:2] else ("up", "down", "still")
        things = [Thing(rng.choice(SHAPES), colour, motion=rng.choice(motions)) for colour in colours[:2]]
        found.append(Scene(tuple(things), colours[2], relation=relation))
    return found


def test_check_of_clips_knows_two_objects_by_their_relation():
    rng, right, refused = random.Random(4), [], []
    for scene in pair_clips(30):
        assert parse_caption(caption(scene, rng)) == scene
        clip = truth(scene, rng, 128, 3)
        right.append(check_clip(clip, scene).ok)
        altered = altered_captions(scene, rng)
        assert "place" in altered
        refused += [not check_clip(clip, wrong).ok for wrong in altered.values()]
    assert np.mean(right) >= 0.95
    assert np.mean(refused) >= 0.95


def deform(picture: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """The picture as an imperfect hand would draw it: wobbly outlines, thick arms, round corners, noise."""
    side = len(picture)
    shift = ndimage.gaussian_filter(rng.standard_normal((2, side, side)), (0, *2 * [rng.uniform(0.2, 0.4) * radius]))
    shift *= rng.uniform(0.02, 0.05) * radius / shift.std()
    at = np.indices((side, side)) + shift
    warped = [ndimage.map_coordinates(channel, at, order=1, mode="nearest") for channel in np.moveaxis(picture, -1, 0)]
    soft = ndimage.gaussian_filter(np.stack(warped, -1), (*2 * [rng.uniform(0, 0.1) * radius], 0))
    return np.clip(soft + 0.02 * rng.standard_normal(soft.shape), 0, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_check_knows_deformed_shapes_and_still_tells_them_apart(shape):
    rng, noise = random.Random(10), np.random.default_rng(10)
    right, refused, taken_for = [], [], []
    for i in range(100):
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


def test_check_names_what_is_wrong():
    rng = random.Random(6)
    scene = parse_caption("a large red circle at the top left on a green background")
    picture = truth(scene, rng, 256)
    assert check_picture(picture, scene).problems == []
    wrong = "a large blue square at the bottom right on a white background"
    problems = " ".join(check_picture(picture, wrong).problems)
    assert all(word in problems for word in ("not blue", "not square", "not bottom right", "not white"))


@pytest.mark.parametrize("blank", [0.0, 0.5, 1.0])
def test_check_refuses_an_empty_picture_and_noise(blank):
    noise = np.random.default_rng(0).random((256, 256, 3), dtype=np.float32)
    for picture in (np.full((256, 256, 3), blank, dtype=np.float32), noise):
        assert not check_picture(picture, "a red circle at the top left on a green background").ok


def test_check_refuses_a_picture_of_the_wrong_shape():
    with pytest.raises(ValueError, match="H, W, 3"):
        check_picture(np.zeros((3, 64, 64)), "a red circle on a green background")


def test_renders_at_two_sizes_show_the_same_scene():
    rng = random.Random(7)
    rows, backgrounds = zip(*(layout_scene(s, rng) for s in scenes(8, clip=False)), strict=True)
    large, small = (render(torch.tensor(rows), torch.tensor(backgrounds), size) for size in (512, 128))
    assert (torch.nn.functional.avg_pool2d(large, 4) - small).abs().mean() < 0.01


@pytest.mark.parametrize("place", PLACES)
def test_object_is_drawn_in_the_cell_its_place_names(place):
    scene = parse_caption(f"a small black square at the {place} on a white background")
    picture = truth(scene, random.Random(8), 96)
    y, x = np.argwhere(picture.mean(-1) < 0.5).mean(0) / 96 * 3
    assert PLACES[3 * int(y) + int(x)] == place


@pytest.mark.parametrize(("build", "frame"), [(build_clip_tokenizer, 2), (build_t5_tokenizer, 1)])
def test_tokenizers_give_one_token_a_word_and_survive_saving(build, frame, tmp_path):
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
