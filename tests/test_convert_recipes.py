"""Recipes with several losses and stages: losses, selected layers, and resuming."""

import copy
import io
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils.other import has_compiled_regions, is_compiled_module
from diffusers import DDIMScheduler, DiffusionPipeline
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from tiny_pipelines import save_flux, save_sd, save_wan
from two_processes import finish, fork_both, start

import dit_accel
from dit_accel.cli.app import main
from dit_accel.common.errors import BadInput
from dit_accel.conversion.checkpoint import NAME
from dit_accel.conversion.data.samples import Sample
from dit_accel.conversion.parallel.launch import new_parallel
from dit_accel.conversion.recipes.capture import capture
from dit_accel.conversion.recipes.noise import noise_process
from dit_accel.conversion.recipes.objective import attention_outputs
from dit_accel.conversion.recipes.recipe import RECIPES, reweighted
from dit_accel.conversion.recipes.stages import plan
from dit_accel.conversion.request import Request, Source
from dit_accel.conversion.run import run
from dit_accel.conversion.trainer import Trainer
from dit_accel.install.installation import denoisers, installed_layers
from dit_accel.mechanisms.attn_spec import parse_attention

SLA = "sla:critical=0.3,block_q=8,block_kv=8"
CALL = {"height": 32, "width": 32}
FLUX_LAYERS = [f"{kind}transformer_blocks.{i}.attn" for kind in ("", "single_") for i in (0, 1)]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {"flux": save_flux(folder / "flux"), "wan": save_wan(folder / "wan"), "sd": save_sd(folder / "sd")}


class Drawn(list):
    """Samples in memory, all of one kind."""

    @property
    def kinds(self):
        return [0] * len(self)


def make_request(pipeline, out, recipe, attn=SLA, **overrides):
    """A request of six steps with two samples each."""
    source = Source(
        pipeline=str(pipeline), prompts=("a red circle",), samples=2, height=32, width=32, device="cpu", out=out
    )
    options = {"train": None, "rank": 2, "steps": 6, "batch": 2, "accumulate": 1, "lr": None, "warmup": 0}
    options |= {"mixed_precision": "no", "gradient_checkpointing": False, "save_every": 1, "sample_every": 0}
    return Request(source=source, attention=parse_attention(attn), recipe=recipe, **(options | overrides))


def make_trainer(pipeline, out, recipe, attn=SLA, epsilon=False, **overrides):
    """A Trainer on two samples of noise with two prompts."""
    pipe = DiffusionPipeline.from_pretrained(pipeline)
    if epsilon:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="epsilon")
    model = next(iter(denoisers(pipe).values()))
    call = CALL | ({"num_frames": 5} if "Wan" in type(pipe).__name__ else {})
    generator, samples = torch.Generator().manual_seed(7), Drawn()
    for prompt in ("a red circle", "a green square"):
        conditions = capture(pipe, model, {**call, "prompt": prompt})
        samples.append(Sample(torch.randn(conditions.shape, generator=generator), conditions))
    request = make_request(pipeline, out, recipe, attn, **overrides)
    processor = request.attention.processor((8, 8))
    stages = plan(request, reweighted(RECIPES[recipe], dict(request.weights)), model, processor)
    choices = request.attention.by_layer(processor)
    parallel = new_parallel(Accelerator(cpu=True), request.batch, "no")
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(request, stages, parallel, pipe, model, choices, noise_process(pipe.scheduler), samples)
    trainer.pipe = pipe
    return trainer


def train(trainer, after=lambda step: None):
    trainer.train(Progress(disable=True), after)
    return trainer


def test_loss_weights_replace_the_recipes(pipelines, tmp_path):
    """With distillation of the prediction alone, no other loss is computed."""
    trainer = make_trainer(
        pipelines["flux"], tmp_path, "clear", weights=(("flow", 0), ("attention", 0), ("prediction", 2))
    )
    train(always_the_same_batch(trainer))
    first, last = trainer.history[0], trainer.history[-1]
    assert set(first) == {"loss", "prediction"} and first["loss"] == pytest.approx(2 * first["prediction"])
    assert last["loss"] < first["loss"]


