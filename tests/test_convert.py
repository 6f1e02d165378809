"""Conversion of tiny pipelines: trained parameters, saved files, noise processes and messages for invalid input."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_pipelines import save_flux, save_sd, save_wan

import dit_accel
from dit_accel.cli.app import main
from dit_accel.conversion import trainer
from dit_accel.conversion.checkpoint import load_checkpoint
from dit_accel.conversion.data.samples import batches, read_sample
from dit_accel.conversion.recipes.noise import NoiseProcess, noise_process
from dit_accel.install.installation import denoisers, installed_layers

COMMON = (
    "--device", "cpu", "--height", "32", "--width", "32", "--samples", "4", "--batch", "2", "--steps", "4",
    "--save-every", "2", "--warmup", "2", "--report", "0",
)  # fmt: skip

STEPS = 3  # of a drawing


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    words = folder / "prompts.txt"
    words.write_text("a red circle\n\na green square moving\n")
    made = {"flux": save_flux(folder / "flux"), "wan": save_wan(folder / "wan"), "sd": save_sd(folder / "sd")}
    for path in made.values():
        (path / "defaults.json").write_text(json.dumps({"num_inference_steps": STEPS}))
    return made | {"prompts": words}


@pytest.fixture(scope="module")
def drawn(pipelines, tmp_path_factory):
    """Samples drawn by the tiny Flux, for runs that only train."""
    out = tmp_path_factory.mktemp("drawn")
    assert convert(pipelines, out, "--steps", "1") == 0
    return out / "samples"


def convert(pipelines, out, *more, which="flux", attn="gna:window=3", data=("--data-free",)):
    """Run the command and return its exit status."""
    given = ["convert", "--pipeline", str(pipelines[which]), "--attn", attn, "--out", str(out), *data]
    given += ["--prompts", str(pipelines["prompts"])] if data == ("--data-free",) else []
    with pytest.raises(SystemExit) as stopped:
        main([*given, *COMMON, *more])
    return stopped.value.code


def read_about(out):
    return json.loads((out / "convert.json").read_text())


def link_samples(drawn, out):
    out.mkdir()
    (out / "samples").symlink_to(drawn)
    return out


@pytest.mark.parametrize(
    "which, attn, more",
    [
        ("flux", "clear:radius=2;radius=3@single_", ()),
        ("wan", "sla:critical=0.3,block_q=8,block_kv=8", ("--frames", "5")),
        ("sd", "gna:window=3", ("--recipe", "clear", "--gradient-checkpointing", "--accumulate", "2")),
        ("sd", "linfusion", ("--train", "new")),
    ],
)
def test_every_family_converts_and_loads(pipelines, tmp_path, which, attn, more):
    """Trained weights differ from the teacher's, loading restores the trained student, and a reset the teacher."""
    assert convert(pipelines, tmp_path, *more, which=which, attn=attn) == 0
    about = read_about(tmp_path)
    assert about["status"] == "complete" and about["steps"] == 4 and len(about["history"]) == 4
    wanted = {"loss", "flow"} | ({"prediction", "attention"} if about["recipe"]["name"] == "clear" else set())
    assert set(about["history"][0]) == wanted
    pipe = DiffusionPipeline.from_pretrained(pipelines[which])
    model = next(iter(denoisers(pipe).values()))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    dit_accel.load_attention(pipe, tmp_path)
    if ";" in attn:  # the options of each layer
        radii = {name: layer.mechanism.radius for name, layer in installed_layers(model).items()}
        assert len(set(radii.values())) == 2 and all(x == 2 + ("single_" in name) for name, x in radii.items())
    trained = load_checkpoint(tmp_path)["parameters"]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], x) for name, x in trained.items())
    moved = [name for name in trained if name in before and not torch.equal(before[name], trained[name])]
    if more == ("--train", "new"):  # only the mechanism's own parameters, which are 0 at first
        assert not moved and any(x.any() for name, x in trained.items() if name.endswith("to_q_.3.weight"))
    else:
        assert moved
    if about["recipe"]["name"] == "clear":  # only the attention layers
        assert len(trained) < len(before) and all(".attn" in name for name in trained)
    dit_accel.reset_attn_processor(pipe)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_losses_are_exact_with_a_full_window(pipelines, drawn, tmp_path):
    """A full window is dense attention: distances to the teacher are 0 before the first step, and the flow loss is
    the teacher's."""
    out = link_samples(drawn, tmp_path / "o")
    assert convert(pipelines, out, "--recipe", "clear", "--steps", "1", attn="gna:window=8") == 0
    first = read_about(out)["history"][0]
    assert first["prediction"] < 1e-10 and first["attention"] < 1e-10 and first["flow"] > 0.01


