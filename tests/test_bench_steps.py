"""Steps and training steps of whole models under ``dit-accel bench``, at tiny sizes on the CPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from bench_trial import CPU, TRIAL, Silent, make_trial

from dit_accel.bench import models, step, train
from dit_accel.bench.command import bench
from dit_accel.bench.results import read_results
from dit_accel.bench.tables import table


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    monkeypatch.delenv("DIT_ACCEL_BACKEND", raising=False)


@pytest.mark.parametrize(
    "chosen, expected",
    [
        (
            ["--model", "flux-4096", "--variant", "dense", "--variant", "clear-r16"],
            [("flux-4096", "dense"), ("flux-4096", "clear-r16")],
        ),
        pytest.param(
            ["--model", "wan1.3b-480p", "--model", "flux-4096"],
            [
                ("wan1.3b-480p", "dense"), ("wan1.3b-480p", "sla"),
                ("flux-4096", "dense"), ("flux-4096", "clear-r8"), ("flux-4096", "clear-r16"),
            ],
            marks=pytest.mark.sweep,
        ),
    ],
)  # fmt: skip
def test_steps_at_tiny_sizes(tmp_path, chosen, expected):
    out = tmp_path / "step.json"
    assert bench(["step", *TRIAL, *chosen, "--out", str(out)], "dit-accel bench") == 0
    rows = read_results(out)["rows"]
    assert [(row["model"], row["variant"]) for row in rows] == expected
    dense = {row["model"]: row["ms"] for row in rows if row["variant"] == "dense"}
    for row in rows:
        assert row["status"] == "complete" and row["compile"] == "aot_eager" and row["first_step_s"] * 1e3 > row["ms"]
        assert sum(row["by_kernel"].values()) > 0
        if row["variant"] != "dense":
            assert row["times_dense"] == pytest.approx(dense[row["model"]] / row["ms"])
            assert "torch" in row["installed"] and row["baseline"] == "dense"
        else:
            assert row["drift"] == pytest.approx(row["again_ms"] / row["ms"])


@pytest.mark.sweep  # test_model_is_restored_after_a_step trains, too
def test_training_steps_at_tiny_sizes(tmp_path):
    """Rows without and with gradient checkpointing are kept in one file."""
    out = tmp_path / "train.json"
    chosen = ["--model", "wan1.3b-480p", "--out", str(out)]
    assert bench(["train", *TRIAL, *chosen], "b") == 0
    eager = ["--variant", "dense-eager", "--variant", "sla-eager"]
    assert bench(["train", *TRIAL, *chosen, *eager, "--checkpointing", "--keep", str(out)], "b") == 0
    content = read_results(out)
    rows = content["rows"]
    assert [(row["variant"], row["checkpointing"]) for row in rows] == [
        ("dense-eager", False), ("dense", False), ("sla", False), ("sla-eager", False),
        ("dense-eager", True), ("sla-eager", True),
    ]  # fmt: skip
    assert all(row["status"] == "complete" and row["tokens"] == 60 for row in rows)
    assert [row["compile"] for row in rows[:4]] == [None, "aot_eager", "aot_eager", None]
    assert rows[2]["baseline"] == "dense" and rows[2]["times_dense"] == pytest.approx(rows[1]["ms"] / rows[2]["ms"])
    assert rows[3]["baseline"] == rows[5]["baseline"] == "dense-eager"
    assert "critical=0.1" in rows[2]["options"] and "block_q=128" in rows[2]["options"]
    assert "| sla, eager, checkpointing |" in table(content)


def test_lengths_of_training_steps():
    tokens = [math.prod(model.grid) for model in models.TRAINING.values()]
    assert tokens[2] == 32760 and tokens[0] / tokens[2] == pytest.approx(0.24, abs=0.01)
    assert tokens[1] / tokens[2] == pytest.approx(0.52, abs=0.01)
    blocks = models.TRAINING["wan1.3b-480p"].build(torch.device("meta"), torch.bfloat16, 0).blocks
    assert len(blocks) == 4 and sum(p.numel() for p in blocks[0].parameters()) / 1e6 == pytest.approx(46, abs=1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_step_updates_every_weight(checkpointing, tmp_path, monkeypatch):
    made, kind = [], torch.optim.AdamW

    def optimizer(*arguments, **options):
        made.append(kind(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(torch.optim, "AdamW", optimizer)
    tiny = models.smoke(models.TRAINING["wan1.3b-480p"])
    model, inputs = tiny.build(CPU, torch.float32, 0), tiny.inputs(CPU, torch.float32, 0)
    model.set_attn_processor(tiny.ours["sla"][0])
    step._randomise(model, 0)
    request = replace(make_trial(tmp_path, ()), checkpointing=checkpointing)
    with train._training(model, inputs, request) as call:
        assert model.is_gradient_checkpointing == checkpointing and call() == call() > 0
    moments = {name: made[0].state[p]["exp_avg"] for name, p in model.named_parameters()}
    assert all(x.abs().max() > 0 for x in moments.values() if x.numel() > 1)
    assert any("dit_accel.weight" in name for name in moments)


@pytest.mark.parametrize("kind", [step.KIND, train.KIND], ids=["step", "train"])
def test_model_is_restored_after_a_step(kind, tmp_path):
    """Output, state dict, compilation and gradients are those of the original model."""
    small = models.smoke(models.MODELS["wan1.3b-480p"])
    model = small.build(CPU, torch.float32, 0)
    inputs = small.inputs(CPU, torch.float32, 0)
    with torch.no_grad():
        before = model(**inputs, return_dict=False)[0]
    keys = list(model.state_dict())
    request = replace(make_trial(tmp_path, ("wan1.3b-480p",)), checkpointing=True)
    figures = step._measure(small, model, "sla", kind, request, Silent())
    assert 0 < figures["fraction"] <= 1 and figures["compile"] == "aot_eager"
    with torch.no_grad():
        assert torch.equal(model(**inputs, return_dict=False)[0], before)
    assert list(model.state_dict()) == keys and not model.training and not model.is_gradient_checkpointing
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_learned_projection_is_random_in_a_step(tmp_path):
    small = models.smoke(models.MODELS["wan1.3b-480p"])
    model = small.build(CPU, torch.float32, 0)
    model.set_attn_processor(small.ours["sla"][0])
    with torch.no_grad():
        step._randomise(model, 0)
    weights = [block.attn1.dit_accel.weight for block in model.blocks]
    assert all(0.5 < float(weight.detach().std()) * weight.shape[-1] ** 0.5 < 2 for weight in weights)


def test_models_have_the_real_shapes():
    """Parameter counts are the published ones: 1.3 and 14 billion, and 11.9 billion for Flux.1-dev."""
    counts = {}
    for name in ("wan1.3b-480p", "wan14b-720p", "flux-4096"):
        model = models.MODELS[name].build(torch.device("meta"), torch.bfloat16, 0)
        counts[name] = sum(p.numel() for p in model.parameters()) / 1e9
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert counts["wan1.3b-480p"] == pytest.approx(1.42, abs=0.03)
    assert counts["wan14b-720p"] == pytest.approx(14.3, abs=0.2) and counts["flux-4096"] == pytest.approx(11.9, abs=0.1)
    assert torch.get_default_dtype() == torch.float32
    assert [16 * 16 * models.MODELS[f"flux-{n}"].grid[0] ** 2 for n in (1024, 8192)] == [1024**2, 8192**2]