def test_checkpoint_keeps_the_fp16_gradient_scale(pipelines, tmp_path):
    """A new scaler would start too high, and the first steps would be skipped."""

    def with_scaler(scale):
        trainer = make_trainer(pipelines["flux"], tmp_path, "lit", "gna:window=3")
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return trainer

    earlier = with_scaler(2.0**7)
    earlier.accelerator.scaler.scale(torch.zeros(()))  # creates its tensor
    earlier.save()
    later = with_scaler(2.0**16)
    later.resume(Console(file=io.StringIO()))
    assert later.accelerator.scaler.get_scale() == 2.0**7


def always_the_same_batch(trainer):
    draw = trainer._batch
    trainer._batch = lambda batch, number: draw([0, 1], 0)
    return trainer


@pytest.mark.parametrize(
    "which, recipe, attn, options",
    [
        ("flux", "attention-transfer", SLA, {}),
        ("sd", "attention-transfer", "gna:window=3", {"epsilon": True}),  # adds no parameters
        ("wan", "linvideo", SLA, {"convert_layers": 2, "lr": 1e-3, "steps": 12}),
        pytest.param(
            "sd",
            "linvideo",
            SLA,
            {"epsilon": True, "convert_layers": 3, "steps": 12, "gradient_checkpointing": True},
            marks=pytest.mark.sweep,
        ),
        ("flux", "lit", "clear:radius=2", {"lr": 1e-3, "accumulate": 2}),
        ("sd", "lit", "linfusion", {"lr": 1e-3}),
    ],
)
def test_every_stage_lowers_its_loss(pipelines, tmp_path, which, recipe, attn, options):
    """Trained on the same batch at every step."""
    trainer = always_the_same_batch(make_trainer(pipelines[which], tmp_path, recipe, attn, **{"steps": 8} | options))
    train(trainer)
    assert len(trainer.plan.stages) == len(RECIPES[recipe].stages) and trainer.step == trainer.plan.stages[-1].end
    for scheduled in trainer.plan.stages:
        name = next(name for name in ("transfer", "matching", "flow") if getattr(scheduled.stage, name))
        first, last = (trainer.history[i] for i in (scheduled.first, scheduled.end - 1))
        if scheduled.stage.selection:  # all layers begin nearly dense, so the student begins close to the teacher
            assert last["loss"] < first["loss"] and last["count"] < first["count"]
        else:
            assert last[name] < first[name]


def batch_of(trainer):
    return trainer._batch([0, 1], 0)


@pytest.mark.parametrize(
    "recipe, regional",
    [
        ("attention-transfer", "1"),
        pytest.param("clear", "1", marks=pytest.mark.sweep),
        pytest.param("linvideo", "0", marks=pytest.mark.sweep),
    ],
)
def test_compiled_training_has_the_same_losses(pipelines, tmp_path, monkeypatch, recipe, regional):
    """Compiled as by ``accelerate launch --dynamo_backend``; hooks on attention modules must still run."""

    def history(name):
        AcceleratorState._reset_state(True)
        trainer = make_trainer(pipelines["flux"], tmp_path / name, recipe, steps=3, lr=1e-3)
        compiled = [x for x in (trainer.model, trainer.teacher) if is_compiled_module(x) or has_compiled_regions(x)]
        assert len(compiled) == (2 if name == "compiled" else 0)
        return train(trainer).history

    plain = history("plain")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", regional)
    try:
        compiled = history("compiled")
    finally:
        AcceleratorState._reset_state(True)
        torch._dynamo.reset()
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_attention_loss_is_the_mean_over_layers(pipelines, tmp_path):
    trainer = make_trainer(pipelines["flux"], tmp_path, "clear", "gna:window=3")
    batch, process, layers = batch_of(trainer), trainer.process, trainer.layers
    noisy, _ = process.mix(batch.latents, batch.noise, batch.levels)
    arguments = batch.conditions.arguments(noisy, process.timestep(batch.levels))
    with torch.no_grad(), attention_outputs(trainer.host, layers) as ours:
        trainer.host(**arguments)
    with torch.no_grad(), attention_outputs(trainer.teacher, layers) as theirs:
        trainer.teacher(**arguments)
    expected = torch.stack([F.mse_loss(ours[name], theirs[name]) for name in layers]).mean()
    torch.testing.assert_close(trainer._losses(batch)["attention"], expected, rtol=1e-4, atol=0)
    assert len(layers) == 4 and expected > 1e-6


