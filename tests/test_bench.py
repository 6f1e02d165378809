"""dit-accel bench: the whole path at tiny sizes on the CPU, its statistics, interruptions, tables and plots."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dit_accel import cli
from dit_accel.backend import BUILT
from dit_accel.bench import attention, models, scaling, step, train, versus
from dit_accel.bench.cases import BACKWARD, CASES, SCALING, select, small, smoke
from dit_accel.bench.command import bench
from dit_accel.bench.flex import check_rows, mask_of
from dit_accel.bench.report import fill
from dit_accel.bench.request import dense_attention
from dit_accel.bench.results import KEYS, Results, read_results
from dit_accel.bench.tables import table
from dit_accel.bench.timing import _short_name as short_name
from dit_accel.bench.timing import fit_growth, peak_memory, summarise, time_calls
from dit_accel.command import BadInput, Stopped

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TRIAL = ["--device", "cpu", "--smoke", "--repeats", "2"]


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    monkeypatch.delenv("DIT_ACCEL_BACKEND", raising=False)


def test_statistics():
    times = summarise([4.0, 1.0, 3.0, 2.0, 10.0], calls=7)
    assert (times.ms, times.q1, times.q3, times.least, times.samples, times.calls) == (3.0, 2.0, 4.0, 1.0, 5, 7)
    one = summarise([2.5])
    assert (one.ms, one.q1, one.q3, one.samples) == (2.5, 2.5, 2.5, 1)
    with pytest.raises(ValueError, match="no samples"):
        summarise([])


def test_samples_have_as_many_calls_as_their_length_asks(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def calls_of(seconds):
        made = []

        def call():
            made.append(1)
            clock[0] += seconds

        times = time_calls(call, CPU, samples=20, warm_up_ms=10.0)
        assert times.ms == pytest.approx(seconds * 1e3)
        return times.samples, times.calls

    assert calls_of(0.004) == (20, 5)
    assert calls_of(0.0001) == (20, 20)
    assert calls_of(2.0) == (5, 1)  # ten seconds' worth
    assert calls_of(60.0) == (3, 1)


def test_kernel_names_are_readable():
    assert short_name("block_sparse_fwd_kernel") == "block_sparse_fwd_kernel"
    long = (
        "void at::native::(anonymous namespace)::copy_kernel<4, at::native::F<float>()::{lambda(int)#1}>(int, F<int>)"
    )
    assert short_name(long) == "copy_kernel"
    assert short_name("Memcpy DtoD (Device -> Device)") == "DtoD"


def test_cases_are_those_of_the_issue():
    tokens = {name: case.layout.seq_len for name, case in CASES.items()}
    assert tokens["sla-wan1.3b-480p-all"] == 32760 and tokens["sla-wan14b-720p-marginal"] == 75600
    assert tokens["sla-hunyuan-720p-all"] == tokens["gna-hunyuan"] == 115200
    assert tokens["clear-flux-4096-r16"] == 66048 and tokens["gna-flux-256"] == 65536
    ideals = {r: 1 / CASES[f"clear-flux-4096-r{r}"].fraction for r in (8, 16, 32)}  # NUMBERS.md: 54.7, 37.4, 17.1
    assert [round(ideals[r], 1) for r in (8, 16, 32)] == [54.7, 37.4, 17.1]
    assert CASES["gna-hunyuan"].fraction == pytest.approx(18 * 24 * 24 / 115200)
    assert CASES["sla-wan1.3b-480p-all"].fraction == pytest.approx(0.05, rel=0.03)


def test_cases_without_kernels_are_measured_only_when_named(monkeypatch):
    monkeypatch.setitem(BUILT, "llsa", ("torch",))
    assert {case.mechanism for case in select([])} == {"sla", "clear", "gna"}
    assert len(select([], SCALING)) == len(SCALING)  # nothing else is there
    monkeypatch.setitem(BUILT, "llsa", ("torch", "triton"))
    assert {case.mechanism for case in select([])} == {"sla", "clear", "gna", "llsa"}
    assert [case.goal for case in select(["llsa-256", "llsa-256-wide"])] == [30.0, 30.0]


def test_backward_cases_are_those_of_the_issue():
    goals = {name: case.goal for name, case in BACKWARD.items()}
    assert goals == {
        "sla-wan1.3b-480p-10-all": 5.0, "sla-wan1.3b-480p-10-marginal": 5.0, "clear-flux-4096-r16": 10.0,
        "gna-hunyuan": 6.0, "llsa-256": 20.0, "llsa-256-wide": None,
    }  # fmt: skip
    assert BACKWARD["sla-wan1.3b-480p-10-all"].fraction == pytest.approx(0.10, rel=0.03)
    assert all(case.options == small(case).options for case in BACKWARD.values())
    assert all(small(case).layout.seq_len < 2**15 and 0 < small(case).fraction < 1 for case in BACKWARD.values())


def test_sizes_go_from_4k_to_1m_tokens():
    sizes = [case.layout.seq_len for case in SCALING.values()]
    assert sizes == sorted(sizes) and (sizes[0], sizes[-1]) == (2**12, 2**20) and len(sizes) == 9
    assert all((case.heads, case.head_dim, case.options["topk"]) == (8, 64, 8) for case in SCALING.values())
    assert len({smoke(case).layout.seq_len for case in SCALING.values()}) == 9


def test_cases_are_chosen_by_name_or_beginning():
    assert [case.name for case in select(["sla-wan1.3b-480p"])] == ["sla-wan1.3b-480p-all", "sla-wan1.3b-480p-marginal"]
    assert [case.name for case in select(["llsa-256"])] == ["llsa-256"]
    with pytest.raises(ValueError, match="did you mean 'gna-hunyuan'"):
        select(["gna-hunyan"])
    with pytest.raises(ValueError, match=r"did you mean 'wan1\.3b-480p'"):
        models.select(("wan1.3b-48p",))


@pytest.mark.parametrize("name", ["clear-flux-4096-r8", "gna-hunyuan", "gna-flux-256"])
def test_the_mask_of_the_check_is_the_mechanism_s(name):
    """Every row, and as many logits as the fraction says; a wrong output is refused."""
    case = smoke(CASES[name])
    tensors = case.inputs(CPU, torch.float32, "heads-first", 0)
    out = case.call(tensors, {}, "torch")
    length = case.layout.seq_len
    assert check_rows(case, tensors, out, rows=length)["rows"] == length
    rows = torch.arange(length)
    seen = int(mask_of(case)(0, 0, rows[:, None], rows[None]).sum())
    assert seen / length**2 == pytest.approx(case.fraction) and seen < length**2
    wrong = torch.nn.functional.scaled_dot_product_attention(*tensors)
    with pytest.raises(ArithmeticError, match="rows are off by"):
        check_rows(case, tensors, wrong)
    with pytest.raises(ArithmeticError, match="NaN"):
        check_rows(case, tensors, torch.full_like(out, torch.nan))


def test_inputs_lie_as_asked():
    case = smoke(CASES["sla-wan1.3b-480p-all"])
    tokens_first = case.inputs(CPU, torch.float32, "tokens-first", 0)
    assert all(x.transpose(1, 2).is_contiguous() and x.shape == (1, 2, 192, 16) for x in tokens_first)
    assert case.inputs(CPU, torch.float32, "heads-first", 0)[0].is_contiguous()
    assert all(x.any() for x in case.parameters(CPU, torch.float32, 0).values())


def test_attention_at_tiny_sizes(tmp_path, capsys):
    out = tmp_path / "results" / "attention.json"
    names = ["sla-wan1.3b-480p-marginal", "clear-flux-4096-r16", "gna-hunyuan", "llsa-256"]
    chosen = [word for name in names for word in ("--case", name)]
    assert bench(["attention", *TRIAL, *chosen, "--flex", "--out", str(out)], "dit-accel bench") == 0
    content = read_results(out)
    assert content["status"] == "complete" and content["smoke"] and content["kind"] == "attention"
    assert content["command"][:2] == ["dit-accel bench", "attention"]
    assert content["versions"]["dit-accel"] and content["machine"]["device"] == "cpu"
    assert [row["case"] for row in content["rows"]] == names
    for row in content["rows"]:
        dense, ours = row["dense"], row["ours"]
        assert row["status"] == "complete" and row["backend"] == "torch"
        assert dense["implementation"] == "torch SDPA (cpu)"
        assert dense["ms"] == pytest.approx((dense["before"]["ms"] + dense["after"]["ms"]) / 2)
        assert row["times_dense"] == pytest.approx(dense["ms"] / ours["ms"])
        assert row["efficiency"] == pytest.approx(row["times_dense"] * row["fraction"]) and row["fraction"] < 1
        assert sum(ours["by_kernel"].values()) > 0 and ours["samples"] == 2
    flex = {row["case"]: row["flex"] for row in content["rows"]}
    assert flex["sla-wan1.3b-480p-marginal"] is None and flex["gna-hunyuan"]["mask_ms"] > 0
    assert content["rows"][1]["checked"]["rows"] == 64 and content["rows"][0]["checked"]["rows"] == 0
    assert "FlexAttention" in table(content)
    assert "gna-hunyuan (torch): dense" in capsys.readouterr().out


def test_backward_at_tiny_sizes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # its own file by default
    chosen = ["--case", "sla-wan1.3b-480p-10-all", "--case", "llsa-256"]
    assert bench(["attention", *TRIAL, *chosen, "--backward"], "b") == 0
    content = read_results(tmp_path / "benchmarks" / "backward.json")
    assert content["kind"] == "backward" and [row["case"] for row in content["rows"]] == chosen[1::2]
    for row in content["rows"]:
        dense, ours = row["dense"], row["ours"]
        assert row["status"] == "complete" and row["pass"] == "backward"
        assert row["times_dense"] == pytest.approx(dense["ms"] / ours["ms"])
        assert dense["ms"] == pytest.approx((dense["before"]["ms"] + dense["after"]["ms"]) / 2)
        assert min(dense["both_ms"], ours["both_ms"], ours["forward_ms"]) > 0
        assert any("backward" in name.lower() for name in ours["by_kernel"])
        names = ["query", "key", "value", *(["weight", "bias"] if row["mechanism"] == "sla" else [])]
        assert list(row["checked_gradients"]["errors"]) == names
        assert max(row["checked_gradients"]["errors"].values()) < 1e-5
    assert "sla-wan1.3b-480p-10-all (torch), backward: dense" in capsys.readouterr().out


@pytest.mark.parametrize("factor, message", [(1.1, "the gradient of query is off by 0.1"), (torch.nan, "off by nan")])
def test_no_speed_of_wrong_gradients(factor, message, tmp_path, monkeypatch):
    case, call = smoke(BACKWARD["clear-flux-4096-r16"]), versus._call

    def wrong(case, leaves, backend):
        return call(case, leaves, "torch") * (1 if backend == "torch" else factor)

    monkeypatch.setattr(versus, "_call", wrong)
    request = make_trial(tmp_path, ())
    assert versus.check_gradients(case, "torch", request)["errors"]["query"] == 0
    with pytest.raises(ArithmeticError, match=message):
        versus.check_gradients(case, "another", request)
    monkeypatch.setattr(versus, "check_gradients", lambda *_: {})
    if factor != factor:
        with pytest.raises(ArithmeticError, match="the gradient of query holds NaN"):
            versus.PASSES["backward"](case, "another", request, Silent(), False)


def test_gradients_in_low_precision_are_near_enough(tmp_path):
    """bfloat16 against float32 in plain torch, at the sizes of the check: far inside what it allows."""
    request = replace(make_trial(tmp_path, ()), dtype=torch.bfloat16)
    for name in ("sla-wan1.3b-480p-10-marginal", "llsa-256"):
        checked = versus.check_gradients(BACKWARD[name], "torch", request)
        assert 0 < max(checked["errors"].values()) < checked["allowed"] / 4


def test_scaling_at_tiny_sizes(tmp_path):
    out = tmp_path / "scaling.json"
    chosen = ["--case", "llsa-64x64", "--case", "llsa-96x96"]
    assert bench(["scaling", *TRIAL, *chosen, "--out", str(out)], "b") == 0
    assert read_results(out)["growth"] == []
    assert bench(["scaling", *TRIAL, "--case", "llsa-128x128", "--keep", str(out), "--out", str(out)], "b") == 0
    content = read_results(out)
    assert [(row["tokens"], row["pass"]) for row in content["rows"]] == [
        (tokens, which) for tokens in (16, 36, 64) for which in ("forward", "backward")
    ]
    assert all(row["status"] == "complete" and row["dense"]["ms"] > 0 for row in content["rows"])
    assert [(fit["pass"], fit["from"], fit["to"], fit["sizes"]) for fit in content["growth"]] == [
        ("forward", 16, 64, 3), ("backward", 16, 64, 3),
    ]  # fmt: skip
    assert table(content).count("its time grows as") == 2


def scaling_row(tokens, which="forward", ms=1.0, dense=1.0):
    row = attention_row(case=f"llsa-{tokens}", work="LLSA", tokens=tokens, goal=None, ours={"ms": ms, "peak_bytes": 0})
    return {**row, "pass": which, "dense": None if dense is None else {"ms": dense}}


def test_dense_is_left_out_where_it_would_take_more_than_a_second():
    quick = scaling._dense_is_quick
    next_one = scaling_row(2000)
    assert quick([], next_one) and quick([scaling_row(4000, dense=9e9)], next_one)
    assert quick([scaling_row(1000, dense=250.0)], next_one) and not quick([scaling_row(1000, dense=251.0)], next_one)
    assert not quick([scaling_row(1000, dense=None)], next_one)
    assert quick([scaling_row(1000, "backward", dense=9e9)], next_one)


def test_exponents():
    fit = fit_growth([(x, 3 * x**1.25) for x in (2, 8, 4)])
    assert fit == {"exponent": pytest.approx(1.25), "from": 2, "to": 8, "sizes": 3}
    assert fit_growth([(1, 1), (2, 2), (2, 3)]) is None and fit_growth([]) is None
    rows = [scaling_row(2**i, ms=max(2.0**17, 2.0**i) ** 1.2) for i in range(12, 21)]  # flat until 128k
    failed = {name: x for name, x in scaling_row(2**21).items() if name != "ours"}
    growth = scaling.summarise_growth([*rows, failed])["growth"]
    assert [(fit["from"], fit["reached"]) for fit in growth] == [(2**12, True), (2**17, False)]
    assert growth[1]["exponent"] == pytest.approx(1.2) and growth[0]["exponent"] < 1
    rows = [train_row(tokens=n, peak_bytes=7 * n, variant=v) for v in ("dense", "sla") for n in (10, 20, 40)]
    memory = train.summarise_memory([*rows, train_row(tokens=5, peak_bytes=None)])["memory"]
    assert [(fit["variant"], fit["exponent"]) for fit in memory] == [
        ("dense", pytest.approx(1)), ("sla", pytest.approx(1)),
    ]  # fmt: skip


def test_steps_at_tiny_sizes(tmp_path):
    out = tmp_path / "step.json"
    chosen = ["--model", "wan1.3b-480p", "--model", "flux-4096"]
    assert bench(["step", *TRIAL, *chosen, "--out", str(out)], "dit-accel bench") == 0
    rows = read_results(out)["rows"]
    assert [(row["model"], row["variant"]) for row in rows] == [
        ("wan1.3b-480p", "dense"), ("wan1.3b-480p", "sla"),
        ("flux-4096", "dense"), ("flux-4096", "clear-r8"), ("flux-4096", "clear-r16"),
    ]  # fmt: skip
    for row in rows:
        assert row["status"] == "complete" and row["compile"] == "aot_eager" and row["first_step_s"] * 1e3 > row["ms"]
        assert sum(row["by_kernel"].values()) > 0
        if row["variant"] != "dense":
            assert row["times_dense"] == pytest.approx(rows[0 if row["model"][0] == "w" else 2]["ms"] / row["ms"])
            assert "torch" in row["installed"] and row["baseline"] == "dense"
        else:
            assert row["drift"] == pytest.approx(row["again_ms"] / row["ms"])


def test_training_steps_at_tiny_sizes(tmp_path):
    """Without and with checkpointing: rows of both stand beside each other."""
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
def test_a_training_step_reaches_every_weight(checkpointing, tmp_path, monkeypatch):
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
def test_a_step_leaves_the_model_as_it_was(kind, tmp_path):
    """dense after ours is dense: the same output, nothing installed, nothing compiled, nothing learned."""
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


def test_the_learned_projection_takes_part_in_a_step(tmp_path):
    small = models.smoke(models.MODELS["wan1.3b-480p"])
    model = small.build(CPU, torch.float32, 0)
    model.set_attn_processor(small.ours["sla"][0])
    with torch.no_grad():
        step._randomise(model, 0)
    weights = [block.attn1.dit_accel.weight for block in model.blocks]
    assert all(0.5 < float(weight.detach().std()) * weight.shape[-1] ** 0.5 < 2 for weight in weights)


class Silent:
    def doing(self, what):
        pass

    say = done = doing


def make_trial(folder, names):
    from dit_accel.bench.request import make_request

    rest = {"repeats": 2, "seed": 0, "keep": None, "command": ("test",), "names": names}
    return make_request("cpu", None, True, folder / "out.json", **rest)


def test_models_have_the_real_shapes():
    """Parameters as published: 1.3 and 14 billion, and Flux.1-dev's 11.9."""
    counts = {}
    for name in ("wan1.3b-480p", "wan14b-720p", "flux-4096"):
        model = models.MODELS[name].build(torch.device("meta"), torch.bfloat16, 0)
        counts[name] = sum(p.numel() for p in model.parameters()) / 1e9
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert counts["wan1.3b-480p"] == pytest.approx(1.42, abs=0.03)
    assert counts["wan14b-720p"] == pytest.approx(14.3, abs=0.2) and counts["flux-4096"] == pytest.approx(11.9, abs=0.1)
    assert torch.get_default_dtype() == torch.float32
    assert [16 * 16 * models.MODELS[f"flux-{n}"].grid[0] ** 2 for n in (1024, 8192)] == [1024**2, 8192**2]


