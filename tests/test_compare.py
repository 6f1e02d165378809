"""``dit-accel compare`` on tiny random pipelines: files, figures, errors and interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v2
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, WanPipeline
from PIL import Image
from tiny_pipelines import save_flux, save_wan
from torch import nn

from dit_accel import GNAAttnProcessor, LLSAAttnProcessor, describe, save_attention, set_attn_processor
from dit_accel.cli.app import main
from dit_accel.common.bundled import IMAGE, VIDEO, Embedded
from dit_accel.common.files import replacing
from dit_accel.comparison.metrics import compare_frames
from dit_accel.comparison.step_timer import StepTimer
from dit_accel.install.installation import installation_of

FLUX = ["--height", "32", "--width", "40", "--steps", "2"]


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("flux"))


def compare(out: Path, *arguments: str) -> tuple[int, dict]:
    """Exit status and report of the command."""
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--out", str(out), *arguments])
    return stop.value.code, json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def drawn(flux, tmp_path_factory):
    """A comparison of two prompts and four mechanisms, one of them twice."""
    out = tmp_path_factory.mktemp("drawn")
    specs = [
        arg for text in ("sla", "clear", "llsa:block_size=4,topk=2", "gna:window=3", "gna") for arg in ("--attn", text)
    ]
    status, report = compare(
        out, "--pipeline", str(flux), *FLUX, "--prompt", "a red circle", "--prompt", "a green square", *specs
    )
    return out, status, report


def test_finished_comparison_is_complete_with_dense_first(drawn):
    _, status, report = drawn
    assert status == 0 and report["status"] == "complete" and report["missing"] == []
    assert [entry["label"] for entry in report["attention"]] == ["dense", "sla", "clear", "llsa", "gna", "gna-2"]
    assert all(entry["status"] == "complete" and len(entry["pictures"]) == 2 for entry in report["attention"])
    assert report["prompts"] == ["a red circle", "a green square"]
    assert report["settings"]["grid"] == [8, 10] and report["settings"]["steps"] == 2
    again = report["dense_again"]
    assert again["over_first"] == pytest.approx(
        again["seconds_per_step"] / report["attention"][0]["mean"]["seconds_per_step"]
    )
    assert report["machine"]["dtype"] == "float32" and report["versions"]["torch"] == torch.__version__


def test_defaults_are_for_the_grid_that_runs(drawn):
    for entry in drawn[2]["attention"][1:]:
        assert "+8×10+" in entry["installed"]
    assert drawn[2]["attention"][5]["options"]["window"] == [3, 3]


def test_figures_match_the_pictures_on_disk(drawn):
    out, _, report = drawn
    dense = report["attention"][0]
    for entry in report["attention"][1:]:
        for picture, base in zip(entry["pictures"], dense["pictures"], strict=True):
            ours, theirs = (np.asarray(Image.open(out / p["file"]), dtype=np.float64) for p in (picture, base))
            assert ours.shape == (32, 40, 3)
            error = ((ours - theirs) ** 2).mean()
            assert picture["psnr"] == pytest.approx(10 * np.log10(255**2 / error), rel=1e-4)
            assert 0 < picture["ssim"] < 1 and picture["lpips"] is None
            assert picture["times_dense"] == pytest.approx(base["seconds_per_step"] / picture["seconds_per_step"])
        assert 0 < entry["logit_fraction"] < 1


def test_dense_pictures_are_those_of_the_plain_pipeline(drawn, flux):
    pipe = FluxPipeline.from_pretrained(flux)
    image = pipe(
        "a green square", height=32, width=40, num_inference_steps=2, generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(drawn[0] / "pictures" / "2-dense.png")))


def test_contact_sheet_has_every_picture(drawn):
    out, _, report = drawn
    sheet = np.asarray(Image.open(out / report["files"]["picture"]).convert("RGB"))
    assert sheet.shape[1] > 6 * 320
    cell = Image.open(out / "pictures" / "1-gna.png").resize((320, 256), Image.Resampling.BICUBIC)
    x, y = 32 + 4 * 340, find_row(sheet)
    assert np.array_equal(sheet[y : y + 256, x : x + 320], np.asarray(cell))


def find_row(sheet: np.ndarray) -> int:
    """First pixel row of the first cell: the row where most of its width is not white."""
    return next(y for y in range(len(sheet)) if (sheet[y, 32:352] != 255).any(-1).mean() > 0.95)


def test_clips_give_a_video_sheet_and_a_contact_sheet(tmp_path):
    wan = save_wan(tmp_path / "wan")
    out = tmp_path / "out"
    status, report = compare(
        out, "--pipeline", str(wan), "--height", "32", "--width", "48", "--frames", "9", "--steps", "2",
        "--prompt", "a red circle moving", "--attn", "gna:window=3x2x2", "--attn", "clear",
    )  # fmt: skip
    assert status == 0 and report["settings"]["grid"] == [3, 2, 3]
    assert all("3×2×3" in entry["installed"] for entry in report["attention"][1:])
    frames = [np.asarray(frame) for frame in imageio.v2.get_reader(out / "compare.mp4")]
    assert len(frames) == 9 and frames[0].shape[1] > 3 * 320
    assert Image.open(out / "compare.png").width == frames[0].shape[1]
    assert sum(1 for _ in imageio.v2.get_reader(out / "pictures" / "1-clear.mp4")) == 9


def test_options_override_defaults_json(tmp_path):
    folder = save_flux(tmp_path / "flux")
    defaults = {"height": 32, "width": 40, "num_inference_steps": 2, "max_sequence_length": 8, "guidance_scale": 2.0}
    (folder / "defaults.json").write_text(json.dumps(defaults))
    arguments = ["--pipeline", str(folder), "--prompt", "a", "--attn", "gna:window=3"]
    _, report = compare(tmp_path / "out", *arguments)
    settings = report["settings"]
    assert settings["steps"] == 2 and settings["grid"] == [8, 10]
    assert settings["call"] == {"height": 32, "width": 40, "max_sequence_length": 8, "guidance_scale": 2.0}
    assert "8+8×10+0" in report["attention"][1]["installed"]
    _, report = compare(tmp_path / "out", *arguments, "--height", "16", "--width", "16", "--steps", "1")
    assert report["settings"]["steps"] == 1 and report["settings"]["grid"] == [4, 4]
    assert report["settings"]["call"]["max_sequence_length"] == 8


def test_invalid_defaults_json_is_rejected(tmp_path, capsys):
    folder = save_flux(tmp_path / "flux")
    for text, message in (
        ('{"hight": 32}', "has hight, which FluxPipeline does not take"),
        ("[1", "is not valid JSON"),
    ):
        (folder / "defaults.json").write_text(text)
        with pytest.raises(SystemExit) as stop:
            main(["compare", "--pipeline", str(folder), "--out", str(tmp_path / "out")])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_logit_fraction_includes_dense_steps(flux, tmp_path):
    fractions = [
        compare(
            tmp_path, "--pipeline", str(flux), *FLUX, "--prompt", "a", "--attn", f"gna:window=3,dense_steps={dense}"
        )[1]["attention"][1]["logit_fraction"]
        for dense in (0, 1)
    ]
    assert fractions[1] == pytest.approx((1 + fractions[0]) / 2)


def test_other_mechanisms_run_if_one_fails(flux, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(LLSAAttnProcessor, "attend", fail)
    specs = ["--attn", "sla", "--attn", "llsa", "--attn", "gna:window=3"]
    status, report = compare(tmp_path, "--pipeline", str(flux), *FLUX, "--prompt", "a", *specs)
    assert status == 1 and report["status"] == "failed"
    assert [entry["status"] for entry in report["attention"]] == ["complete", "complete", "failed", "complete"]
    assert report["attention"][2]["error"] == "RuntimeError: out of luck"
    assert report["missing"] == [{"attention": "llsa", "prompt": 0, "status": "failed"}]
    assert (tmp_path / "compare.png").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_a_step_keeps_pictures_and_a_valid_report(flux, tmp_path, number, monkeypatch, capsys):
    """The third picture is cut short; the same with a process of its own is in the next test."""
    forward, out = FluxTransformer2DModel.forward, tmp_path / "out"

    def stop(self, *arguments, **options):
        if len(list(out.glob("pictures/*.png"))) == 2:
            os.kill(os.getpid(), number)
        return forward(self, *arguments, **options)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", stop)
    prompts = [arg for _ in range(4) for arg in ("--prompt", "a")]
    status, report = compare(out, "--pipeline", str(flux), *FLUX, *prompts, "--attn", "gna:window=3")
    assert status == 128 + number
    assert_interrupted(out, report, capsys.readouterr().err, number, of=8)
    assert [entry["status"] for entry in report["attention"]] == ["interrupted", "waiting"]
    assert len(report["attention"][0]["pictures"]) == 2


def assert_interrupted(out: Path, report: dict, errors: str, number: int, of: int) -> None:
    """Check the message, the report and the files of a stopped comparison of `of` pictures."""
    assert f"stopped by {signal.Signals(number).name}" in errors and "Traceback" not in errors
    finished = [picture for entry in report["attention"] for picture in entry["pictures"]]
    assert report["status"] == "interrupted"
    assert 2 <= len(finished) < of and len(report["missing"]) == of - len(finished)
    assert {entry["status"] for entry in report["attention"]} <= {"complete", "interrupted", "waiting"}
    for file in (*(picture["file"] for picture in finished), report["files"]["picture"]):
        Image.open(out / file).load()
    assert not [file for file in out.rglob(".*")]


@pytest.mark.sweep
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_keeps_pictures_and_a_valid_report(flux, tmp_path, number):
    command = [
        sys.executable, "-m", "dit_accel.cli", "compare", "--pipeline", str(flux), "--out", str(tmp_path / "out"),
        "--height", "32", "--width", "32", "--steps", "40", *(arg for _ in range(40) for arg in ("--prompt", "a")),
    ]  # fmt: skip
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        try:
            wait_for_pictures(tmp_path / "out" / "report.json", process, 2)
            process.send_signal(number)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 128 + number
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert_interrupted(tmp_path / "out", report, errors.decode(), number, of=200)


def wait_for_pictures(report: Path, process: subprocess.Popen, count: int) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if report.is_file() and sum(len(e["pictures"]) for e in json.loads(report.read_text())["attention"]) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {count} pictures in time")


def test_trained_attention_is_compared_as_saved(flux, tmp_path):
    """Its pictures are those of the pipeline with the file loaded; the next student runs on the original pipeline."""
    pipe = FluxPipeline.from_pretrained(flux)
    set_attn_processor(pipe, GNAAttnProcessor(window=3))
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    installation_of(pipe.transformer).overwritten["transformer_blocks.0.attn.to_q.weight"] = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(-3)
    save_attention(pipe, tmp_path / "mine")
    specs = ["--attn", str(tmp_path / "mine"), "--attn", "gna:window=3;window=5@single_"]
    status, report = compare(tmp_path / "out", "--pipeline", str(flux), *FLUX, "--prompt", "a red circle", *specs)
    assert status == 0
    _, trained, plain = report["attention"]
    assert (trained["label"], plain["label"]) == ("mine", "gna") and trained["source"] == str(tmp_path / "mine")
    assert trained["short"] == "gna, trained; window=3,stride=1" and plain["source"] is None
    assert trained["logit_fraction"] < plain["logit_fraction"] < 1
    assert plain["short"] == "window=3,stride=1 and others by layer"
    call = {"prompt": "a red circle", "height": 32, "width": 40, "num_inference_steps": 2, "output_type": "np"}
    drawn = pipe(**call, generator=torch.Generator().manual_seed(0))[0][0]
    picture = np.array(Image.open(tmp_path / "out" / trained["pictures"][0]["file"]))
    assert np.abs(picture - drawn * 255).max() <= 0.51
    assert not np.array_equal(picture, np.array(Image.open(tmp_path / "out" / plain["pictures"][0]["file"])))


@pytest.mark.parametrize(
    "name, message", [("no/such", "no attention file"), ("here", "layers that FluxTransformer2DModel lacks")]
)
def test_attention_trained_for_another_model_is_rejected(flux, tmp_path, capsys, name, message):
    (tmp_path / "no").mkdir()
    video = WanPipeline.from_pretrained(save_wan(tmp_path / "wan"))
    set_attn_processor(video, GNAAttnProcessor(window=3))
    save_attention(video, tmp_path / "here")
    command = ["compare", "--out", str(tmp_path / "out"), "--pipeline", str(flux), *FLUX]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--attn", str(tmp_path / name)])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_embedded_pipelines_default_to_their_conversions(tmp_path):
    embedded = Embedded("image", (), tmp_path)
    (tmp_path / "conversions/image/gna").mkdir(parents=True)
    assert embedded.students(["sla", "gna"]) == ["sla", str(tmp_path / "conversions/image/gna")]


def test_attention_context_restores_an_earlier_install(flux):
    from dit_accel.install.installation import attention

    pipe = FluxPipeline.from_pretrained(flux)
    set_attn_processor(pipe, GNAAttnProcessor(window=3))
    before = describe(pipe)
    with attention(pipe, GNAAttnProcessor(window=5)):
        assert describe(pipe) != before
    assert describe(pipe) == before


@pytest.mark.parametrize("embedded", [IMAGE, VIDEO])
def test_default_prompts_are_held_out_captions(embedded):
    from dit_accel.demo.scenes.scene import caption, is_held_out, parse_caption

    for prompt in embedded.prompts:
        scene = parse_caption(prompt)
        assert caption(scene) == prompt
        assert is_held_out(scene)


def test_metrics_of_equal_and_different_frames():
    frames = np.random.default_rng(0).integers(0, 255, (2, 32, 24, 3), dtype=np.uint8)
    same = compare_frames(frames, frames)
    assert same == {"psnr": None, "ssim": 1.0, "lpips": None}
    one_level = compare_frames(frames + np.uint8(1), frames)
    assert one_level["psnr"] == pytest.approx(20 * np.log10(255), rel=1e-5)
    noise = compare_frames(frames[::-1], frames)
    assert noise["ssim"] < 0.1 and noise["psnr"] < 12
    assert compare_frames(frames[:, :8, :8], frames[:, :8, :8])["ssim"] is None
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_frames(frames, frames[:1])


def test_step_timer_sums_calls_per_step_and_removes_hooks():
    class Sleeper(nn.Module):
        def forward(self, seconds: float) -> float:
            time.sleep(seconds)
            return seconds

    model = Sleeper()
    with StepTimer([model], torch.device("cpu")) as timer:
        for seconds in (0.03, 0.03, 0.01, 0.03, 0.2, 0.2):  # three steps of two calls each
            model(seconds)
            assert timer.forwards[-1] >= seconds
    first, second, third = (sum(timer.forwards[i : i + 2]) for i in (0, 2, 4))
    assert timer.seconds_per_step(3) == sorted((first, second, third))[1]
    assert timer.seconds_per_step(4) == pytest.approx(sum(timer.forwards) / 4)
    assert not model._forward_hooks and not model._forward_pre_hooks
    with pytest.raises(RuntimeError, match="never called its denoiser"):
        StepTimer([model], torch.device("cpu")).seconds_per_step(1)


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_unbounded_radius_is_written_to_the_report(flux, tmp_path):
    status, report = compare(tmp_path, "--pipeline", str(flux), *FLUX, "--prompt", "a", "--attn", "clear:radius=3xinf")
    assert status == 0 and report["attention"][1]["options"]["radius"] == [3.0, "inf"]


def test_drift_of_dense_gives_a_warning(flux, tmp_path, monkeypatch, capsys):
    from dit_accel.comparison import run as module

    for slower, warned in ((1.1, False), (2.0, True), (0.5, True)):
        monkeypatch.setattr(
            module,
            "_time_dense_again",
            lambda comparison, slower=slower: slower * comparison.report.variants[0].mean("seconds_per_step"),
        )
        _, report = compare(tmp_path, "--pipeline", str(flux), *FLUX, "--prompt", "a", "--attn", "sla")
        assert report["dense_again"]["over_first"] == pytest.approx(slower)
        assert ("are not comparable" in capsys.readouterr().out) is warned
