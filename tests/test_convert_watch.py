"""Callbacks of a conversion that is started from Python, and stopping it from them."""

import json
import threading

import pytest
from rich.console import Console
from tiny_pipelines import save_flux

from dit_accel.conversion.request import Request, Source
from dit_accel.conversion.run import run
from dit_accel.conversion.watch import Watch
from dit_accel.install.installation import installed_layers
from dit_accel.mechanisms.attn_spec import parse_attention

DRAWING = 3  # forward passes of a drawing


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = save_flux(tmp_path_factory.mktemp("pipeline") / "flux")
    (folder / "defaults.json").write_text(json.dumps({"num_inference_steps": DRAWING}))
    return folder


class RecordingWatch(Watch):
    """Records all calls. stop_at: kind and number of the call that stops the run."""

    def __init__(self, stop_at=(None, 0)):
        self.calls, self.stop_at = [], stop_at

    def note(self, kind, *what):
        self.calls.append((kind, *what))
        if self.stop_at == (kind, self.count(kind)):
            raise KeyboardInterrupt

    def count(self, kind):
        return sum(entry[0] == kind for entry in self.calls)

    def check(self):
        self.note("forward" if self.count("begin") else "check")

    def sample(self, made, total):
        self.note("sample", made, total)

    def ready(self, model, process, samples):
        assert not installed_layers(model)
        self.note("ready", len(samples))

    def begin(self, step, history):
        self.note("begin", step, len(history))

    def picture(self, step, path):
        assert path.is_file()
        self.note("picture", step)

    def step(self, step, losses):
        self.note("step", step, losses["loss"])


def request_for(pipeline, out, steps=4):
    out.mkdir(exist_ok=True)
    source = Source(
        pipeline=str(pipeline), prompts=("a red circle",), samples=2, height=32, width=32, device="cpu", out=out
    )
    return Request(
        source=source, attention=parse_attention("gna:window=3"), recipe="clear", train="lora", rank=2, steps=steps,
        batch=2, lr=0.01, warmup=0, save_every=100, sample_every=2,
    )  # fmt: skip


def test_callbacks_are_called_in_order(pipeline, tmp_path):
    watch = RecordingWatch()
    run(request_for(pipeline, tmp_path), Console(quiet=True), watch)
    # drawing calls the denoiser, too: two samples and a picture of the teacher, then three pictures of the student
    assert watch.count("check") > 3 * DRAWING and watch.count("forward") == 3 * DRAWING + 4 * 2
    calls = [entry[:2] for entry in watch.calls if entry[0] not in ("check", "forward")]
    assert calls[:4] == [("sample", 1), ("sample", 2), ("ready", 2), ("begin", 0)]
    assert calls[4:] == [
        ("picture", 0), ("step", 1), ("picture", 2), ("step", 2), ("step", 3), ("picture", 4), ("step", 4)
    ]  # fmt: skip
    losses = [entry[2] for entry in watch.calls if entry[0] == "step"]
    assert losses == [row["loss"] for row in json.loads((tmp_path / "convert.json").read_text())["history"]]


@pytest.fixture(scope="module")
def losses(pipeline, tmp_path_factory):
    """Losses of an uninterrupted run."""
    whole = RecordingWatch()
    run(request_for(pipeline, tmp_path_factory.mktemp("whole")), Console(quiet=True), whole)
    return [entry[2] for entry in whole.calls if entry[0] == "step"]


@pytest.mark.parametrize(
    "stop_at, done",
    [
        (("sample", 1), 0),
        pytest.param(("forward", 3), 0, marks=pytest.mark.sweep),
        (("forward", DRAWING + 2 + 2), 1),  # forward passes: DRAWING of a drawing, 2 in step 1, 2 in step 2
        pytest.param(("step", 1), 1, marks=pytest.mark.sweep),
        (("picture", 2), 2),
        (("step", 4), 4),
    ],
)
def test_run_stopped_by_a_callback_resumes_identically(pipeline, losses, tmp_path, stop_at, done):
    """Also within a step, and in a thread that is not the main thread, as in an app."""
    stopped = []

    def work():
        try:
            run(request_for(pipeline, tmp_path), Console(quiet=True), RecordingWatch(stop_at))
        except KeyboardInterrupt as error:
            stopped.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert stopped and not (tmp_path / "dit_accel.safetensors").exists()
    rest = RecordingWatch()
    run(request_for(pipeline, tmp_path), Console(quiet=True), rest)
    assert ("begin", done, done) in rest.calls
    assert [entry[2] for entry in rest.calls if entry[0] == "step"] == losses[done:]
