"""Conversions by two processes under DeepSpeed's ZeRO: they are one process with twice the batch, stop together and go
on, and what cannot be run is told before any work."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from test_convert_distributed import GNA, SLA, TRANSFER, assert_refused, convert, link_samples, read, told
from tiny_pipelines import save_flux

import dit_accel.convert.run
from dit_accel.convert.checkpoint import load_checkpoint
from dit_accel.convert.trainer import Trainer
from dit_accel.convert.zero import set_up_zero

ASKED = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
RUNS = {
    "bf16": ("1", ("--attn", SLA, "--train", "lora", "--rank", "2", "--mixed-precision", "bf16")),
    "transfer": ("2", TRANSFER),
}  # the stage of ZeRO, and the command's options


def run_both(folder, name, ends=0):
    """A run by two processes, that have to end so. DeepSpeed starts once in a process."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = str(held.getsockname()[1])
    started = []
    for rank in "01":
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        stage = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": RUNS[name][0], "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(folder), name, str(ends)]
        environment = {**os.environ, **world, **ASKED, **stage}
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for process in started:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == ends, said[-3000:].decode()


def test_two_processes_are_one_with_twice_the_batch_stop_together_and_go_on(tmp_path, capsys):
    """With a teacher, stages, accumulation and LoRA. In one test, since workers share no fixture."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    save_flux(tmp_path / "flux")
    assert convert(tmp_path, tmp_path / "drawn", 1, "--attn", GNA, "--steps", "1") == 0
    one, two = tmp_path / "one", tmp_path / "two"
    for name in RUNS:
        AcceleratorState._reset_state(True)  # of another precision
        assert convert(tmp_path, link_samples(tmp_path, one / name), 2, *RUNS[name][1]) == 0
        link_samples(tmp_path, two / name)
    AcceleratorState._reset_state(True)
    assert convert(tmp_path, link_samples(tmp_path, tmp_path / "float32/bf16"), 2, *RUNS["bf16"][1][:-2]) == 0

    run_both(tmp_path, "bf16")
    ours, theirs, plain = (told(x / "bf16")["history"][0]["loss"] for x in (two, one, tmp_path / "float32"))
    assert abs(ours - theirs) < 0.1 * abs(ours - plain)  # DeepSpeed's autocast is ours, and is there
    assert_same(two / "bf16", one / "bf16", 1e-3)

    run_both(tmp_path, "transfer", 130)  # a signal in the third step, to the second process alone
    alone = link_samples(tmp_path, tmp_path / "alone")
    shutil.copy(two / "transfer/checkpoint.pt", alone)
    assert load_checkpoint(alone)["step"] == 3
    run_both(tmp_path, "transfer")
    assert_same(two / "transfer", one / "transfer", 1e-5)
    assert convert(tmp_path, alone, 2, *TRANSFER) == 2  # what the optimizer holds is in parts
    assert "was written under DeepSpeed: go on as it was begun" in " ".join(capsys.readouterr().err.split())


def assert_same(ours, theirs, within):
    """Losses of each step, and the file."""
    histories = told(ours)["history"], told(theirs)["history"]
    assert told(ours)["processes"] == 2
    assert len(histories[0]) == 4
    for a, b in zip(*histories, strict=True):
        assert a == pytest.approx(b, rel=within, abs=within)
    (a, about), (b, there) = (read(out / "dit_accel.safetensors") for out in (ours, theirs))
    assert a and about == there
    torch.testing.assert_close(a, b, atol=within, rtol=0)


@pytest.mark.parametrize(
    "environment, more, said",
    [
        ({}, (), "does not go with --device cpu"),
        ({"ACCELERATE_DYNAMO_BACKEND": "inductor"}, (), "does not compile under DeepSpeed: set dynamo_backend: no"),
        ({}, ("--mixed-precision", "fp16"), "fp16 is not taken under DeepSpeed: use bf16"),
        ({}, ("--recipe", "linvideo"), "which DeepSpeed does not know: choose FSDP"),
    ],
)
def test_what_cannot_be_run_is_told_before_any_work(tmp_path, monkeypatch, environment, more, said, capsys):
    for key, value in {**ASKED, **environment}.items():
        monkeypatch.setenv(key, value)
    assert_refused(tmp_path, capsys, said, *more)


def test_deepspeed_that_is_not_installed_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("dit_accel.convert.zero.find_spec", lambda name: None)
    assert_refused(tmp_path, capsys, "not installed: pip install deepspeed")


@pytest.mark.parametrize(
    "config, said",
    [
        ({"zero_optimization": {"stage": 3}}, "stage 1 or 2, and zero_stage is 3: choose FSDP of version 2"),
        ({}, "zero_stage is 0"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "ZeRO's offload_optimizer: set its device to none",
        ),
        ({"zero_optimization": {"stage": 1}, "scheduler": {}}, "take the section scheduler out"),
        ({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}, "take the section fp16 out"),
    ],
)
def test_configurations_that_cannot_be_run_are_told(config, said):
    plugin = SimpleNamespace(deepspeed_config=config)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin), num_processes=2
    )
    with pytest.raises(ValueError, match=said):
        set_up_zero(accelerator, 1, "no")


def stop_in_the_third_step(trainer, batches, take=Trainer._take):
    if trainer.step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGINT)
    return take(trainer, batches)


def run_as_one_of_two(folder, name, ends):
    """accelerate has to be told of a backend on machines without GPUs."""
    torch.set_num_threads(1)
    gloo = [InitProcessGroupKwargs(backend="gloo")]
    dit_accel.convert.run.Accelerator = partial(Accelerator, kwargs_handlers=gloo)
    if ends:
        Trainer._take = stop_in_the_third_step
    return convert(folder, folder / "two" / name, 1, *RUNS[name][1], device=None)


if __name__ == "__main__":
    sys.exit(run_as_one_of_two(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