@pytest.mark.parametrize("which, more, wide", [("flux", (), 32), ("wan", ("--frames", "5"), 128)])
def test_pictures_show_teacher_left_and_student_right(pipelines, tmp_path, which, more, wide):
    """Left, the teacher's drawing of this seed; right, the student's, which changes with training."""
    size = ("--samples", "1", "--batch", "1", "--lr", "0.1", "--steps", "2", "--sample-every", "2")
    assert convert(pipelines, tmp_path, *size, *more, which=which, attn="gna:window=2") == 0
    names = [f"step-{step:06d}-{i}.png" for step in (0, 2) for i in (0, 1)]  # 0: untrained
    assert sorted(x.name for x in (tmp_path / "pictures").iterdir()) == names
    first = np.array(Image.open(tmp_path / "pictures/step-000000-0.png"))
    picture = np.array(Image.open(tmp_path / "pictures/step-000002-0.png")).astype(int)
    assert picture.shape == (32, 2 * wide, 3)
    pipe = DiffusionPipeline.from_pretrained(pipelines[which])
    call = {"prompt": "a red circle", "generator": torch.Generator().manual_seed(0), "height": 32, "width": 32}
    call |= {"num_inference_steps": STEPS} | ({"num_frames": 5} if which == "wan" else {})
    drawn = pipe(**call, output_type="np")[0][0]
    drawn = np.concatenate(list(drawn[[0, 1, 3, 4]]), 1) if which == "wan" else drawn
    assert np.abs(picture[:, :wide] - drawn * 255).max() <= 1
    assert np.abs(picture[:, :wide] - picture[:, wide:]).max() > 1
    assert np.array_equal(first[:, :wide], picture[:, :wide])
    with dit_accel.attention(pipe, dit_accel.GNAAttnProcessor(window=2)):
        call["generator"] = torch.Generator().manual_seed(0)
        untrained = pipe(**call, output_type="np")[0][0]
    untrained = np.concatenate(list(untrained[[0, 1, 3, 4]]), 1) if which == "wan" else untrained
    assert np.abs(first[:, wide:] - untrained * 255).max() <= 1


