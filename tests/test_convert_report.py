"""Evaluation of conversions: the command, the report after training, the model card and the upload."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from tiny_pipelines import save_flux, save_sd
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

import dit_accel
from dit_accel.cli.app import main
from dit_accel.common.bundled import IMAGE
from dit_accel.comparison import metrics
from dit_accel.conversion import card, finish
from dit_accel.conversion.data.samples import read_sample
from dit_accel.conversion.evaluate import Evaluation
from dit_accel.conversion.recipes.noise import noise_process
from dit_accel.conversion.recipes.objective import attention_outputs
from dit_accel.conversion.request import Source
from dit_accel.demo.scenes.vocabulary import build_clip_tokenizer
from dit_accel.install.installation import denoisers, installed_layers
from dit_accel.mechanisms.attn_spec import parse_attention


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    words = folder / "prompts.txt"
    words.write_text("a red circle\n\na green square moving\n")
    made = {"flux": save_flux(folder / "flux"), "sd": save_sd(folder / "sd")}
    for path in made.values():
        (path / "defaults.json").write_text('{"num_inference_steps": 3}')
    return made | {"prompts": words}


def run(*given):
    """Run the command and return its exit status."""
    with pytest.raises(SystemExit) as stopped:
        main([str(x) for x in given])
    return stopped.value.code


SMALL = ("--data-free", "--height", "32", "--width", "32", "--device", "cpu")


def convert(pipelines, out, *more):
    given = ("--pipeline", pipelines["flux"], "--prompts", pipelines["prompts"], "--attn", "gna:window=3", "--out", out)
    few = ("--samples", 2, "--batch", 1, "--steps", 2, "--warmup", 1)
    return run("convert", *given, *SMALL, *few, *more)


def evaluate(pipelines, attention, out, *more, which="flux"):
    given = ("--pipeline", pipelines[which], "--prompts", pipelines["prompts"], "--out", out, "--attn", attention)
    return run("evaluate", *given, *SMALL, "--samples", 2, "--levels", 3, *more)


def test_student_equal_to_its_teacher_has_no_error(pipelines, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(pipelines["flux"])
    pipe.set_attn_processor(dit_accel.GNAAttnProcessor(window=8))
    dit_accel.save_attention(pipe, tmp_path / "student")
    assert evaluate(pipelines, tmp_path / "student", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out/evaluate.json").read_text())
    assert abs(found["flow_loss"]["student_over_teacher"] - 1) < 1e-6 and found["prediction_error"] < 1e-10
    assert len(found["attention_error"]) == 4 and max(found["attention_error"].values()) < 1e-10
    # None = equal; 83 dB is one of 3,072 8-bit values off by one, since the two sums are rounded differently
    assert all(picture["psnr"] is None or picture["psnr"] > 82 for picture in found["pictures"])
    assert found["logit_fraction"] == 1.0


@pytest.mark.parametrize("which", ["flux", "sd"])
def test_evaluate_agrees_with_a_direct_computation(pipelines, tmp_path, which):
    """The same figures are computed here from the two models."""
    pipe = DiffusionPipeline.from_pretrained(pipelines[which])
    pipe.set_attn_processor(dit_accel.GNAAttnProcessor(window=2))
    dit_accel.save_attention(pipe, tmp_path / "student")
    assert evaluate(pipelines, tmp_path / "student", tmp_path / "out", "--pictures", "1", which=which) == 0
    found = json.loads((tmp_path / "out/evaluate.json").read_text())
    assert sorted(x.name for x in (tmp_path / "out").iterdir() if x.suffix == ".png") == [
        "evaluate.png",
        "picture-0.png",
    ]
    student = next(iter(denoisers(pipe).values()))
    teacher = next(iter(denoisers(DiffusionPipeline.from_pretrained(pipelines[which])).values()))
    layer = next(iter(installed_layers(student)))
    process, errors, flows, attention = noise_process(pipe.scheduler), [], [], []
    for i, level in itertools.product(range(2), (1 / 6, 0.5, 5 / 6)):
        sample = read_sample(tmp_path / f"out/samples/{i:06d}.safetensors")
        noise = torch.randn(sample.latents.shape, generator=torch.Generator().manual_seed(1_000_000 + i))
        noisy, target = process.mix(sample.latents, noise, torch.tensor([level]))
        arguments = sample.conditions.arguments(noisy, process.timestep(torch.tensor([level])))
        with torch.no_grad(), attention_outputs(student, [layer]) as a, attention_outputs(teacher, [layer]) as b:
            ours, theirs = (model.eval()(**arguments)[0] for model in (student, teacher))
        attention.append((a[layer] - b[layer]).square().sum() / b[layer].square().sum())
        if level == 0.5:
            errors.append((ours - theirs).square().sum() / theirs.square().sum())
            flows.append((ours - target).square().mean())
    row = found["by_level"][1]
    assert row["level"] == 0.5 and row["prediction_error"] > 1e-5
    assert row["prediction_error"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-3)
    assert row["student"] == pytest.approx(float(torch.stack(flows).mean()), rel=1e-4)
    assert found["attention_error"][layer] == pytest.approx(float(torch.stack(attention).mean()), rel=1e-3)
    assert 0 < found["logit_fraction"] < 1 and found["pictures"][0]["psnr"] > 0


def test_missing_student_is_reported(pipelines, tmp_path, capsys):
    assert evaluate(pipelines, tmp_path / "nothing", tmp_path / "out", "--samples", "1") == 2
    assert "no attention file" in capsys.readouterr().err


def test_untrained_attention_is_measured_like_a_saved_one(pipelines, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(pipelines["flux"])
    pipe.set_attn_processor(dit_accel.GNAAttnProcessor(window=2))
    dit_accel.save_attention(pipe, tmp_path / "student")
    assert evaluate(pipelines, tmp_path / "student", tmp_path / "saved", "--pictures", "0") == 0
    more = ("--pictures", "0", "--batch", "2")  # two levels per pass, then one
    assert evaluate(pipelines, "gna:window=2", tmp_path / "named", *more) == 0
    saved, named = (json.loads((tmp_path / x / "evaluate.json").read_text()) for x in ("saved", "named"))
    for one, other in zip(saved["by_level"], named["by_level"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert saved["attention_error"] == pytest.approx(named["attention_error"], rel=1e-4)
    assert saved["mechanisms"] == named["mechanisms"] == [str(dit_accel.GNAAttnProcessor(window=2))]


@pytest.mark.parametrize(
    "student, more, message",
    [
        ("gnu", (), "unknown attention 'gnu'"),
        ("gna:window=2", ("--captions", "3"), "--captions is for pipelines that"),
        ("gna:window=2", ("--mixed-precision", "int8"), "expected one of no, fp16, bf16, got 'int8'"),
    ],
)
def test_invalid_evaluation_is_refused_before_any_work(pipelines, tmp_path, capsys, student, more, message):
    assert evaluate(pipelines, student, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out/samples").exists()


def test_captions_are_checked_once_per_model(pipelines, tmp_path):
    """The check runs once for the teacher and once for each student, on the pipeline in that state."""
    calls = []

    def check(pipe, call, count, note):
        calls.append(len(installed_layers(pipe.transformer)))
        note(count)
        return [True, True, False, True] if len(calls) == 1 else [True, False, True, False]

    source = Source(
        pipeline=str(pipelines["flux"]), prompts=("a red circle",), samples=1, height=32, width=32, seed=7,
        device="cpu", out=tmp_path / "teacher",
    )  # fmt: skip
    source.out.mkdir()
    evaluation = Evaluation(source, Console(quiet=True), levels=2, pictures=0, check=check, captions=4)
    before = {name: x.clone() for name, x in evaluation.model.state_dict().items()}
    reports = [evaluation.measure(parse_attention(x), tmp_path / x[:3]) for x in ("gna:window=3", "clear:radius=2")]
    assert calls == [0, 4, 4]
    assert all(torch.equal(before[name], x) for name, x in evaluation.model.state_dict().items())
    wanted = {"captions": 4, "teacher": 0.75, "student": 0.5, "both": 0.25, "points": -25.0}
    assert [report["prompt_check"] for report in reports] == [wanted, wanted]
    assert reports[0]["prediction_error"] != reports[1]["prediction_error"]


def test_card_lists_options_training_and_evaluation(pipelines, tmp_path):
    out = tmp_path / "my-gna"
    assert convert(pipelines, out, "--report", "2", "--accumulate", "2") == 0
    report = json.loads((out / "report/evaluate.json").read_text())
    assert report["samples"] == 2 and report["seed"] == 1_000_000 and len(report["pictures"]) == 2
    text = (out / "README.md").read_text()
    front = text.split("---")[1]
    assert "library_name: diffusers" in front and "- gna" in front and "base_model" not in front  # local pipeline
    loss = report["flow_loss"]
    for line in (
        "GNA attention for `flux`, fine-tuned with dit-accel. Per-layer options: table below.",
        "| all converted layers | `window=3` |", 'dit_accel.load_attention(pipe, "my-gna")', "SLA, arXiv 2509.24006",
        "2 samples drawn by the teacher", f"{loss['teacher']:.5f}", f"{loss['student']:.5f}", "report/picture-1.png",
        "| steps | 2 |", "| 1 × 1 × 2 |",
    ):  # fmt: skip
        assert line in text, line
    pipe = DiffusionPipeline.from_pretrained(pipelines["flux"])
    dit_accel.load_attention(pipe, out)  # the folder with all other files
    assert convert(pipelines, out, "--report", "0", "--accumulate", "2") == 0  # nothing is left to train
    assert (out / "README.md").read_text() == text  # with the report


class Hub:
    """A hub that records uploads."""

    def __init__(self, known=True):
        self.known, self.calls = known, []

    def whoami(self):
        if not self.known:
            raise OSError("no token")

    def create_repo(self, name, **options):
        self.calls.append((name, options))
        return f"https://hub/{name}"

    def upload_folder(self, **options):
        self.calls.append(options)


def test_upload_has_attention_card_and_report(pipelines, tmp_path, monkeypatch, capsys):
    hub = Hub()
    monkeypatch.setattr(card, "HfApi", lambda: hub)
    assert convert(pipelines, tmp_path, "--report", "1", "--push-to-hub", "me/mine") == 0
    (name, options), upload = hub.calls
    assert name == "me/mine" and options == {"private": True, "exist_ok": True}
    assert upload["repo_id"] == "me/mine" and upload["folder_path"] == tmp_path
    from huggingface_hub.utils import filter_repo_objects

    names = [x.relative_to(tmp_path).as_posix() for x in tmp_path.rglob("*") if x.is_file()]
    sent = sorted(filter_repo_objects(names, allow_patterns=upload["allow_patterns"]))
    assert sent == [
        "README.md", "convert.json", "dit_accel.safetensors", "report/evaluate.json", "report/evaluate.png",
        "report/picture-0.png", "report/picture-1.png",
    ]  # fmt: skip
    assert "Uploaded to https://hub/me/mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, known, message", [("mine", True, "takes owner/name"), ("me/mine", False, "run: hf auth login")]
)
def test_unusable_hub_is_refused_before_any_work(pipelines, tmp_path, monkeypatch, capsys, name, known, message):
    monkeypatch.setattr(card, "HfApi", lambda: Hub(known))
    assert convert(pipelines, tmp_path / "out", "--push-to-hub", name) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out/samples").exists()


def test_only_the_main_process_writes_the_report(monkeypatch):
    monkeypatch.setattr(finish, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    finish.finish(None, 8, None, None)


def test_clip_score_is_the_cosine_with_weights_else_none(tmp_path, monkeypatch):
    """With a tiny CLIP instead of the hub's."""
    frames = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    assert metrics.clip_score(frames, "a red circle") is None
    tokenizer = build_clip_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 16}, projection_dim=8)
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    square = {"height": 32, "width": 32}
    processor = CLIPProcessor(CLIPImageProcessor(size=square, crop_size=square), tokenizer)
    processor.save_pretrained(tmp_path)
    monkeypatch.setattr(metrics, "clip_weights", lambda: tmp_path)
    given = processor(
        text=["a red circle"] * 2, images=[torch.from_numpy(x).permute(2, 0, 1) for x in frames], return_tensors="pt",
        padding=True,
    )  # fmt: skip
    with torch.no_grad():
        outputs = model(**given)
    wanted = 100 * (outputs.image_embeds * outputs.text_embeds).sum(-1).mean().clamp(min=0)
    assert metrics.clip_score(frames, "a red circle") == pytest.approx(float(wanted), abs=1e-3)


def test_caption_check_accepts_the_embedded_pipeline():
    from dit_accel.api import _prompt_check

    assert callable(_prompt_check(str(IMAGE.folder)))
