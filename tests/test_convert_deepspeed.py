"""Conversions by two processes with DeepSpeed ZeRO: they equal one process with twice the batch, stop together and
resume; unsupported configurations are refused before any work."""

import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from test_convert_distributed import (
    GNA,
    SLA,
    TRANSFER,
    assert_refused,
    convert,
    link_samples,
    read,
    read_about,
    save_pipeline,
)
from two_processes import finish, fork_both, start

import dit_accel.conversion.run
from dit_accel.conversion.checkpoint import load_checkpoint
from dit_accel.conversion.parallel.zero import set_up_zero
from dit_accel.conversion.trainer import Trainer

USE_DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
RUNS = {
    "bf16": ("1", ("--attn", SLA, "--train", "lora", "--rank", "2", "--mixed-precision", "bf16")),
    "transfer": ("2", TRANSFER),
}  # stage of ZeRO, options of the command


def test_two_zero_processes_equal_one_and_resume(tmp_path, capsys):
    """With a teacher, stages, accumulation and LoRA. One test, since pytest workers do not share fixtures."""
    save_pipeline(tmp_path)
    assert convert(tmp_path, tmp_path / "drawn", 1, "--attn", GNA, "--steps", "1") == 0
    one, two = tmp_path / "one", tmp_path / "two"
    for name in RUNS:
        AcceleratorState._reset_state(True)  # it holds the precision
        assert convert(tmp_path, link_samples(tmp_path, one / name), 2, *RUNS[name][1]) == 0
        link_samples(tmp_path, two / name)
    script = start(__file__, tmp_path, **USE_DEEPSPEED)
    AcceleratorState._reset_state(True)
    assert convert(tmp_path, link_samples(tmp_path, tmp_path / "float32/bf16"), 2, *RUNS["bf16"][1][:-2]) == 0
    finish(script)
    ours, theirs, plain = (read_about(x / "bf16")["history"][0]["loss"] for x in (two, one, tmp_path / "float32"))
    assert abs(ours - theirs) < 0.1 * abs(ours - plain)  # autocast is active with DeepSpeed, too
    assert_same(two / "bf16", one / "bf16", 1e-3)

    alone = link_samples(tmp_path, tmp_path / "alone")
    shutil.copy(two / "transfer/reached.pt", alone / "checkpoint.pt")
    assert load_checkpoint(alone)["step"] == 3
    assert_same(two / "transfer", one / "transfer", 1e-5)
    assert convert(tmp_path, alone, 2, *TRANSFER) == 2  # the optimizer state is sharded
    assert "was written with DeepSpeed: resume with DeepSpeed, or choose another --out" in " ".join(
        capsys.readouterr().err.split()
    )


def assert_same(ours, theirs, within):
    """Compare the losses of each step and the saved file."""
    histories = read_about(ours)["history"], read_about(theirs)["history"]
    assert read_about(ours)["processes"] == 2
    assert len(histories[0]) == 4
    for a, b in zip(*histories, strict=True):
        assert a == pytest.approx(b, rel=within, abs=within)
    (a, about), (b, there) = (read(out / "dit_accel.safetensors") for out in (ours, theirs))
    assert a and about == there
    torch.testing.assert_close(a, b, atol=within, rtol=0)


@pytest.mark.parametrize(
    "environment, more, message",
    [
        ({}, (), "DeepSpeed needs accelerate launch, without --device cpu"),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "inductor"},
            (),
            "compilation with DeepSpeed: set dynamo_backend: no",
        ),
        ({}, ("--mixed-precision", "fp16"), "does not support --mixed-precision fp16 with DeepSpeed: use bf16"),
        ({}, ("--recipe", "linvideo"), "which DeepSpeed does not support: choose FSDP"),
    ],
)
def test_unsupported_launch_is_refused_before_any_work(tmp_path, monkeypatch, environment, more, message, capsys):
    for key, value in {**USE_DEEPSPEED, **environment}.items():
        monkeypatch.setenv(key, value)
    assert_refused(tmp_path, capsys, message, *more)


def test_missing_deepspeed_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("dit_accel.conversion.parallel.zero.find_spec", lambda name: None)
    assert_refused(tmp_path, capsys, "not installed: pip install deepspeed")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"zero_optimization": {"stage": 3}}, "stage 1 or 2, got zero_stage 3: choose FSDP of version 2"),
        ({}, "got zero_stage 0"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "ZeRO's offload_optimizer: set its device to none",
        ),
        ({"zero_optimization": {"stage": 1}, "scheduler": {}}, "convert has its own scheduler: remove this section"),
        (
            {"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}},
            "fp16 with DeepSpeed: remove this section",
        ),
    ],
)
def test_unsupported_deepspeed_config_is_refused(config, message):
    plugin = SimpleNamespace(deepspeed_config=config)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin), num_processes=2
    )
    with pytest.raises(ValueError, match=message):
        set_up_zero(accelerator, 1, "no")


def stop_in_the_third_step(trainer, batches, accumulate=Trainer._accumulate):
    if trainer.step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGINT)
    return accumulate(trainer, batches)


def run_as_one_of_two(folder, name, status):
    """Run one of two processes. On machines without GPUs accelerate needs an explicit backend."""
    torch.set_num_threads(1)
    gloo = [InitProcessGroupKwargs(backend="gloo")]
    dit_accel.conversion.run.Accelerator = partial(Accelerator, kwargs_handlers=gloo)
    if status:
        Trainer._accumulate = stop_in_the_third_step
    return convert(folder, folder / "two" / name, 1, *RUNS[name][1], device=None)


def run_all(folder):
    """Do all of RUNS, each in new processes, since DeepSpeed can start once per process; the last one is stopped by
    a signal in the third step, only to the second process, and resumed."""
    import deepspeed  # noqa: F401 (before the processes are forked)

    for name, status in (("bf16", 0), ("transfer", 130), ("transfer", 0)):
        work = partial(run_as_one_of_two, folder, name, status)
        fork_both(work, status, ACCELERATE_DEEPSPEED_ZERO_STAGE=RUNS[name][0])
        if status:
            shutil.copy(folder / "two" / name / "checkpoint.pt", folder / "two" / name / "reached.pt")


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
