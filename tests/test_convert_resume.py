"""Stopped and killed conversions and damaged files: the same command resumes, or reports the fault."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import save_flux

from dit_accel.cli.app import main
from dit_accel.common.files import locked
from dit_accel.conversion import run as convert_run
from dit_accel.conversion.checkpoint import load_checkpoint
from dit_accel.conversion.data.samples import SampleCache
from dit_accel.conversion.pictures import Pictures

COMMON = (
    "--attn", "gna:window=3", "--device", "cpu", "--samples", "4", "--batch", "2", "--steps", "4", "--save-every", "2",
    "--warmup", "2", "--report", "0",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread is faster for models of this size, and makes runs comparable bitwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    (folder / "prompts.txt").write_text("a red circle\na green square moving\n")
    size = {"num_inference_steps": 2, "height": 16, "width": 16}
    (save_flux(folder / "flux") / "defaults.json").write_text(json.dumps(size))
    return folder


@pytest.fixture(scope="module")
def drawn(pipelines, tmp_path_factory):
    """Samples drawn by the tiny Flux, for runs that only train."""
    out = tmp_path_factory.mktemp("drawn")
    assert convert(pipelines, out, "--steps", "1") == 0
    return out / "samples"


def command(pipelines, out, *more):
    given = ["convert", "--pipeline", str(pipelines / "flux"), "--out", str(out), "--data-free"]
    return [*given, "--prompts", str(pipelines / "prompts.txt"), *COMMON, *more]


def convert(pipelines, out, *more):
    """Run the command and return its exit status."""
    with pytest.raises(SystemExit) as stopped:
        main(command(pipelines, out, *more))
    return stopped.value.code


def read_about(out):
    return json.loads((out / "convert.json").read_text())


def link_samples(drawn, out):
    out.mkdir()
    (out / "samples").symlink_to(drawn)
    return out


# Import once, then fork runs and kill each after a random time; the last one ends by itself.
KILLS = """
import os, random, shutil, signal, sys, time
import torch
from dit_accel.cli.app import main
torch.set_num_threads(1)
assert "gradio" not in sys.modules  # the other commands must not wait for its import

def start(out):
    process = os.fork()
    if process:
        return process
    try:
        main([*sys.argv[5:], "--out", out])
    except SystemExit as ended:
        os._exit(ended.code)
    os._exit(99)

draw, kills, whole, killed = random.Random(int(sys.argv[1])), int(sys.argv[2]), *sys.argv[3:5]
began = time.monotonic()
assert os.waitpid(start(whole), 0)[1] == 0
duration = time.monotonic() - began
while kills:
    process = start(killed)
    time.sleep(draw.uniform(0, duration))
    os.kill(process, signal.SIGKILL)
    if os.WIFSIGNALED(os.waitpid(process, 0)[1]):
        kills -= 1
        print("files when killed:", sum(len(names) for _, _, names in os.walk(killed)), flush=True)
    else:
        shutil.rmtree(killed)
