"""Conversions by two processes with DDP and FSDP: they equal one process with twice the batch, stop together and
resume; unsupported configurations are refused before any work."""

import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from PIL import Image
from safetensors import safe_open
from tiny import TINY
from tiny_pipelines import save_flux
from two_processes import finish, fork_both, free_ports, start

from dit_accel.cli.app import main
from dit_accel.conversion.checkpoint import load_checkpoint
from dit_accel.conversion.parallel.fsdp import Fsdp, choose_blocks
from dit_accel.conversion.trainer import Trainer

SLA, GNA = "sla:critical=0.3,block_q=8,block_kv=8", "gna:window=3"
FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}  # fmt: skip
TRANSFER = ("--attn", SLA, "--recipe", "attention-transfer", "--rank", "2", "--accumulate", "2", "--save-every", "2")
RUNS = {
    "plain": ("--attn", GNA),
    "stages": TRANSFER,
    "linvideo": (
        "--attn", SLA, "--recipe", "linvideo", "--convert-layers", "2", "--gradient-checkpointing",
        "--lr", "0.0001", "--sample-every", "2", "--report", "1",
    ),
    "transfer": TRANSFER,
    "stopped": TRANSFER,
}  # fmt: skip


def save_pipeline(folder):
    """Save a tiny Flux that draws in three steps, and a prompt."""
    (folder / "prompts.txt").write_text("a red circle\n")
    (save_flux(folder / "flux") / "defaults.json").write_text('{"num_inference_steps": 3}')


def convert(folder, out, batch, *more, device="cpu"):
    """Run the command and return its exit status."""
    given = ["convert", "--pipeline", str(folder / "flux"), "--out", str(out), "--data-free"]
    given += ["--device", device] if device else []
    given += ["--prompts", str(folder / "prompts.txt"), "--samples", "4", "--height", "32", "--width", "32"]
    given += ["--batch", str(batch), "--steps", "4", "--warmup", "2", "--report", "0"]
    with pytest.raises(SystemExit) as stopped:
        main([*given, *more])
    return stopped.value.code


def assert_refused(folder, capsys, message, *more):
    """Check that the command fails with the message before any work."""
    (folder / "prompts.txt").write_text("a red circle\n")
    assert convert(folder, folder / "o", 1, "--attn", GNA, *more) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list((folder / "o").glob("*"))


def link_samples(folder, out):
    out.mkdir(parents=True)
    (out / "samples").symlink_to(folder / "drawn/samples")
    return out


def read_about(out):
    return json.loads((out / "convert.json").read_text())


def read(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def assert_same(ours, theirs, within):
    """Compare losses of each step, the saved file and the checkpoint with its optimizer state."""
    histories = read_about(ours)["history"], read_about(theirs)["history"]
    assert len(histories[0]) == 4
    for a, b in zip(*histories, strict=True):
        assert a == pytest.approx(b, rel=within, abs=within)
    assert read_about(ours)["layers"] == read_about(theirs)["layers"]
    (a, about), (b, there) = (read(out / "dit_accel.safetensors") for out in (ours, theirs))
    assert a and about == there
    torch.testing.assert_close(a, b, atol=within, rtol=0)
    a, b = (load_checkpoint(out) for out in (ours, theirs))
    torch.testing.assert_close(a["parameters"], b["parameters"], atol=within, rtol=0)
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], atol=within, rtol=0)


def assert_same_pictures(ours, theirs):
    for name in ("step-000002-0.png", "step-000004-0.png"):
        a, b = (np.array(Image.open(x / "pictures" / name)).astype(int) for x in (ours, theirs))
        assert np.abs(a - b).max() <= 1 and (a[:, :32] != a[:, 32:]).any()


def test_gradients_that_are_not_sharded_are_averaged():
    """Adam hardly depends on a factor on all gradients, so equal losses do not show a sum in place of the mean."""
    other = {"mean": lambda mine: (mine + 0.3) / 2, "sum": lambda mine: mine + 0.3}  # 0.3: the other process's
    accelerator = SimpleNamespace(
        num_processes=2, reduce=lambda mine, how: other[how](mine), clip_grad_norm_=torch.nn.utils.clip_grad_norm_
    )
    scores = torch.nn.Parameter(torch.zeros(2))
    scores.grad = torch.tensor([0.1, -0.1])
    Fsdp(accelerator).clip_gradients([scores])
    torch.testing.assert_close(scores.grad, torch.tensor([0.2, 0.1]))