def test_a_failing_case_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    measure = attention._measure

    def failing(case, *rest):
        if case.name == "gna-hunyuan":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 TiB\nmore of it")
        return measure(case, *rest)

    monkeypatch.setattr(attention, "_measure", failing)
    out = tmp_path / "a.json"
    assert bench(["attention", *TRIAL, "--case", "gna-hunyuan", "--case", "gna-flux-256", "--out", str(out)], "b") == 1
    content = read_results(out)
    assert [row["status"] for row in content["rows"]] == ["failed", "complete"] and content["status"] == "failed"
    assert "OutOfMemoryError: CUDA out of memory" in content["rows"][0]["error"]
    assert "failed: OutOfMemoryError" in table(content) and "3 TiB |" in table(content)
    assert "gna-hunyuan (torch): failed: OutOfMemoryError" in capsys.readouterr().out


def test_a_backend_that_is_not_here_is_told_by_the_row(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "a.json"
    wanted = ["--case", "gna-flux-256", "--backend", "triton", "--backend", "torch"]
    assert bench(["attention", *TRIAL, *wanted, "--out", str(out)], "b") == 1
    first, second = read_results(out)["rows"]
    assert "triton needs a GPU" in first["error"] and first["backend"] == "triton"
    assert second["status"] == "complete" and second["backend"] == "torch"


INTERRUPTED = {
    "attention": (attention, ["attention", "--case", "sla-wan1.3b-480p"]),
    "backward": (attention, ["attention", "--backward", "--case", "sla-wan1.3b-480p"]),
    "scaling": (attention, ["scaling", "--case", "llsa-64x64"]),
    "step": (step, ["step", "--model", "wan1.3b-480p"]),
    "train": (step, ["train", "--model", "wan1.3b-480p-half"]),
}


@pytest.mark.parametrize("what", INTERRUPTED)
def test_an_interrupted_run_keeps_what_it_finished(what, tmp_path, monkeypatch, capsys):
    module, words = INTERRUPTED[what]
    measure, seen = module._measure, []

    def stopping(*arguments):
        seen.append(arguments)
        if len(seen) == 2:
            assert json.loads(out.read_text())["status"] == "running" and len(read_results(out)["rows"]) == 1
            raise Stopped(signal.SIGTERM)
        return measure(*arguments)

    monkeypatch.setattr(module, "_measure", stopping)
    out = tmp_path / f"{what}.json"
    assert bench([*words, *TRIAL, "--out", str(out)], "b") == 143
    content = read_results(out)
    assert content["kind"] == what and content["status"] == "interrupted" and len(content["rows"]) == 1
    assert "not finished: interrupted" in table(content)
    assert f"stopped by SIGTERM; what was finished is in {out}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out]


def test_rows_of_an_earlier_run_are_kept_when_asked(tmp_path):
    first, second, other = (tmp_path / f"{name}.json" for name in ("first", "second", "other"))
    case = ["--case", "gna-flux-256"]
    assert bench(["attention", *TRIAL, *case, "--case", "gna-hunyuan", "--out", str(first)], "b") == 0
    assert bench(["attention", *TRIAL, *case, "--keep", str(first), "--out", str(second)], "b") == 0
    rows = read_results(second)["rows"]
    assert [row["case"] for row in rows] == ["gna-hunyuan", "gna-flux-256"]
    assert rows[1]["ours"] != read_results(first)["rows"][1]["ours"]
    content = json.loads(first.read_text())
    content["versions"]["torch"] = "1.0"
    other.write_text(json.dumps(content))
    for broken, message in ((other, "another versions"), (tmp_path / "none.json", "cannot read results")):
        with pytest.raises(BadInput, match=message):
            bench(["attention", *TRIAL, *case, "--keep", str(broken), "--out", str(second)], "b")
    assert len(read_results(second)["rows"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--device", "cpu"], "bench needs a CUDA GPU; found cpu"),
        (["step", "--device", "cpu"], "bench needs a CUDA GPU; found cpu"),
        (["attention", "--device", "cuda:77"], "device cuda:77 is not there"),
        (["attention", *TRIAL, "--case", "sla-wan"], "unknown case 'sla-wan'; did you mean 'sla-wan1"),
        (["attention", *TRIAL, "--backend", "tritn"], "unknown --backend 'tritn'; did you mean 'triton'"),
        (["step", *TRIAL, "--model", "flux"], "There are: wan1.3b-480p"),
        (["step", *TRIAL, "--variant", "gna"], "has no variant 'gna'; there are: dense-eager, dense, sla"),
        (["attention", *TRIAL, "--repeats", "0"], "takes a whole number from 1, got '0'"),
        (["attention", *TRIAL, "--out", "/proc/none/a.json"], "cannot write into /proc/none"),
        (["attention", *TRIAL, "--backward", "--flex"], "leave out --flex or --backward"),
        (["attention", *TRIAL, "--backward", "--case", "gna-flux-256"], "There are: sla-wan1.3b-480p-10-all"),
        (["scaling", *TRIAL, "--case", "llsa-256"], "unknown case 'llsa-256'; did you mean 'llsa-256x256'"),
        (["train", "--device", "cpu"], "bench needs a CUDA GPU; found cpu"),
        (["train", *TRIAL, "--model", "flux-1024"], "There are: wan1.3b-480p-quarter, wan1.3b-480p-half"),
        (["train", *TRIAL, "--variant", "gna"], "has no variant 'gna'; there are: dense-eager, dense, sla, sla-eager"),
        (["nothing"], "invalid choice: 'nothing'"),
        ([], "required: attention"),
        (["report", "--folder", "/nowhere"], "no results in /nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and message in told and told.count("\n") == 1


def test_help_comes_from_both_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "attention", "--help"])
    assert stop.value.code == 0 and "--case NAME" in capsys.readouterr().out


def test_it_runs_without_typer_rich_and_matplotlib(tmp_path):
    """As on a machine that has only torch and diffusers."""
    hidden = "import sys; sys.modules.update(dict.fromkeys(('typer', 'rich', 'matplotlib', 'torchmetrics')));"
    source = f"{hidden} import runpy; runpy.run_module('dit_accel.bench', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", source, "attention", *TRIAL, "--case", "gna-flux-256", "--out", "a.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "[1/1] gna-flux-256" in done.stdout and read_results(tmp_path / "a.json")["status"] == "complete"


def test_dense_is_torch_s_own_off_the_gpu():
    with dense_attention(CPU) as name:
        assert name == "torch SDPA (cpu)"
    assert peak_memory(lambda: torch.ones(3), CPU) is None


def attention_row(**changes):
    row = {
        "case": "gna-hunyuan", "backend": "triton", "work": "GNA, Hunyuan", "heads": 24, "tokens": 115200,
        "head_dim": 128, "fraction": 0.09, "goal": 9.7, "dense": {"ms": 275.0}, "ours": {"ms": 25.0},
        "times_dense": 11.0, "efficiency": 0.99, "reached": True, "status": "complete",
    }  # fmt: skip
    return {**row, **changes}


def hand_made(kind, rows, **changes):
    machine = {"device_name": "NVIDIA H200", "dtype": "bfloat16", "driver": "570.1"}
    versions = {"torch": "2.11.0", "triton": "3.6.0", "diffusers": "0.42.1", "dit-accel": "0.1.0"}
    content = {
        "kind": kind, "status": "complete", "date": "2026-01-02T03:04:05+00:00", "command": ["dit-accel bench", kind],
        "machine": machine, "versions": versions, "smoke": False, "rows": rows,
    }  # fmt: skip
    return {**content, **changes}


ATTENTION = hand_made("attention", [
    attention_row(),
    attention_row(work="CLEAR radius 8", goal=25.0, reached=False, flex={"ms": 12.8}, fraction=0.018),
    attention_row(work="broken", status="failed", error="RuntimeError: a | b"),
])  # fmt: skip
STEP = hand_made("step", [
    {"model": "flux-8192", "variant": "dense-eager", "work": "Flux 8192²", "ms": 89400.0, "peak_bytes": 3 * 2**30,
     "goal": None, "status": "complete"},
    {"model": "flux-8192", "variant": "clear-r16", "work": "Flux 8192²", "ms": 8000.0, "peak_bytes": 2 * 2**30,
     "goal": 10.0, "reached": True, "times_dense": 11.175, "fraction": 0.01, "status": "complete"},
])  # fmt: skip


def train_row(**changes):
    row = {
        "model": "wan1.3b-480p", "variant": "sla-eager", "checkpointing": False, "work": "4 blocks", "tokens": 32760,
        "ms": 100.0, "peak_bytes": 2**30, "goal": None, "status": "complete", "times_dense": 2.5, "fraction": 0.1,
    }  # fmt: skip
    return {**row, **changes}


def backward_row(**changes):
    sides = {
        "dense": {"ms": 31.6, "both_ms": 43.0, "peak_bytes": 2**30},
        "ours": {"ms": 5.0, "both_ms": 7.0, "peak_bytes": 2**29},
    }
    return attention_row(
        **{**sides, "pass": "backward", "work": "SLA 10 %", "times_dense": 6.32, "goal": 5.0}, **changes
    )


BACKWARD_RESULTS = hand_made("backward", [backward_row(), backward_row(status="failed", error="ValueError: no")])
_PASSES = ("forward", "backward")
_SIZES = [scaling_row(2**i, x, 2.0**i, 4.0**i if i < 14 else None) for i in (12, 13, 14) for x in _PASSES]
SCALING_RESULTS = hand_made("scaling", _SIZES, **scaling.summarise_growth(_SIZES))
_LENGTHS = [train_row(variant="dense", times_dense=None), *(train_row(tokens=n, peak_bytes=n) for n in (1, 2, 4))]
TRAIN = hand_made("train", _LENGTHS, **train.summarise_memory(_LENGTHS))


def quality_side(loss, right):
    check = {"teacher": 0.95, "student": right, "captions": 1000}
    return {"flow_loss": {"student_over_teacher": loss}, "logit_fraction": 0.0968, "prompt_check": check}


QUALITY = hand_made("quality", [
    {"teacher": "image, 3.0 M", "mechanism": "gna", "attention": "gna:window=18x18", "steps": 400, "bytes": 2**19,
     "before": quality_side(1.5, 0.1), "after": quality_side(1.012, 0.94), "status": "complete"},
])  # fmt: skip
EVERYTHING = (QUALITY, ATTENTION, BACKWARD_RESULTS, SCALING_RESULTS, STEP, TRAIN)


def test_tables_of_training_and_scaling():
    backward = table(BACKWARD_RESULTS).splitlines()
    assert backward[2].startswith(
        "| SLA 10 % (24, 115,200, 128) | 31.6 ms | 5 ms | 6.32× | ≥ 5× ✓ | 43 ms | 7 ms | 6.14× |"
    )
    assert backward[2].endswith("| 1.00 GiB | 0.50 GiB |") and "failed: ValueError: no" in backward[3]
    sizes = table(SCALING_RESULTS)
    assert "| LLSA (24, 16,384, 128) | backward | – | 16.4 s |" in sizes
    assert "Forward pass, triton, 4,096 to 16,384 tokens: its time grows as tokens^1.00, to reach ≤ 1.15 ✓." in sizes
    steps = table(TRAIN)
    assert "| 4 blocks (32,760) | dense, compiled | 100 ms | – | 10.0% | 1.00 GiB |\n" in steps
    assert "sla, eager, 1 to 4 tokens: its peak memory grows as tokens^1.00." in steps
    for lines in (backward[:4], sizes.split("\n\n")[0].splitlines(), steps.split("\n\n")[0].splitlines()):
        assert len({line.count("|") for line in lines}) == 1


def test_table_of_what_conversions_have_lost():
    line = table(QUALITY).splitlines()[2]
    assert line == (
        "| image, 3.0 M | `gna:window=18x18` | 9.7% | 400 | +50.0 % | +1.2 % | 95.0 % | 10.0 % | 94.0 % | 0.50 MiB |"
    )


def test_tables():
    shown = table(ATTENTION).splitlines()
    assert shown[2] == "| GNA, Hunyuan (24, 115,200, 128) | 275 ms | 25 ms | – | 11.00× | 9.0% | 99% | ≥ 9.7× ✓ |"
    assert "| 12.8 ms |" in shown[3] and shown[3].endswith("| 1.8% | 99% | ≥ 25× ✗ |")
    assert "failed: RuntimeError: a / b" in shown[4]
    assert len({line.count("|") for line in shown[:5]}) == 1
    graphed = {"dense": {"ms": 275.0, "graph_ms": 270.0}, "ours": {"ms": 25.0, "graph_ms": 20.0}}
    both = table(hand_made("attention", [attention_row(**graphed), attention_row()])).splitlines()
    assert "| 11.00× | 13.50× | 9.0% |" in both[2] and "| 11.00× | – | 9.0% |" in both[3]
    assert "NVIDIA H200, driver 570.1, bfloat16, torch 2.11.0, triton 3.6.0" in shown[-1]
    assert "`dit-accel bench attention`" in shown[-1] and "2026-01-02" in shown[-1]
    steps = table(STEP).splitlines()
    assert steps[2] == "| Flux 8192² | dense, eager | 89.4 s | – | – | 3.00 GiB | – |"
    assert steps[3] == "| Flux 8192² | clear-r16 | 8 s | 11.18× | 1.0% | 2.00 GiB | ≥ 10× ✓ |"


def test_report_fills_the_readme_and_draws(tmp_path, capsys):
    for content in EVERYTHING:
        (tmp_path / f"{content['kind']}.json").write_text(json.dumps(content))
    readme = tmp_path / "README.md"
    readme.write_text("Before\n<!-- bench:attention -->\nold\n<!-- /bench:attention -->\nafter\n")
    for _ in range(2):  # twice is as once
        assert bench(["report", "--folder", str(tmp_path), "--readme", str(readme)], "b") == 0
        filled = f"Before\n<!-- bench:attention -->\n{table(ATTENTION)}\n<!-- /bench:attention -->\nafter\n"
        assert readme.read_text() == filled
    told = capsys.readouterr().out
    assert "has no <!-- bench:step -->" in told and table(STEP) in told
    for kind in KEYS:
        with Image.open(tmp_path / f"{kind}.png") as picture:
            assert picture.width > 800 and len(picture.convert("RGB").getcolors(1 << 20)) > 10
    readme.write_text(readme.read_text() * 2)
    with pytest.raises(BadInput, match="2 times"):
        bench(["report", "--folder", str(tmp_path), "--readme", str(readme)], "b")
    (tmp_path / "step.json").write_text("{}")
    with pytest.raises(BadInput, match=r"step\.json was not written by dit-accel bench"):
        bench(["report", "--folder", str(tmp_path), "--readme", str(readme)], "b")


def test_report_says_what_it_lacks_without_matplotlib(tmp_path, monkeypatch):
    (tmp_path / "step.json").write_text(json.dumps(STEP))
    (tmp_path / "README.md").write_text("")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BadInput, match=r"pip install 'dit-accel\[bench\]'"):
        bench(["report", "--folder", str(tmp_path), "--readme", str(tmp_path / "README.md")], "b")


@pytest.mark.parametrize("kind", KEYS)
def test_the_readme_has_the_tables_of_the_results(kind):
    results = ROOT / "benchmarks" / f"{kind}.json"
    if not results.is_file():
        pytest.skip(f"{results.name} is not there: nothing was measured yet")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert fill(text, kind, table(read_results(results))) == text, "run: dit-accel bench report"


def test_results_are_written_whole(tmp_path, monkeypatch):
    results = Results("attention", tmp_path / "a.json", {"machine": {}})
    results.add({"case": "one"})
    with pytest.raises(ValueError, match="JSON"):
        results.add({"case": "two", "ms": float("nan")})
    assert [row["case"] for row in read_results(tmp_path / "a.json")["rows"]] == ["one"]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]