assert os.waitpid(start(killed), 0)[1] == 0
"""


def ends(out):
    """Files of a run without those with dates, the content of its checkpoint, and its losses."""
    files = {str(x.relative_to(out)): x.read_bytes() for x in sorted(out.rglob("*")) if x.is_file()}
    state = load_checkpoint(out)
    for name in ("checkpoint.pt", "checkpoint.previous.pt", "convert.json", "README.md"):
        del files[name]
    return files, state, read_about(out)["history"]


@pytest.mark.parametrize("kills", ["1", pytest.param("3", marks=pytest.mark.sweep)])
def test_killed_run_resumes_to_the_same_result_bitwise(pipelines, tmp_path, kills):
    """Samples, pictures, optimizer and weights are equal, and no temporary files remain."""
    seed, kills = os.environ.get("KILL_TEST_SEED", "0"), os.environ.get("KILL_TEST_KILLS", kills)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("--steps", "6", "--save-every", "2", "--sample-every", "3")
    given = [sys.executable, "-c", KILLS, seed, kills, str(whole), str(killed), *command(pipelines, whole, *more)]
    done = subprocess.run(given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500)
    output = done.stdout.decode()
    assert done.returncode == 0 and output.count("files when killed:") == int(kills), output[-3000:]
    print(*(line for line in output.splitlines() if "files when killed" in line), sep="\n")
    (files, state, history), (theirs, their_state, their_history) = ends(whole), ends(killed)
    assert files == theirs and len(files) == 4 + 6 + 1 and history == their_history
    torch.testing.assert_close(their_state, state, rtol=0, atol=0)


class Killed(BaseException):
    """An exception that no handler of the trainer catches, so nothing is saved."""


def test_resume_draws_the_missing_pictures(pipelines, drawn, tmp_path, monkeypatch):
    """A run killed between the pictures of a step has the same pictures as an uninterrupted run in the end."""
    whole, killed = (link_samples(drawn, tmp_path / name) for name in ("whole", "killed"))
    assert convert(pipelines, whole, "--sample-every", "2") == 0
    draw, drawings = Pictures._draw, []

    def kill(self, i):
        drawings.append(i)
        if len(drawings) == 6:  # after two of the teacher, two of step 0 and one of step 2
            raise Killed
        return draw(self, i)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Pictures, "_draw", kill)
        convert(pipelines, killed, "--sample-every", "2")
    assert load_checkpoint(killed)["step"] == 2 and len(list((killed / "pictures").iterdir())) == 3
    assert convert(pipelines, killed, "--sample-every", "2") == 0
    ends = [{x.name: x.read_bytes() for x in sorted((out / "pictures").iterdir())} for out in (whole, killed)]
    assert ends[0] == ends[1] and len(ends[0]) == 6


def test_interrupt_saves_a_checkpoint_of_the_last_step(pipelines, drawn, tmp_path, monkeypatch):
    out = link_samples(drawn, tmp_path / "o")
    accumulate, steps = convert_run.Trainer._accumulate, []

    def stop(self, batch):
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        steps.append(accumulate(self, batch))
        return steps[-1]

    with monkeypatch.context() as patched:
        patched.setattr(convert_run.Trainer, "_accumulate", stop)
        assert convert(pipelines, out, "--steps", "9", "--save-every", "100") == 130
    assert load_checkpoint(out)["step"] == 3
    assert convert(pipelines, out, "--steps", "9", "--save-every", "100") == 0
    assert read_about(out)["steps"] == 9


def test_full_disk_stops_and_keeps_the_earlier_checkpoint(pipelines, drawn, tmp_path, monkeypatch, capsys):
    out, save = link_samples(drawn, tmp_path / "o"), torch.save
    assert convert(pipelines, out, "--steps", "2") == 0

    def full(state, path):
        path.symlink_to("/dev/full")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    assert convert(pipelines, out, "--steps", "4") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"dit-accel: cannot write {out / 'checkpoint.pt'}: the disk is full (")
    assert error.endswith(f" at {out}): free some space; the same command resumes from the last checkpoint\n")
    assert load_checkpoint(out)["step"] == 2
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def add_leftovers(folder):
    """Create the temporary files of a killed process."""
    folder.mkdir(exist_ok=True)
    (folder / ".a.dit-accel-12345678").mkdir()
    (folder / ".a.dit-accel-12345678/a.pt").write_bytes(b"half of it")


def test_leftovers_of_killed_runs_are_removed(pipelines, tmp_path):
    folders = [tmp_path / name for name in (".", "samples", "pictures", "report", "report/samples")]
    for folder in folders:
        add_leftovers(folder)
    (tmp_path / ".lock").write_text("process 1 on another host")
    assert convert(pipelines, tmp_path, "--steps", "1", "--report", "1", "--sample-every", "1", "--samples", "1") == 0
    assert (tmp_path / "report/evaluate.json").is_file() and (tmp_path / "pictures/step-000001-0.png").is_file()
    assert not list(tmp_path.rglob(".*"))


def test_second_run_in_a_folder_is_refused(pipelines, drawn, tmp_path, capsys):
    out = link_samples(drawn, tmp_path / "o")
    with locked(out, print):
        assert convert(pipelines, out) == 2
    message = (
        f"dit-accel: process {os.getpid()} on {socket.gethostname()} is writing into {out}: wait until it ends, or "
    )
    assert message in capsys.readouterr().err
    assert [x.name for x in out.iterdir()] == ["samples"]
    assert convert(pipelines, out) == 0


def test_broken_checkpoint_falls_back_to_the_previous_one(pipelines, drawn, tmp_path, capsys):
    out = link_samples(drawn, tmp_path / "o")
    assert convert(pipelines, out, "--steps", "4") == 0
    (out / "checkpoint.pt").write_bytes(b"torn")
    assert load_checkpoint(out)["step"] == 2
    (out / "checkpoint.previous.pt").write_bytes(b"torn")
    assert convert(pipelines, out, "--steps", "4") == 2
    assert "no checkpoint can be read" in capsys.readouterr().err


def test_card_drops_the_report_of_earlier_weights(pipelines, drawn, tmp_path):
    out = link_samples(drawn, tmp_path / "o")
    assert convert(pipelines, out, "--steps", "1", "--report", "1") == 0
    assert convert(pipelines, out, "--steps", "1") == 0
    assert "## Evaluation" in (out / "README.md").read_text()
    assert convert(pipelines, out, "--steps", "2") == 0
    assert "## Evaluation" not in (out / "README.md").read_text()


def test_fewer_steps_than_done_are_refused(pipelines, drawn, tmp_path, capsys):
    out = link_samples(drawn, tmp_path / "o")
    assert convert(pipelines, out) == 0
    before = (out / "dit_accel.safetensors").read_bytes()
    assert convert(pipelines, out, "--steps", "3") == 2
    message = (
        f"the run in {out} has already done 4 steps, more than --steps 3: give --steps 4 or more, or another --out"
    )
    assert message in capsys.readouterr().err
    assert convert(pipelines, out, "--steps", "4") == 0
    assert (out / "dit_accel.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "convert.json cannot be read as JSON (Expecting"),
        ("[]", "convert.json holds a JSON list, expected an object: restore it, or choose another folder"),
        ("{}", "convert.json has no request of a conversion: restore it, or choose another --out"),
    ],
)
def test_damaged_convert_json_is_refused(pipelines, tmp_path, content, message, capsys):
    (tmp_path / "convert.json").write_text(content)
    assert convert(pipelines, tmp_path) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "samples").exists()


STATE = {
    "step": 2, "stage": 0, "scores": None, "history": [{}, {}], "parameters": {"a": torch.zeros(2)},
    "optimizer": {"state": {}, "param_groups": []}, "scaler": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: path.mkdir(), "checkpoint.pt: Is a directory"),
        (lambda path: path.write_text("a text"), "checkpoint.pt is damaged, or not a checkpoint"),
        (
            lambda path: torch.save([1], path),
            "is not a checkpoint of a conversion: expected a dict, got a list",
        ),
        (
            lambda path: torch.save({"a": torch.zeros(2)}, path),
            "step, stage, scores, history, parameters, optimizer, scaler missing or of a wrong type",
        ),
        (lambda path: torch.save({**STATE, "step": 3}, path), "2 losses for 3 steps"),
        (
            lambda path: torch.save({**STATE, "stage": 1}, path),
            "step 2 is in stage 2, which does not fit the 1 here",
        ),
        (lambda path: torch.save(STATE, path), "is of another model or other options ("),
    ],
)
def test_checkpoint_of_another_kind_is_refused(pipelines, drawn, tmp_path, make, message, capsys):
    out = link_samples(drawn, tmp_path / "o")
    make(out / "checkpoint.pt")
    assert convert(pipelines, out) == 2
    error = capsys.readouterr().err
    assert message in error and str(out) in error and "choose another --out" in error
    assert not (out / "dit_accel.safetensors").exists()


def change(path, **tensors):
    """Overwrite tensors of a sample and keep its metadata."""
    with safe_open(path, "pt") as file:
        about = file.metadata()
    save_file({**load_file(path), **tensors}, path, about)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, shape: change(path, latents=torch.zeros(shape[0], shape[1] + 1, *shape[2:])),
        lambda path, shape: change(path, latents=torch.zeros(shape, dtype=torch.float64)),
        lambda path, shape: change(path, another=torch.zeros(3)),
        lambda path, shape: save_file({"latents": torch.zeros(shape)}, path),
        lambda path, shape: path.write_bytes(path.read_bytes()[:-10]),
    ],
)
def test_sample_of_another_shape_is_made_again(pipelines, drawn, tmp_path, damage):
    shutil.copytree(drawn, tmp_path / "samples")
    before = {x.name: x.read_bytes() for x in (tmp_path / "samples").iterdir()}
    path = tmp_path / "samples/000001.safetensors"
    damage(path, load_file(path)["latents"].shape)
    assert convert(pipelines, tmp_path, "--steps", "1") == 0
    assert {x.name: x.read_bytes() for x in (tmp_path / "samples").iterdir()} == before


@pytest.mark.parametrize("key, value", [("latents", float("inf")), ("conditions/encoder_hidden_states", float("nan"))])
def test_sample_that_is_not_finite_is_refused(pipelines, drawn, tmp_path, key, value, capsys):
    shutil.copytree(drawn, tmp_path / "samples")
    path = tmp_path / "samples/000001.safetensors"
    tensor = load_file(path)[key]
    tensor.view(-1)[3] = value
    change(path, **{key: tensor})
    assert convert(pipelines, tmp_path) == 2
    assert f"{path}: its {key} are not finite: remove it and run the same command again" in capsys.readouterr().err
    path.unlink()
    assert convert(pipelines, tmp_path) == 0


def test_teacher_that_draws_nan_is_reported(pipelines, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SampleCache, "_draw", lambda self, bucket, prompt, seed, shape: torch.full(shape, float("nan")))
    assert convert(pipelines, tmp_path) == 2
    assert "FluxPipeline gives latents that are not finite for seed 0" in capsys.readouterr().err
    assert not list((tmp_path / "samples").iterdir())


def test_folder_of_another_request_is_refused(pipelines, drawn, tmp_path, capsys):
    out = link_samples(drawn, tmp_path / "o")
    assert convert(pipelines, out, "--steps", "1") == 0
    assert convert(pipelines, out, "--steps", "1", "--lr", "1e-3") == 2
    assert "lr None, now 0.001" in capsys.readouterr().err
