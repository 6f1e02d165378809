"""Embedded pipelines in demo/: size, diffusers classes, drawings of held-out captions, and their training code."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, WanPipeline

from dit_accel.demo.scenes.scene import altered_captions, caption, is_held_out, parse_caption
from dit_accel.demo.scenes.scene_checker import check_clip, check_picture
from dit_accel.demo.training import build
from dit_accel.demo.training.batches import SceneStream
from dit_accel.demo.training.train_denoiser import StretchedRope, stretched_ids
from dit_accel.demo.training.train_embedded import held_out_scenes, render_scenes
from dit_accel.demo.training.train_text import t5_embeddings
from dit_accel.demo.training.train_vae import decode_clip, draw, encode_clip, measure_psnr, normalise_latents

DEMO = Path(build.__file__).parents[1]
KINDS = {"image": (FluxPipeline, build.ImageConfig()), "video": (WanPipeline, build.VideoConfig())}
TOKENS = {"image": 4096, "video": 3000}
CPU = torch.device("cpu")
sweep = pytest.mark.sweep
TRIANGLE = "a picture of a blue striped triangle with a white background"
CROSSES = "a red cross in the bottom left corner and a large green cross at the top right with a yellow background"
CLIP = "a white cross on the left moving up and a purple circle at the right standing still on a red background"


@pytest.fixture(scope="module", params=KINDS)
def embedded(request):
    """Kind, pipeline, configuration and call arguments."""
    pipeline_class, config = KINDS[request.param]
    folder = DEMO / request.param
    pipe = pipeline_class.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return request.param, pipe, config, json.loads((folder / build.DEFAULTS_FILE).read_text())


@pytest.fixture(scope="module")
def image_pipeline():
    pipe = FluxPipeline.from_pretrained(DEMO / "image")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_folder_is_small_and_loads_as_diffusers_classes(embedded):
    kind, pipe, _, _ = embedded
    assert build.folder_bytes(DEMO / kind) <= build.MAX_BYTES
    for part in pipe.components.values():
        assert part is None or type(part).__module__.split(".")[0] in ("diffusers", "transformers")


@pytest.mark.parametrize("decode", [False, pytest.param(True, marks=sweep)])
def test_default_call_gives_frames_and_enough_tokens(embedded, decode):
    kind, pipe, config, arguments = embedded
    seen = []
    attention = next(m for n, m in pipe.transformer.named_modules() if n.endswith(("blocks.0.attn", "blocks.0.attn1")))
    handle = attention.register_forward_pre_hook(
        lambda m, a, k: seen.append(k.get("hidden_states", *a[:1])), with_kwargs=True
    )
    try:
        text = "a red circle on a white background"
        output = "np" if decode else "latent"  # held-out captions below are decoded, too
        frames = pipe(text, output_type=output, **{**arguments, "num_inference_steps": 1})[0]
    finally:
        handle.remove()
    assert seen[0].shape[1] >= TOKENS[kind]
    times = (config.frames,) if kind == "video" else ()
    assert not decode or frames.shape == (1, *times, config.size, config.size, 3)
    assert np.isfinite(frames).all() and frames.std() > 0


@pytest.mark.parametrize("counts", [{"image": 3, "video": 1}, pytest.param({"image": 8, "video": 2}, marks=sweep)])
def test_autoencoder_reconstructs_held_out_scenes(embedded, counts):
    """At least 28 dB on average, and for each single picture."""
    kind, pipe, config, _ = embedded
    pixels = render_scenes(held_out_scenes(counts[kind], kind == "video", seed=11), config, CPU)
    decibels = measure_psnr(pipe, pixels)
    assert np.mean(decibels) >= 28
    assert kind == "video" or min(decibels) >= 28


@pytest.mark.parametrize(
    ("text", "seed", "steps"),
    [(CROSSES, 12, 5), pytest.param(TRIANGLE, 11, 10, marks=sweep), pytest.param(CROSSES, 12, 10, marks=sweep)],
)
def test_held_out_caption_is_right_and_altered_ones_are_rejected(image_pipeline, text, seed, steps):
    assert is_held_out(parse_caption(text))
    call = {"num_inference_steps": steps, "max_sequence_length": 40, "output_type": "np"}
    picture = image_pipeline(text, generator=torch.Generator().manual_seed(seed), **call)[0][0]
    assert picture.shape == (512, 512, 3)
    assert check_picture(picture, text).problems == []
    altered = altered_captions(parse_caption(text), random.Random(13))
    assert len(altered) >= 2
    assert not [wrong for wrong in altered.values() if check_picture(picture, wrong).ok]


@pytest.mark.parametrize(
    ("text", "seed", "fewer"),
    [(CLIP, 1, {"num_inference_steps": 5, "guidance_scale": 1.0}), (CLIP, 1, {})],
)
@sweep  # the embedded files change rarely
def test_held_out_clip_is_right_and_altered_ones_are_rejected(text, seed, fewer):
    assert is_held_out(parse_caption(text))
    pipe = WanPipeline.from_pretrained(DEMO / "video")
    pipe.set_progress_bar_config(disable=True)
    arguments = json.loads((DEMO / "video" / build.DEFAULTS_FILE).read_text()) | fewer
    clip = pipe(text, generator=torch.Generator().manual_seed(seed), output_type="np", **arguments)[0][0]
    assert clip.shape == (25, 256, 256, 3)
    assert check_clip(clip, text).problems == []
    altered = altered_captions(parse_caption(text), random.Random(13))
    assert len(altered) >= 4
    assert not [wrong for wrong in altered.values() if check_clip(clip, wrong).ok]


def test_unknown_words_in_a_prompt_are_accepted(embedded):
    kind, pipe, _, arguments = embedded
    tiny = {**arguments, "num_inference_steps": 1, "height": 64, "width": 64, "output_type": "latent"}
    if kind == "video":
        tiny["num_frames"] = 5
    out = pipe("a photograph of an ünder zebra, 猫!", **tiny)[0]
    assert torch.isfinite(out).all()


def test_training_autoencoder_equals_the_pipelines():
    torch.manual_seed(0)
    config = build.smoke_config("video")
    vae = build.build_video_pipeline(config).vae
    clips = draw(SceneStream(True, CPU, 0, 0), config, 2, 64)
    with torch.no_grad():
        posterior, whole = vae.encode(clips).latent_dist, encode_clip(vae, clips)
        torch.testing.assert_close(whole.mean, posterior.mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(whole.logvar, posterior.logvar, atol=1e-5, rtol=1e-5)
        latents = torch.randn_like(whole.mean)
        torch.testing.assert_close(
            decode_clip(vae, latents).clamp(-1, 1), vae.decode(latents).sample, atol=1e-4, rtol=0
        )


def test_normalising_latents_keeps_the_reconstruction():
    torch.manual_seed(0)
    config = build.smoke_config("image")
    pipe = build.build_image_pipeline(config)
    stream = SceneStream(False, CPU, 0, 0)
    pictures = draw(stream, config, 8, config.size)
    with torch.no_grad():
        before = pipe.vae.decode(pipe.vae.encode(pictures).latent_dist.mode()).sample
        normalise_latents(pipe, config, stream)
        latents = pipe.vae.encode(pictures).latent_dist.mode()
        torch.testing.assert_close(pipe.vae.decode(latents).sample, before, atol=1e-3, rtol=0)
    assert latents.mean().abs() < 0.3 and 0.7 < latents.std() < 1.3


def test_training_text_embeddings_equal_the_pipelines():
    torch.manual_seed(0)
    texts = [caption(scene) for scene in held_out_scenes(3, clip=False)]
    pipe = build.build_image_pipeline(build.smoke_config("image"))
    ids = pipe.tokenizer_2(texts, padding="max_length", max_length=40, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(t5_embeddings(pipe, ids, 512), pipe.encode_prompt(texts)[0], atol=1e-4, rtol=1e-4)
    pipe = build.build_video_pipeline(build.smoke_config("video"))
    with torch.no_grad():
        mine = t5_embeddings(pipe, ids, 226)
        theirs = pipe.encode_prompt(texts, do_classifier_free_guidance=False)[0]
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_stretched_positions_at_full_size_equal_the_models():
    model = build.build_video_pipeline(build.smoke_config("video")).transformer
    own = model.rope(torch.zeros(1, 12, 5, 8, 8))
    for mine, theirs in zip(StretchedRope(model, 5, 4, 4)(own[0]), own, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(stretched_ids(4, 4, CPU), FluxPipeline._prepare_latent_image_ids(1, 4, 4, CPU, torch.float32))


def test_pipeline_above_the_size_limit_is_not_written(tmp_path):
    config = build.ImageConfig(single_blocks=12)
    with pytest.raises(ValueError, match="8,388,608"):
        build.save_pipeline(build.build_image_pipeline(config), tmp_path / "image", config)
    assert list(tmp_path.iterdir()) == []