def test_two_processes_equal_one_and_resume(tmp_path):
    """Two runs with DDP, the others with FSDP: with a teacher, stages, a selection of layers, LoRA, pictures and the
    report. One test, since pytest workers do not share fixtures."""
    save_pipeline(tmp_path)
    assert convert(tmp_path, tmp_path / "drawn", 1, "--attn", GNA, "--steps", "1") == 0
    one, two = tmp_path / "one", tmp_path / "two"
    for name in RUNS:
        link_samples(tmp_path, two / name)
    script = start(__file__, tmp_path)
    for name in ("plain", "linvideo", "transfer"):
        assert convert(tmp_path, link_samples(tmp_path, one / name), 2, *RUNS[name], "--report", "0") == 0
    finish(script)
    for name in ("plain", "linvideo", "transfer"):
        assert read_about(two / name)["processes"] == 2
        assert_same(two / name, one / name, 1e-5)
    assert_same(two / "stages", one / "transfer", 1e-5)
    assert_same_pictures(two / "linvideo", one / "linvideo")
    assert (two / "linvideo/report/evaluate.json").is_file()
    assert "## Evaluation" in (two / "linvideo/README.md").read_text()

    reached = torch.load(two / "stopped/reached.pt")  # a signal in the third step, only to the second process
    assert reached["step"] == 3 and reached["stage"] == 1
    assert_same(two / "stopped", two / "transfer", 1e-6)
    alone = link_samples(tmp_path, tmp_path / "alone")  # resumes with one process and without FSDP
    torch.save(reached, alone / "checkpoint.pt")
    assert convert(tmp_path, alone, 2, *TRANSFER) == 0
    assert_same(alone, one / "transfer", 1e-5)


@pytest.mark.parametrize(
    "environment, more, message",
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, (), "configured for Megatron-LM, which convert does not support"),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
            (),
            "configured for a parallelism_config, which",
        ),
        ({"FSDP_VERSION": "1"}, (), "FSDP of version 1, convert supports version 2: set fsdp_version: 2"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, (), "set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, (), "set fsdp_offload_params: false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, (), "give --gradient-checkpointing"),
        ({"ACCELERATE_DYNAMO_BACKEND": "inductor"}, (), "dynamo_backend: no"),
        ({}, ("--mixed-precision", "fp16"), "does not support --mixed-precision fp16 with FSDP: use bf16"),
    ],
)
def test_unsupported_launch_is_refused_before_any_work(tmp_path, monkeypatch, environment, more, message, capsys):
    for key, value in {**FSDP, **environment}.items():
        monkeypatch.setenv(key, value)
    assert_refused(tmp_path, capsys, message, *more)


def test_default_blocks_are_diffusers_and_unknown_are_refused():
    for given, model in ((None, "wan_vace"), (["NoSuch"], "flux")):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", transformer_cls_names_to_wrap=given
        )
        state = SimpleNamespace(fsdp_plugin=plugin)
        accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, state=state)
        if given is None:
            choose_blocks(accelerator, TINY[model]())
            assert plugin.transformer_cls_names_to_wrap == ["WanTransformerBlock", "WanVACETransformerBlock"]
            continue
        with pytest.raises(ValueError, match=r"NoSuch; the blocks of Flux.* are FluxTransformerBlock, FluxSingle"):
            choose_blocks(accelerator, TINY[model]())


def stop_in_the_third_step(trainer, batches, accumulate=Trainer._accumulate):
    if trainer.step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGINT)
    return accumulate(trainer, batches)


def run_as_one_of_two(folder, ports):
    """Do all of RUNS, with one port per run; the last one is stopped and resumed."""
    torch.set_num_threads(1)
    for name, more in RUNS.items():
        os.environ.update(FSDP if name not in ("plain", "stages") else {})
        out = folder / "two" / name
        if name == "stopped":
            os.environ["MASTER_PORT"] = ports.pop()
            original, Trainer._accumulate = Trainer._accumulate, stop_in_the_third_step
            assert convert(folder, out, 1, *more) == 130
            Trainer._accumulate = original
            torch.distributed.barrier()
            if os.environ["RANK"] == "0":
                shutil.copy(out / "checkpoint.pt", out / "reached.pt")
            torch.distributed.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)
        os.environ["MASTER_PORT"] = ports.pop()
        assert convert(folder, out, 1, *more) == 0
        AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    fork_both(partial(run_as_one_of_two, Path(sys.argv[1]), free_ports(len(RUNS) + 1)))
