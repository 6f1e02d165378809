"""``dit_accel.convert``, ``evaluate`` and ``compare``: results, checked options, agreement with the commands."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_args

import pytest
import typer.main
from diffusers import DiffusionPipeline
from tiny_pipelines import save_flux

import dit_accel
from dit_accel import CLEARAttnProcessor, GNAAttnProcessor, SLAAttnProcessor, api
from dit_accel.cli.app import app
from dit_accel.common import choices
from dit_accel.conversion.recipes.recipe import RECIPES
from dit_accel.conversion.request import Request, Source
from dit_accel.install.installation import denoisers, installed_layers
from dit_accel.mechanisms.attn_spec import parse_attention
from dit_accel.mechanisms.registry import PROCESSORS

SIZE = {"height": 32, "width": 32}
SMALL = {**SIZE, "device": "cpu", "quiet": True}
TRAINING = {**SMALL, "data_free": True, "prompts": ["a red circle"], "samples": 1, "batch": 1, "steps": 2, "report": 0}


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def student(flux, tmp_path_factory):
    """Output folder of a conversion."""
    out = tmp_path_factory.mktemp("student") / "gna"
    folder = dit_accel.convert(GNAAttnProcessor(window=3), out, pipeline=flux, loss_weight={"flow": 2}, **TRAINING)
    assert folder == out
    return folder


def test_convert_returns_a_folder_to_load(flux, student):
    pipe = DiffusionPipeline.from_pretrained(flux)
    dit_accel.load_attention(pipe, student)
    layers = [layer for model in denoisers(pipe).values() for layer in installed_layers(model).values()]
    assert layers and all(layer.mechanism == GNAAttnProcessor(window=3) for layer in layers)
    about = json.loads((student / "convert.json").read_text())
    assert about["steps"] == 2 and about["recipe"]["stages"][0]["flow"] == 2


def test_convert_resumes_a_run_of_the_command(flux, student):
    """The same options as text and as a processor are the same request."""
    again = {**TRAINING, "steps": 3, "loss_weight": ["flow=2"]}
    assert dit_accel.convert("gna:window=3", str(student), pipeline=str(flux), **again) == student
    assert json.loads((student / "convert.json").read_text())["steps"] == 3


def test_evaluate_returns_the_report(flux, student, tmp_path):
    more = {"data_free": True, "prompts": ("a red circle",), "samples": 1, "levels": 2, "pictures": 0}
    found = dit_accel.evaluate(student, tmp_path, pipeline=flux, **more, **SMALL)
    assert found == json.loads((tmp_path / "evaluate.json").read_text())
    assert found["prediction_error"] > 0 and found["attention"] == str(student)


def test_compare_returns_the_report(flux, student, tmp_path, capsys):
    attn = [SLAAttnProcessor(critical=0.3, block_q=8, block_kv=8), "clear:radius=2", student]
    report = dit_accel.compare(attn, pipeline=flux, prompt="a red circle", steps=1, out=tmp_path, **SMALL)
    assert [variant.label for variant in report.variants] == ["dense", "sla", "clear", "gna"]
    assert report.status == "complete" and report.path == tmp_path / "report.json"
    assert report.content() == json.loads(report.path.read_text())
    assert report.content()["command"] == ["dit_accel.compare"]
    assert capsys.readouterr().out == ""


def test_processor_without_options_keeps_its_defaults():
    """The bare name has other options on a known grid."""
    assert api._spec(SLAAttnProcessor()).processor((64, 64)) == SLAAttnProcessor()
    assert parse_attention("sla").processor((64, 64)) != SLAAttnProcessor()
    assert api._spec(CLEARAttnProcessor(radius=2)) == parse_attention("clear:radius=2")


@pytest.mark.parametrize(
    ("function", "options", "error", "message"),
    [
        ("convert", {"attn": "slaa"}, ValueError, "did you mean 'sla'"),
        ("convert", {"attn": 3}, TypeError, "expected text or a dit_accel processor, got 3"),
        ("convert", {"train": "ful"}, ValueError, r"--train: expected one of new, .*did you mean 'full'\?"),
        ("convert", {"recipe": "Clear"}, ValueError, "did you mean 'clear'"),
        ("convert", {"steps": 0}, ValueError, "--steps: expected an integer of at least 1, got 0"),
        ("convert", {"steps": 2.5}, TypeError, "--steps: expected an integer, got 2.5"),
        ("convert", {"report": -1}, ValueError, "--report: expected an integer of at least 0, got -1"),
        ("convert", {"lr": "1"}, TypeError, "--lr: expected a number, got '1'"),
        ("convert", {"prompts": []}, ValueError, "there is no prompt"),
        ("convert", {"prompts": "nowhere.txt"}, ValueError, "there is no file nowhere.txt"),
        ("convert", {"data_free": False}, ValueError, "give --data with a folder"),
        ("convert", {"loss_weight": {"matching": 1}}, ValueError, "got 'matching=1'"),
        ("evaluate", {"levels": 0}, ValueError, "--levels: expected an integer of at least 1, got 0"),
        ("evaluate", {"captions": 1}, ValueError, "--captions is for pipelines"),
        ("compare", {"attn": ["sla", "gna:windw=3"]}, ValueError, "did you mean 'window'"),
        ("compare", {"attn": ""}, ValueError, "unknown attention ''"),
        ("compare", {"prompt": ["a", " "]}, ValueError, "--prompt is empty"),
        ("compare", {"device": "abacus"}, ValueError, "unknown device"),
        ("compare", {"video": True}, ValueError, "not both"),
    ],
)
def test_bad_options_raise_before_any_work(flux, tmp_path, function, options, error, message):
    given = {"attn": "gna:window=3", "out": tmp_path / "out", "pipeline": flux, **SMALL}
    if function != "compare":
        given |= {"data_free": True, "samples": 1}
    with pytest.raises(error, match=message):
        getattr(dit_accel, function)(**given | options)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["convert", "evaluate", "compare"])
def test_functions_and_commands_have_the_same_options(name):
    command = {option.name: option for option in typer.main.get_command(app).commands[name].params}
    function = dict(inspect.signature(getattr(dit_accel, name)).parameters)
    assert set(function) - set(command) == {"quiet"} | ({"command"} if name == "compare" else set())
    assert set(command) <= set(function)
    for key, option in command.items():
        default = function[key].default
        assert option.required == (default is inspect.Parameter.empty)
        if not option.required:
            given = Path(default) if key == "out" else default
            assert option.default in (given, [], ()) or (option.default is None and not given), key


def test_choices_and_defaults_match_the_requests():
    assert get_args(choices.Recipe) == tuple(RECIPES)
    renamed = {"schedule": "lr_schedule", "sampling": "timestep_sampling", "weights": "loss_weight"}
    function = inspect.signature(dit_accel.convert).parameters
    for field in (*fields(Request), *fields(Source)):
        key = renamed.get(field.name, field.name)
        if (
            field.default is not MISSING
            and key in function
            and key not in ("mixed_precision", "loss_weight", "prompts")
        ):
            assert function[key].default == field.default, key


def test_import_loads_only_what_diffusers_needs():
    """``import dit_accel`` loads none of the training, comparison and command-line code, and no other package than the
    classes of diffusers that it extends do."""
    source = """if True:
        import sys
        from diffusers import DiffusionPipeline, ModularPipeline
        from diffusers.models.attention import AttentionMixin
        from diffusers.models.attention_processor import Attention
        before = {name.partition(".")[0] for name in sys.modules}
        import dit_accel
        packages = {name.partition(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
        print(*sorted(packages))
        print(*sorted({".".join(name.split(".")[:2]) for name in sys.modules if name.startswith("dit_accel.")}))
    """
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=300)
    packages, modules = done.stdout.splitlines()
    assert set(packages.split()) <= {"dit_accel", "triton"}
    unwanted = {f"dit_accel.{name}" for name in ("bench", "cli", "comparison", "conversion", "demo")}
    assert not unwanted & set(modules.split())


def test_every_mechanism_is_accepted_as_a_processor():
    for name in PROCESSORS:
        processor = parse_attention(name).processor((64, 64))
        assert api._spec(processor).processor((8, 8)) == processor
