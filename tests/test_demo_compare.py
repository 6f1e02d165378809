"""Compare tab without a browser: progress events, validation, and the generated Python code."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import types

import numpy as np
import pytest
import torch
from tiny_pipelines import save_flux, save_wan

pytest.importorskip("gradio")

import gradio as gr

from dit_accel.cli.app import main
from dit_accel.common.errors import BadInput
from dit_accel.comparison.calling import to_frames
from dit_accel.comparison.sizes import Size
from dit_accel.demo import serve
from dit_accel.demo.ui import compare_tab
from dit_accel.demo.ui.comparison import Comparison, Progress, compare_attention, python_lines
from dit_accel.demo.ui.controls import DrawingControls, DrawingOptions, MechanismControls, check_drawing
from dit_accel.demo.ui.engine import Cancelled, Engine, Stop
from dit_accel.demo.ui.preview import Preview
from dit_accel.mechanisms.attn_spec import parse_attention

CPU = torch.device("cpu")
VALID = {"prompt": "a red circle", "seed": 0, "height": 32, "width": 32, "frames": None, "steps": 2}


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    with Engine(str(save_flux(tmp_path_factory.mktemp("flux"))), CPU, torch.float32) as engine:
        yield engine


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    with Engine(str(save_wan(tmp_path_factory.mktemp("wan"))), CPU, torch.float32) as engine:
        yield engine


def compare(engine, spec, size, steps=3):
    kind, events = engine.kinds[0], []
    wanted = DrawingOptions(kind, "a red circle", 5, size, steps)
    compare_attention(engine, wanted, parse_attention(spec), Stop(), events.append)
    return events


def test_progress_is_reported_per_step_before_the_result(image):
    events = compare(image, "clear:radius=2", Size(32, 32))
    assert [(news.drawing, news.step) for news in events[:-1]] == [(i, step) for i in (0, 1) for step in range(4)]
    assert isinstance(events[-1], Comparison) and not np.array_equal(events[-1].dense.frames, events[-1].other.frames)
    assert 0 < events[-1].other.logit_fraction < 1 and events[-1].psnr > 0
    left = [news.seconds_left for news in events[:-1] if news.step]
    assert left[-1] == 0 and all(a >= 0 for a in left)


def test_previews_have_the_expected_size(image, video):
    seen = [news.pictures for news in compare(image, "clear:radius=2", Size(32, 32)) if isinstance(news, Progress)]
    assert any(pictures and pictures[1] is not None and pictures[1].shape == (16, 16, 3) for pictures in seen)
    seen = [news.pictures for news in compare(video, "clear:radius=2", Size(32, 32, 5)) if isinstance(news, Progress)]
    assert any(pictures and pictures[1] is not None and pictures[1].shape == (32, 32, 3) for pictures in seen)


def test_preview_extrapolates_euler_steps_to_clean_latents(image):
    pipe = image.about("image").pipe
    pipe.scheduler.set_timesteps(4, mu=1.0)
    noise, clean = torch.randn(1, 64, 4), torch.randn(1, 64, 4)
    preview = Preview(pipe, Size(32, 32))
    for step in (1, 2):
        sigma = pipe.scheduler.sigmas[step]
        preview.update(step, (1 - sigma) * clean + sigma * noise)
    assert torch.allclose(preview._extrapolate(), clean, atol=1e-4)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_python_code_draws_the_same_picture(request, kind):
    engine = request.getfixturevalue(kind)
    size = Size(32, 32, 5 if kind == "video" else None)
    result = compare(engine, "gna:window=2", size)[-1]
    loaded = engine.about(kind)
    lines = python_lines(result, loaded)
    assert "pipe.set_attn_processor(dit_accel.GNAAttnProcessor(window=2))" in lines.splitlines()
    given = {}
    code = lines.replace("result = pipe(", "result = pipe(output_type='np', prompt=")
    exec(code, given)
    assert np.array_equal(to_frames(given["result"]), result.other.frames)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": None}, "prompt is empty"),
        ({"prompt": "x" * 10_000}, "10,000 characters; at most 2,000"),
        ({"height": 33}, "nearest: 32×32"),
        ({"height": None}, "height must be an integer"),
        ({"width": 0}, "width must be at least 1"),
        ({"width": float("nan")}, "width must be an integer"),
        ({"width": float("inf")}, "width must be an integer"),
        ({"width": 10**6}, "too large for this page"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 2**40}, "seed must be from 0"),
        ({"steps": 0}, "steps must be from 1 to 100"),
        ({"steps": True}, "steps must be an integer"),
    ],
)
def test_invalid_drawing_options_raise_a_clear_error(image, changed, message):
    with pytest.raises(ValueError, match=message):
        check_drawing(image.about("image"), **{**VALID, **changed})


def test_valid_drawing_options_are_returned(image):
    wanted = check_drawing(image.about("image"), **VALID)
    assert wanted == DrawingOptions("image", "a red circle", 0, Size(32, 32), 2)


@pytest.mark.parametrize(("spec", "message"), [("gna:window=9x9", "9×9 tokens is larger than the grid of 8×8")])
def test_too_large_window_is_refused_before_drawing(image, spec, message, monkeypatch):
    monkeypatch.setattr(image, "draw", lambda *_: pytest.fail("drawn"))
    with pytest.raises(BadInput, match=message):
        compare(image, spec, Size(32, 32))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_slider_defaults_are_valid_for_each_mechanism(request, kind):
    engine = request.getfixturevalue(kind)
    with gr.Blocks():
        controls = MechanismControls(engine)
    values = [slider.value for slider in controls.sliders.values()]
    for slider in controls.sliders.values():
        assert slider.minimum <= slider.value <= slider.maximum
    for name in ("sla", "clear", "llsa", "gna"):
        assert controls.student(kind, name, *values).name == name
    with pytest.raises(BadInput, match="from the list"):
        controls.student(kind, "/etc/passwd", *values)


def test_conversion_made_in_the_app_can_be_selected(image, tmp_path):
    with gr.Blocks():
        controls = MechanismControls(image)
    image.add_conversion("image", "mine", tmp_path)
    update = controls._refresh_choices("image")
    assert ("mine", "mine") in update.choices and "value" not in update._constructor_args[0]
    assert controls.student("image", "mine", *[slider.value for slider in controls.sliders.values()]) == str(tmp_path)
    image._app_conversions["image"].clear()


def handler(engine):
    """Request handler of a new page, and the values that its button sends."""
    with gr.Blocks():
        drawing, mechanism = DrawingControls(engine), MechanismControls(engine)
        view = compare_tab._View(engine, gr.Button(), gr.Button())
    values = ["image", "a red circle", 0, 32, 32, 1, 2, "clear", *[s.value for s in mechanism.sliders.values()]]
    requests = compare_tab._Requests(engine, drawing, mechanism, view)
    return requests, types.SimpleNamespace(session_hash="page"), values


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "Out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "Out of memory"),
        (KeyError("strange"), "did not work: KeyError"),
        (ArithmeticError("the picture holds NaN or infinity"), "NaN"),
    ],
)
def test_error_while_drawing_is_shown_and_reenables_the_button(image, monkeypatch, error, message):
    def draw(*_):
        raise error

    monkeypatch.setattr(image, "draw", draw)
    requests, page, values = handler(image)
    run, cancel, status, *_ = list(requests.run(page, *values))[-1]
    assert message in status and 'role="alert"' in status and "Traceback" not in status
    assert run.interactive and not cancel.interactive


def test_cancel_affects_only_its_own_page(image):
    requests, page, values = handler(image)
    updates = requests.run(page, *values)
    next(updates)
    requests.cancel(types.SimpleNamespace(session_hash="other"))
    *_, figures, code = list(updates)[-1]
    assert "PSNR" in figures and "CLEARAttnProcessor" in code.value
    updates = requests.run(page, *values)
    next(updates)
    requests.cancel(page)
    assert "Stopped" in list(updates)[-1][2]


def test_markup_in_a_prompt_is_escaped(image):
    requests, page, values = handler(image)
    values[7] = "<img src=x onerror=alert(1)>"
    assert all("<img" not in str(update) for updates in requests.run(page, *values) for update in updates)


def test_closing_the_page_stops_its_drawing(image, monkeypatch):
    stops = []

    def draw(_loaded, _prompt, _seed, _size, _steps, stop, _on_step):
        stops.append(stop)
        while True:
            stop.check()

    monkeypatch.setattr(image, "draw", draw)
    requests, page, values = handler(image)
    updates = requests.run(page, *values)
    while not stops:
        next(updates)
    updates.close()
    with pytest.raises(Cancelled):
        stops[0].check()
    with image.turn("image"):
        pass


def test_signal_ends_the_command_and_removes_its_folder(image, tmp_path, monkeypatch):
    """In this process; the next test has a process of its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # restored at the end
    printed = []

    def stop_soon(text, **_):
        printed.append(text)
        assert list(tmp_path.glob("dit-accel-*"))
        if "Ctrl-C" in text:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()

    monkeypatch.setattr(serve, "print", stop_soon, raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--pipeline", image.about("image").source, "--device", "cpu", "--port", "0"])
    assert ended.value.code == 128 + signal.SIGTERM and "http://127.0.0.1:" in printed[0]
    assert not list(tmp_path.glob("dit-accel-*"))


@pytest.mark.sweep
def test_signal_stops_the_app_and_removes_its_folder(tmp_path):
    source, temporary = save_flux(tmp_path / "flux"), tmp_path / "temporary"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "dit_accel.cli", "demo", "--pipeline", str(source), "--device", "cpu", "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip
    assert "http://127.0.0.1:" in process.stdout.readline()
    assert list(temporary.glob("dit-accel-*"))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in errors
    assert not list(temporary.glob("dit-accel-*"))


@pytest.mark.parametrize(
    ("arguments", "missing", "message"),
    [
        ([], "gradio", "pip install 'dit-accel[demo]'"),
        (["--pipeline", "/nowhere"], None, "there is no folder /nowhere"),
        (["--device", "toaster"], None, "unknown device 'toaster'"),
        (["--port", "70000"], None, "--port"),
        (["--allow-host", "https://a.example"], None, "expected a host name"),
        (["--allow-frame", "a.example"], None, "expected an origin"),
    ],
)
def test_invalid_command_arguments_give_a_clear_error(arguments, missing, message, monkeypatch, capsys):
    if missing is not None:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as ended:
        main(["demo", *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.sweep  # test_convert_resume.py checks it in a process that it starts anyway
def test_cli_import_does_not_import_gradio():
    code = "import sys, dit_accel.cli.app; assert 'gradio' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