@pytest.mark.parametrize("which", ["flux", "sd"])
def test_transfer_gives_each_layer_the_teachers_inputs(pipelines, tmp_path, which):
    """The loss is the mean over layers of the distance in a network where only that layer is converted, so that the
    layers before it are the teacher's."""
    trainer = make_trainer(pipelines[which], tmp_path, "attention-transfer", "gna:window=3")
    batch, process, expected = batch_of(trainer), trainer.process, []
    loss = trainer._losses(batch)["transfer"]
    noisy, _ = process.mix(batch.latents, batch.noise, batch.levels)
    arguments = batch.conditions.arguments(noisy, process.timestep(batch.levels))
    for layer in trainer.layers:
        outputs = []
        for converted in (False, True):
            pipe = DiffusionPipeline.from_pretrained(pipelines[which])
            model = next(iter(denoisers(pipe).values()))
            if converted:
                dit_accel.set_attn_processor(pipe, dit_accel.GNAAttnProcessor(window=3), layers=[layer])
            model.get_submodule(layer).register_forward_hook(lambda m, a, given, to=outputs: to.append(given))
            with torch.no_grad():
                model(**arguments)
        flat = [torch.cat([x.flatten() for x in (o if isinstance(o, tuple) else (o,))]) for o in outputs]
        expected.append(F.mse_loss(*flat))
    assert min(expected) > 1e-6
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-4, atol=0)
    assert all(layer.slot.layout is None for layer in installed_layers(trainer.host).values())


def test_transfer_trains_new_parameters_then_lora_alone(pipelines, tmp_path):
    trainer, seen = make_trainer(pipelines["flux"], tmp_path, "attention-transfer", steps=4), []
    before = {name: p.clone() for name, p in trainer.host.named_parameters()}
    train(trainer, lambda step: seen.append({n: p.clone() for n, p in trainer.host.named_parameters()}))
    moved = [{name for name in a if not a[name].equal(b[name])} for a, b in ((before, seen[1]), (seen[1], seen[3]))]
    assert moved[0] and all(".dit_accel." in name for name in moved[0])
    assert moved[1] and all(".lora_" in name for name in moved[1])
    rates = [stage.lr for stage in trainer.plan.stages]
    assert rates == [1e-2, 1e-4] and [stage.end for stage in trainer.plan.stages] == [2, 4]
    scaled = make_trainer(pipelines["flux"], tmp_path / "o", "attention-transfer", lr=2e-4).plan.stages
    assert [stage.lr for stage in scaled] == pytest.approx([2e-2, 2e-4])


def test_scores_mix_dense_and_new_attention(pipelines, tmp_path):
    """Score 0 gives the teacher, score 1 the fully converted student, and others mix the attention of each layer."""
    trainer = make_trainer(pipelines["flux"], tmp_path, "linvideo", "gna:window=3")
    batch = batch_of(trainer)
    arguments = batch.conditions.arguments(batch.latents, trainer.process.timestep(batch.levels))

    def output(model, score=None):
        if score is not None:
            trainer.selection.restore(dict.fromkeys(FLUX_LAYERS, score))
        with torch.no_grad():
            return model(**arguments)[0]

    dense, mixed = output(trainer.teacher), output(trainer.host, 0.5)
    torch.testing.assert_close(output(trainer.host, 0.0), dense)
    converted = copy.deepcopy(trainer.teacher)
    dit_accel.set_attn_processor(converted, dit_accel.GNAAttnProcessor(window=3))
    torch.testing.assert_close(output(trainer.host, 1.0), output(converted))
    assert (mixed - dense).abs().max() > 1e-4 < (mixed - output(converted)).abs().max()
    query, key, value = torch.randn(3, 2, 2, 71, 16).unbind()
    layer = trainer.selection.layers[FLUX_LAYERS[0]]
    trainer.selection.restore(dict.fromkeys(FLUX_LAYERS, 0.25))
    layer.slot.layout = layout = dit_accel.TokenLayout((8, 8), before=7)
    new = dit_accel.functional.gna_attention(query, key, value, layout, window=3)
    expected = 0.25 * new + 0.75 * F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(layer(query, key, value), expected)


