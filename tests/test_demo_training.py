"""Conversion in the app: progress events, stopping and resuming, and isolation from Compare's pipeline."""

import errno
import json
import os
import shlex
import threading
from typing import get_args

import numpy as np
import pytest
import torch
from tiny_pipelines import save_flux, save_wan

import dit_accel
from dit_accel.common.bundled import IMAGE
from dit_accel.common.choices import Train
from dit_accel.common.errors import BadInput
from dit_accel.comparison.sizes import Size
from dit_accel.conversion import checkpoint
from dit_accel.conversion.request import Request
from dit_accel.demo.ui import training
from dit_accel.demo.ui.engine import Cancelled, Engine, Stop
from dit_accel.demo.ui.training import ConversionOptions, Converted, command_line, convert
from dit_accel.demo.ui.training_watch import Distance, Drawn, Preparing, Step
from dit_accel.demo.ui.work import Waiting
from dit_accel.install.installation import denoisers
from dit_accel.mechanisms.attn_spec import parse_attention

CPU = torch.device("cpu")
SIDE = 32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of tiny pipelines whose default call has few steps."""
    folder = tmp_path_factory.mktemp("pipelines")
    defaults = {"height": SIDE, "width": SIDE, "num_inference_steps": 2}
    made = {"image": save_flux(folder / "flux"), "video": save_wan(folder / "wan")}
    for kind, path in made.items():
        more = {"num_frames": 5} if kind == "video" else {}
        (path / "defaults.json").write_text(json.dumps({**defaults, **more}))
    return made


@pytest.fixture
def engine(tiny, monkeypatch):
    monkeypatch.setattr(training, "TEACHER_SAMPLES", 2)
    with Engine(str(tiny["image"]), CPU, torch.float32) as engine:
        yield engine


def make_options(steps=4, lr=0.01, train="lora", recipe="clear", attention="gna:window=2", kind="image"):
    return ConversionOptions(kind, parse_attention(attention), recipe, train, steps, lr, ("a red circle",))


def run_conversion(engine, options, restart=False, stop=None, then=lambda event, stop: None):
    """Run a conversion and return its events. then: called after each event."""
    stop, events = stop or Stop(), []

    def report(event):
        events.append(event)
        then(event, stop)

    convert(engine, options, restart, stop, report)
    return events


def only(kind, events):
    return [event for event in events if isinstance(event, kind)]


def test_conversion_reports_losses_distances_and_pictures(engine):
    events = run_conversion(engine, make_options())
    assert [(event.done, event.total) for event in only(Preparing, events)] == [(1, 2), (2, 2)]
    steps = only(Step, events)
    assert [event.step for event in steps] == [0, 1, 2, 3, 4] and steps[-1].steps == 4
    assert [len(event.history) for event in steps] == [0, 1, 2, 3, 4]
    assert set(steps[-1].history[0]) == {"loss", "flow", "prediction", "attention"}
    assert steps[0].seconds_left is None and steps[1].seconds_left > 0 and steps[-1].seconds_left == 0
    assert [event.step for event in only(Distance, events)] == [0, 1, 2, 3, 4]
    drawn = only(Drawn, events)
    assert [event.step for event in drawn] == [0, 4]
    assert all(event.teacher.shape == event.student.shape == (SIDE, SIDE, 3) for event in drawn)
    assert all(np.array_equal(event.teacher, drawn[0].teacher) for event in drawn)
    assert not np.array_equal(drawn[0].student, drawn[-1].student)
    done = events[-1]
    assert isinstance(done, Converted) and done.new_steps == 4 and done.file.name == "dit_accel.safetensors"
    assert engine.conversions("image") == {done.label: done.file.parent}
    assert "GNA" in done.label and "4 steps" in done.label and engine.folder in done.file.parents


def test_distance_decreases_and_is_zero_for_a_full_window(engine):
    """The teacher is random, so training on data moves away from it; the first stage of LoLCATs does not use data."""
    sla = "sla:critical=0.1,block_q=8,block_kv=8"
    events = run_conversion(engine, make_options(8, None, None, "attention-transfer", sla))
    distances = {event.step: event.value for event in only(Distance, events)}
    assert 0 < distances[4] < 0.95 * distances[0]
    whole = only(Distance, run_conversion(engine, make_options(steps=1, attention="gna:window=16")))
    assert whole[0].value < 1e-9


def test_compare_pipeline_is_unchanged_and_loads_the_result(engine):
    def draw(source=None):
        with engine.turn("image") as loaded:
            if source is not None:
                dit_accel.load_attention(loaded.pipe, source)
            return engine.draw(loaded, "a red circle", 1, Size(SIDE, SIDE), 2, Stop()).frames[0]

    model = next(iter(denoisers(engine.about("image").pipe).values()))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    dense = draw()
    events = run_conversion(engine, make_options(lr=0.1))
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert np.array_equal(draw(), dense)
    last = only(Drawn, events)[-1]  # the page's seed and first prompt
    assert np.abs(last.teacher.astype(int) - dense).max() <= 1
    student = draw(str(events[-1].file.parent))
    assert np.abs(last.student.astype(int) - student).max() <= 2 < np.abs(student.astype(int) - dense).max()


def test_resumed_conversion_equals_an_uninterrupted_one(engine):
    def cancel(event, stop):
        if isinstance(event, Step) and event.step == 2:
            stop.set()

    seen = []
    with pytest.raises(Cancelled):
        run_conversion(engine, make_options(), then=lambda event, stop: (seen.append(event), cancel(event, stop)))
    assert only(Step, seen)[-1].step == 2 and engine.conversions("image") == {}
    rest = run_conversion(engine, make_options())
    assert only(Step, rest)[0].step == 2  # includes the earlier steps
    assert [event.step for event in only(Distance, rest)] == [0, 1, 2, 3, 4]
    assert [event.step for event in only(Drawn, rest)] == [0, 4]
    assert rest[-1].new_steps == 2
    whole = run_conversion(engine, make_options(), restart=True)
    assert only(Step, whole)[0].step == 0 and whole[-1].new_steps == 4
    assert only(Step, whole)[-1].history == only(Step, rest)[-1].history
    assert [event.value for event in only(Distance, whole)] == [event.value for event in only(Distance, rest)]
    assert whole[-1].file != rest[-1].file and whole[-1].file.read_bytes() == rest[-1].file.read_bytes()
    assert len(engine.conversions("image")) == 2


@pytest.mark.parametrize("after", [Preparing, Drawn, Distance])
def test_stop_ends_the_conversion_within_a_step(engine, after):
    stop, late = Stop(), []

    def reach(event, stop):
        late.append(event)
        if isinstance(event, after):
            stop.set()

    with pytest.raises(Cancelled):
        run_conversion(engine, make_options(steps=50), stop=stop, then=reach)
    assert sum(isinstance(event, after) for event in late) == 1
    assert not [event for event in only(Step, late) if event.step > 1]


def test_more_steps_resume_and_keep_the_earlier_result(engine):
    first = run_conversion(engine, make_options(steps=2))[-1]
    before = first.file.read_bytes()
    again = run_conversion(engine, make_options(steps=2))[-1]
    assert again == Converted(first.label, first.file, 0)
    more = run_conversion(engine, make_options(steps=4))[-1]
    assert more.new_steps == 2 and more.label != first.label and more.file.read_bytes() != before
    assert first.file.read_bytes() == before
    assert list(engine.conversions("image")) == [first.label, more.label]


def test_waiting_conversion_can_be_cancelled(engine):
    stop, events = Stop(), []
    done = threading.Event()

    def work():
        with pytest.raises(Cancelled):
            convert(engine, make_options(), False, stop, events.append)
        done.set()

    with engine.turn("image"):
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while not events:
            done.wait(0.01)
        assert events == [Waiting(1)]
        stop.set()
        assert done.wait(5)


def test_invalid_options_and_nonfinite_loss_raise_clear_errors(engine):
    for options, message in (
        (make_options(recipe="nothing"), "recipe from the list"),
        (make_options(lr=-1.0), "above 0"),
        (make_options(train="new"), "adds no parameters"),
        (make_options(recipe="attention-transfer", train=None, steps=1), "at least one step per stage"),
        (make_options(lr=1e30, steps=8), "loss was not finite at step [0-9]+. Choose a smaller learning rate"),
    ):
        with pytest.raises(BadInput, match=message):
            run_conversion(engine, options)
    assert engine.conversions("image") == {}


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(OSError(errno.ENOSPC, "No space left on device"), marks=pytest.mark.sweep),
        RuntimeError("PytorchStreamWriter failed writing file"),
    ],
)
def test_full_disk_gives_a_message_and_can_be_resumed(engine, monkeypatch, error):
    def fail(*_, **__):
        raise error

    with monkeypatch.context() as full:
        full.setattr(checkpoint.torch, "save", fail)
        with pytest.raises(BadInput, match="disk is full at step 2"):
            run_conversion(engine, make_options(steps=2))
    assert engine.conversions("image") == {}
    assert run_conversion(engine, make_options(steps=2))[-1].new_steps == 2


def test_other_errors_are_not_reported_as_a_full_disk(engine, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        run_conversion(engine, make_options(steps=1))


def test_clip_is_shown_as_four_frames_in_two_rows(tiny):
    with Engine(str(tiny["video"]), CPU, torch.float32) as engine:
        drawn = only(Drawn, run_conversion(engine, make_options(kind="video", attention="gna:window=2x2x2")))
    assert [event.step for event in drawn] == [0, 4] and drawn[0].teacher.shape == (2 * SIDE, 2 * SIDE, 3)


def test_scenes_for_embedded_pipelines_are_rendered_once(tiny, tmp_path, monkeypatch):
    """Uses a tiny pipeline that is marked as trained on scenes."""
    folder = save_flux(tmp_path / "flux")
    (folder / "defaults.json").write_text((tiny["image"] / "defaults.json").read_text())
    (folder / "training.json").write_text("{}")
    monkeypatch.setattr(training, "SCENES", {"image": 3})
    threads, rendered, write = [], [], training.write_scenes
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(training, "write_scenes", lambda *args, **more: (rendered.append(args), write(*args, **more)))
    with Engine(str(folder), CPU, torch.float32) as engine:
        events = run_conversion(engine, make_options(steps=1))
        run_conversion(engine, make_options(steps=1, attention="clear:radius=2"))
    assert len(rendered) == 1 and threads == [1, 2]
    assert [event.total for event in only(Preparing, events)] == [3, 3, 3]
    assert rendered[0][:4] == (engine.folder / "scenes-image", 3, False, training._SEED)


@pytest.mark.parametrize("attention, train", [("sla", "lora"), ("gna", None)])
def test_command_line_gives_the_same_request(monkeypatch, attention, train):
    """The parsed command gives the request of the page, except for paths and prompts."""
    from dit_accel.cli import app as cli
    from dit_accel.conversion import finish, run

    asked = []
    monkeypatch.setattr(run, "run", lambda request, console: asked.append(request))
    monkeypatch.setattr(finish, "finish", lambda *_: None)
    with Engine(None, CPU, torch.float32) as engine:
        options = make_options(attention=attention, train=train)
        line = command_line(engine, options)
        expected = training._request(engine, engine.about("image"), options, engine.folder)
        monkeypatch.chdir(engine.folder)
        scenes, words = line.split(" && ")
        os.mkdir("scenes")
        with pytest.raises(SystemExit) as left:
            cli.main(shlex.split(words)[1:])
        assert left.value.code == 0
    assert f"write_scenes image --out scenes --count {training.SCENES['image']} --seed {training._SEED}" in scenes
    (request,) = asked
    assert isinstance(request, Request) and str(IMAGE.folder) == request.source.pipeline
    ours, theirs = expected.fingerprint(), request.fingerprint()
    differ = {key for key in ours if ours[key] != theirs[key]}
    assert differ <= {"data", "prompts", "samples", "attention", "height", "width"}
    size = engine.about("image").size
    assert (ours["height"], ours["width"]) == (size.height, size.width) and theirs["height"] is None
    full = expected.attention.processor((64, 64))
    assert request.attention.processor() == full
    assert (request.steps, request.save_dtype, request.sample_every) == (4, "float16", expected.sample_every)


def test_each_recipe_has_a_label_and_fixed_choices_are_disabled():
    pytest.importorskip("gradio")
    from dit_accel.conversion.recipes.recipe import RECIPES
    from dit_accel.demo.ui import convert_tab

    assert set(convert_tab._RECIPES) == set(RECIPES) and set(convert_tab._TRAIN) == {*get_args(Train), ""}
    for recipe, fixed in (("attention-transfer", True), ("clear", False)):
        _, train, rate = convert_tab._for_recipe(recipe, "lora")
        assert (train.value, train.interactive) == ("" if fixed else "lora", not fixed)
        assert rate == (None if fixed else convert_tab._LORA_RATE)