@pytest.mark.parametrize("where", ["attention", "blocks"])
def test_lora_is_saved_as_factors_and_merged_on_load(pipelines, tmp_path, where):
    """Each weight is the pretrained one plus the product, also after a second load; a reset restores it bitwise."""
    more = ("--train", "lora", "--rank", "2", "--lr", "0.05", "--lora-layers", where)
    assert convert(pipelines, tmp_path, *more, attn="sla:critical=0.3,block_q=8,block_kv=8") == 0
    trained = load_checkpoint(tmp_path)["parameters"]
    assert all(".lora_" in name or ".dit_accel." in name for name in trained) and len(trained) > 10
    pipe = DiffusionPipeline.from_pretrained(pipelines["flux"])
    before = {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
    for _ in range(2):
        report = dit_accel.load_attention(pipe, tmp_path)
    changed = [
        name for name, x in pipe.transformer.state_dict().items() if name in before and not x.equal(before[name])
    ]
    assert sorted(changed) == sorted(report.parts[0].overwritten) and len(changed) > 5
    linear = [name for name, part in pipe.transformer.named_modules() if isinstance(part, torch.nn.Linear)]
    pattern = ".attn." if where == "attention" else "_blocks."
    assert {key.removesuffix(".weight") for key in report.parts[0].overwritten} == {x for x in linear if pattern in x}
    for name in changed:
        down, up = (
            trained[name.replace(".weight", f".lora_{x}.conversion.weight")] for x in ("A", "B")
        )  # fmt: skip
        assert torch.equal(pipe.transformer.get_parameter(name), before[name] + up @ down)
    dit_accel.reset_attn_processor(pipe)
    assert all(torch.equal(before[name], x) for name, x in pipe.transformer.state_dict().items())


def test_lora_of_another_shape_is_refused(pipelines, tmp_path):
    more = ("--train", "lora", "--rank", "2", "--steps", "1", "--save-dtype", "bfloat16")
    assert convert(pipelines, tmp_path, *more) == 0
    file = tmp_path / "dit_accel.safetensors"
    with safe_open(file, "pt") as held:
        tensors, about = {key: held.get_tensor(key) for key in held.keys()}, held.metadata()  # noqa: SIM118
    assert {x.dtype for x in tensors.values()} == {torch.bfloat16}
    pipe = DiffusionPipeline.from_pretrained(pipelines["flux"])
    key = next(key for key in tensors if key.endswith("lora_B"))
    assert tensors[key.replace("lora_B", "lora_A")].shape == (2, 32)
    for changed in ({k: x for k, x in tensors.items() if k != key}, tensors | {key: torch.zeros(16, 3)}):
        save_file(changed, file, about)
        with pytest.raises(ValueError, match=r"the LoRA of .* has factors \(2, 32\) and (none|\(16, 3\)); expected"):
            dit_accel.load_attention(pipe, tmp_path)
    save_file(tensors, file, about)
    pipe.transformer.add_adapter(LoraConfig(r=1, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"unload or fuse the LoRA first"):
        dit_accel.load_attention(pipe, tmp_path)


def test_cosine_ends_at_zero_and_progress_is_logged_to_a_file(pipelines, drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "_LOG_INTERVAL", 0.0)
    out = link_samples(drawn, tmp_path / "o")
    assert convert(pipelines, out, "--lr-schedule", "cosine", "--steps", "4", "--save-every", "3") == 0
    third, last = (torch.load(out / f"checkpoint{x}.pt") for x in (".previous", ""))
    assert (third["step"], last["step"]) == (3, 4)
    assert all(torch.equal(x, last["parameters"][name]) for name, x in third["parameters"].items())
    assert "step 2 of 4: loss " in capsys.readouterr().out
    assert convert(pipelines, out, "--lr-schedule", "cosine", "--steps", "6") == 2  # the schedule depends on it
    assert "holds another conversion (steps 4, now 6" in capsys.readouterr().err
    assert convert(pipelines, tmp_path / "p", "--lr-schedule", "linear") == 2
    assert "--lr-schedule: expected one of constant, cosine, got 'linear'" in capsys.readouterr().err


def test_nan_loss_stops_and_keeps_the_last_checkpoint(pipelines, drawn, tmp_path, capsys):
    out = link_samples(drawn, tmp_path / "o")
    assert convert(pipelines, out, "--lr", "1e30", "--steps", "30", "--warmup", "0", "--save-every", "1") == 1
    assert "smaller --lr" in capsys.readouterr().err
    assert all(x.isfinite().all() for x in load_checkpoint(out)["parameters"].values())


def pictures(folder):
    """Four valid pictures with both kinds of captions, a damaged one, and one without a caption."""
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (40 + 8 * i, 48), (50 * i, 90, 120)).save(folder / f"{i}.png")
    for i in range(3):
        (folder / f"{i}.txt").write_text("a red circle")
    (folder / "metadata.jsonl").write_text('{"file_name": "3.png", "text": "a green square"}\n')
    (folder / "torn.jpg").write_bytes(b"\xff\xd8 no picture")
    (folder / "torn.txt").write_text("a circle")
    Image.new("RGB", (40, 40)).save(folder / "untold.png")
    return folder


@pytest.mark.parametrize("which", ["flux", "sd"])
def test_samples_of_data_are_the_autoencoders_latents(pipelines, tmp_path, which, capsys):
    """Latents are those of the autoencoder; unusable pictures are skipped and counted."""
    folder, out = pictures(tmp_path / "data"), tmp_path / "out"
    assert convert(pipelines, out, "--steps", "1", which=which, data=("--data", str(folder))) == 0
    output = capsys.readouterr().out
    assert "Skipped 1 pictures without a caption" in output and "Skipped 1 pictures that cannot be read" in output
    assert list(json.loads((out / "samples/skipped.json").read_text())) == [str(folder / "torn.jpg")]
    files = sorted((out / "samples").glob("*.safetensors"))
    assert len(files) == 4
    pipe = DiffusionPipeline.from_pretrained(pipelines[which])
    pixels = torch.full((1, 3, 32, 32), 0.0)
    pixels[:] = torch.tensor([0, 90, 120]).view(1, 3, 1, 1) / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    found = read_sample(files[0]).latents
    if which == "flux":
        found = pipe._unpack_latents(found, 32, 32, pipe.vae_scale_factor)
    torch.testing.assert_close(found, latents, atol=1e-5, rtol=1e-5)


def test_noise_process_agrees_with_the_scheduler(pipelines):
    """Noisy latents equal those of the scheduler's ``add_noise`` or ``scale_noise``."""
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    sd = DiffusionPipeline.from_pretrained(pipelines["sd"]).scheduler
    process, levels = noise_process(sd), torch.tensor([0.1005, 0.9005])
    noisy, target = process.mix(clean, noise, levels)
    steps = process.timestep(levels).long()
    torch.testing.assert_close(noisy, sd.add_noise(clean, noise, steps))
    torch.testing.assert_close(
        target, noise if process.prediction == "epsilon" else sd.get_velocity(clean, noise, steps)
    )
    flux = DiffusionPipeline.from_pretrained(pipelines["flux"]).scheduler
    process = noise_process(flux)
    level = flux.sigmas[[100, 700]]
    noisy, target = process.mix(clean, noise, level)
    torch.testing.assert_close(noisy, flux.scale_noise(clean, flux.timesteps[[100, 700]], noise))
    torch.testing.assert_close(process.timestep(level), flux.timesteps[[100, 700]])
    torch.testing.assert_close(target, noise - clean)


def test_levels_follow_the_sampling_option():
    generator = torch.Generator().manual_seed(0)
    for sampling, quarter, middle in (("shift", 0.014, 0.75), ("uniform", 0.25, 0.5), ("mixed", 0.132, 0.665)):
        process = NoiseProcess("flow", 1000, shift=3.0, sampling=sampling)
        drawn = torch.tensor([process.draw(generator) for _ in range(4000)])
        assert drawn.min() > 0 and drawn.max() < 1
        assert float((drawn < 0.25).float().mean()) == pytest.approx(quarter, abs=0.03)
        assert float(drawn.median()) == pytest.approx(middle, abs=0.03)


def test_batches_have_one_kind_and_epochs_all_samples():
    kinds = ["a"] * 5 + ["b"] * 3
    drawn = batches(kinds, 2, seed=3)
    for _ in range(3):
        epoch = [next(drawn) for _ in range(5)]
        assert {i for batch in epoch for i in batch} == set(range(8))
        assert all(len({kinds[i] for i in batch}) == 1 and len(batch) == 2 for batch in epoch)
    one, two = batches(kinds, 2, seed=5), batches(kinds, 2, seed=5)
    assert [next(one) for _ in range(20)] == [next(two) for _ in range(20)]


@pytest.mark.parametrize(
    "more, message",
    [
        (("--recipe", "nothing"), "--recipe: expected one of sla, clear"),
        (("--recipe", "claer"), "got 'claer'; did you mean 'clear'?"),
        (("--train", "some"), "new, attention, lora, full"),
        (("--train", "lora", "--lora-layers", "all"), "--lora-layers: expected one of attention, blocks"),
        (("--train", "full", "--lora-layers", "blocks"), "--lora-layers blocks needs --train lora"),
        (("--save-dtype", "int8"), "--save-dtype: expected one of float32, bfloat16, float16, got 'int8'"),
        (("--train", "new"), "adds no parameters"),
        (("--attn", "clear:radius=3;radius=4@nowhere"), "selects no self-attention layer: nowhere"),
        (("--height", "30"), "30"),
        (("--mixed-precision", "fp8"), "no, fp16, bf16"),
        (("--device", "tpu"), "takes cpu"),
        (("--lr", "0"), "--lr must be above 0"),
        (("--timestep-sampling", "even"), "--timestep-sampling: expected one of shift, uniform, mixed"),
        (("--caption-dropout", "1"), "--caption-dropout takes a share from 0 to below 1"),
        (
            ("--loss-weight", "flow"),
            "NAME one of flow, prediction, variance, attention and WEIGHT >= 0",
        ),
        (("--loss-weight", "prediction=-1"), "got 'prediction=-1'"),
        (("--loss-weight", "matching=1"), "got 'matching=1'"),
        (("--loss-weight", "flow=0"), "leaves no loss to train with"),
        (
            ("--recipe", "linvideo", "--loss-weight", "flow=1"),
            "sets the losses of each of its stages: leave --loss-weight out",
        ),
        (("--recipe", "linvideo", "--cuda-graph"), "changes its losses at every step: leave --cuda-graph out"),
        (("--cuda-graph",), "--cuda-graph needs a CUDA GPU, accelerate found cpu"),
        (("--tracker", "nowhere"), "--tracker nowhere is not installed"),
        (("--prompts", "/nowhere.txt"), "no file /nowhere.txt"),
    ],
)
def test_invalid_input_is_refused_before_any_work(pipelines, tmp_path, more, message, capsys):
    assert convert(pipelines, tmp_path, "--samples", "1", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: None, "there is no folder"),
        (lambda folder: folder.mkdir(), "no picture with a caption"),
        (lambda folder: (folder.mkdir(), (folder / "metadata.jsonl").write_text("{")), "metadata.jsonl, line 1"),
        (
            lambda folder: (folder.mkdir(), (folder / "a.png").write_bytes(b"x"), (folder / "a.txt").write_text("a")),
            "none of 1 pictures can be read",
        ),
    ],
)
def test_folder_without_usable_data_is_refused(pipelines, tmp_path, make, message, capsys):
    make(tmp_path / "data")
    assert convert(pipelines, tmp_path / "out", data=("--data", str(tmp_path / "data"))) == 2
    assert message in capsys.readouterr().err