def test_scores_stay_between_0_and_1_in_training(pipelines, tmp_path):
    """All begin at 1, from where the binary loss would push them further up."""
    trainer = make_trainer(pipelines["flux"], tmp_path, "linvideo", "gna:window=3", convert_layers=4, steps=2)
    trainer.selection.restore(dict.fromkeys(FLUX_LAYERS, 1.0))
    train(trainer)
    assert max(trainer.scores.values()) == 1 and min(trainer.scores.values()) >= 0


@pytest.mark.parametrize("number", [1, 3])
def test_only_selected_layers_are_kept_and_saved(pipelines, tmp_path, number):
    trainer = train(make_trainer(pipelines["flux"], tmp_path, "linvideo", convert_layers=number, steps=2))
    assert len(trainer.layers) == number and set(trainer.scores) == set(FLUX_LAYERS)
    rest = [score for name, score in trainer.scores.items() if name not in trainer.layers]
    assert min(trainer.scores[name] for name in trainer.layers) >= max(rest)
    with safe_open(dit_accel.save_attention(trainer.pipe, tmp_path), "pt") as file:
        own = [key for key in file.keys() if ".dit_accel." in key]  # noqa: SIM118
    assert sorted(own) == sorted(f"transformer.{x}.dit_accel.{y}" for x in trainer.layers for y in ("bias", "weight"))
    pipe = DiffusionPipeline.from_pretrained(pipelines["flux"])
    before = {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
    dit_accel.load_attention(pipe, tmp_path)
    assert list(installed_layers(pipe.transformer)) == trainer.layers
    batch = batch_of(trainer)
    arguments = batch.conditions.arguments(batch.latents, trainer.process.timestep(batch.levels))
    with torch.no_grad():
        torch.testing.assert_close(pipe.transformer(**arguments)[0], trainer.host(**arguments)[0])
    dit_accel.reset_attn_processor(pipe)
    assert all(x.equal(before[name]) for name, x in pipe.transformer.state_dict().items())


@pytest.mark.parametrize("which, epsilon", [("flux", False), ("sd", False), ("sd", True)])
def test_trajectory_step_equals_the_schedulers(pipelines, which, epsilon):
    scheduler = DiffusionPipeline.from_pretrained(pipelines[which]).scheduler
    if epsilon:
        scheduler = DDIMScheduler.from_config(scheduler.config, prediction_type="epsilon")
    process = noise_process(scheduler)
    scheduler.set_timesteps(10)
    x, prediction, i = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), 4
    times = scheduler.timesteps[i : i + 2]
    levels = scheduler.sigmas[i : i + 2] if which == "flux" else (times + 0.5) / 1000
    ours = process.step(x, prediction, levels[:1].expand(2), levels[1:].expand(2))
    torch.testing.assert_close(ours, scheduler.step(prediction, times[0], x)[0], rtol=1e-4, atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    drawn = [process.draw_later(0.5, generator) for _ in range(200)]
    assert 0.02 <= min(drawn) < 0.05 and 0.45 < max(drawn) <= 0.5 and process.draw_later(0.01, generator) == 0.01


@pytest.mark.parametrize("recipe", [pytest.param("attention-transfer", marks=pytest.mark.sweep), "linvideo"])
def test_resume_in_any_stage_gives_the_same_result_bitwise(pipelines, tmp_path, recipe):
    """Also at the end of the first stage, before and after the layers are selected."""
    attn, number = ("gna:window=3", 2) if recipe == "linvideo" else (SLA, None)
    whole = make_trainer(pipelines["flux"], tmp_path / "whole", recipe, attn, convert_layers=number, steps=4)

    def keep(step):
        (tmp_path / str(step)).mkdir()
        if step < 4:
            shutil.copy(tmp_path / "whole" / NAME, tmp_path / str(step))

    train(whole, keep)
    ends = torch.load(tmp_path / "whole" / NAME)["parameters"]
    for step in (1, 2, 3):
        trainer = make_trainer(pipelines["flux"], tmp_path / str(step), recipe, attn, convert_layers=number, steps=4)
        output = io.StringIO()
        trainer.resume(Console(file=output))
        assert output.getvalue() == f"Resuming from step {step}\n" and trainer.index == int(step > 2)
        train(trainer)
        assert trainer.history == whole.history and trainer.layers == whole.layers and trainer.scores == whole.scores
        found = torch.load(tmp_path / str(step) / NAME)["parameters"]
        assert found.keys() == ends.keys() and all(found[name].equal(x) for name, x in ends.items())


def train_both(pipeline, out, batch):
    """Losses of all stages of two recipes, by recipe."""
    histories = {}
    for recipe in ("attention-transfer", "linvideo"):
        options = {"convert_layers": 4, "attn": "gna:window=3"} if recipe == "linvideo" else {}
        histories[recipe] = train(make_trainer(pipeline, out / recipe, recipe, batch=batch, steps=4, **options)).history
    return histories


@pytest.mark.sweep  # test_convert_distributed.py has the stages of attention transfer with DDP
def test_two_processes_equal_one_with_twice_the_batch(pipelines, tmp_path):
    script = start(__file__, pipelines["flux"], tmp_path / "two")
    one = train_both(pipelines["flux"], tmp_path / "one", 2)
    finish(script)
    two = json.loads((tmp_path / "two.json").read_text())
    for recipe in one:
        for ours, theirs in zip(one[recipe], two[recipe], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-7)


def test_run_reports_stages_and_layers(pipelines, tmp_path):
    request, output = make_request(pipelines["flux"], tmp_path, "linvideo", steps=3, convert_layers=2), io.StringIO()
    run(request, Console(file=output, width=200, force_terminal=True))
    about = json.loads((tmp_path / "convert.json").read_text())
    assert about["recipe"]["name"] == "linvideo" and len(about["layers"]) == 2 and len(about["scores"]) == 4
    assert about["stages"] == [
        {"name": "selection", "first_step": 1, "steps": 1, "train": "full", "lr": 1e-5},
        {"name": "matching", "first_step": 2, "steps": 2, "train": "full", "lr": 1e-5},
    ]
    assert set(about["history"][0]) == {"loss", "matching", "count", "binary"}
    assert "selection (1 of 2)" in output.getvalue() and "matching (2 of 2)" in output.getvalue()
    with pytest.raises(BadInput, match="steps 3, now 6"):  # the stages would end at other steps
        run(replace(request, steps=6), Console(file=output))


def convert(pipelines, out, *more, which, attn):
    """Run the command and return its exit status."""
    given = ["convert", "--pipeline", str(pipelines[which]), "--attn", attn, "--out", str(out), "--data-free"]
    with pytest.raises(SystemExit) as stopped:
        main([*given, "--device", "cpu", "--height", "32", "--width", "32", *more])
    return stopped.value.code


@pytest.mark.parametrize(
    "which, attn, more, message",
    [
        (
            "flux",
            SLA,
            ("--recipe", "attention-transfer", "--train", "full"),
            "stages trains: leave --train full out",
        ),
        ("flux", SLA, ("--recipe", "lit", "--convert-layers", "2"), "--recipe lit converts all"),
        ("flux", SLA, ("--recipe", "linvideo", "--convert-layers", "5"), "the model has 4 self-attention layers"),
        ("flux", SLA, ("--recipe", "linvideo", "--steps", "1"), "2 stages (selection, matching), got --steps 1"),
        ("sd", "linfusion", ("--recipe", "linvideo"), "linfusion changes the inputs of query and key"),
        ("flux", "gna:window=3", ("--recipe", "lit", "--train", "new"), "--train new trains nothing"),
    ],
)
def test_invalid_combinations_are_refused_before_any_work(pipelines, tmp_path, which, attn, more, message, capsys):
    assert convert(pipelines, tmp_path, *more, which=which, attn=attn) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "samples").exists()


def train_as_one_of_two():
    torch.set_num_threads(1)
    found = train_both(Path(sys.argv[1]), Path(sys.argv[2]), 1)
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).with_suffix(".json").write_text(json.dumps(found))


if __name__ == "__main__":
    fork_both(train_as_one_of_two)
