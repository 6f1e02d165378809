"""``dit-accel bench`` at tiny sizes on the CPU: results, statistics, errors and interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_trial import CPU, TRIAL, Silent, make_trial

from dit_accel.bench import attention, models, step, versus
from dit_accel.bench.cases import BACKWARD, CASES, SCALING, select, small, smoke
from dit_accel.bench.command import bench
from dit_accel.bench.flex import check_rows, reference_mask_mod
from dit_accel.bench.options import COMMANDS
from dit_accel.bench.request import dense_attention
from dit_accel.bench.results import read_results
from dit_accel.bench.tables import table
from dit_accel.bench.timing import _short_name as short_name
from dit_accel.bench.timing import peak_memory, summarise, time_calls
from dit_accel.cli import app as cli
from dit_accel.common.errors import BadInput
from dit_accel.common.signals import Stopped
from dit_accel.mechanisms.registry import PROCESSORS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    monkeypatch.delenv("DIT_ACCEL_BACKEND", raising=False)


def test_summary_has_median_and_quartiles():
    times = summarise([4.0, 1.0, 3.0, 2.0, 10.0], calls=7)
    assert (times.ms, times.q1, times.q3, times.least, times.samples, times.calls) == (3.0, 2.0, 4.0, 1.0, 5, 7)
    one = summarise([2.5])
    assert (one.ms, one.q1, one.q3, one.samples) == (2.5, 2.5, 2.5, 1)
    with pytest.raises(ValueError, match="no samples"):
        summarise([])


def test_number_of_calls_per_sample_follows_their_duration(monkeypatch):
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
    assert calls_of(2.0) == (5, 1)  # ten seconds
    assert calls_of(60.0) == (3, 1)


def test_kernel_names_are_readable():
    assert short_name("block_sparse_fwd_kernel") == "block_sparse_fwd_kernel"
    long = (
        "void at::native::(anonymous namespace)::copy_kernel<4, at::native::F<float>()::{lambda(int)#1}>(int, F<int>)"
    )
    assert short_name(long) == "copy_kernel"
    assert short_name("Memcpy DtoD (Device -> Device)") == "DtoD"


def test_cases_have_the_shapes_of_real_models():
    tokens = {name: case.layout.seq_len for name, case in CASES.items()}
    assert tokens["sla-wan1.3b-480p-all"] == 32760 and tokens["sla-wan14b-720p-marginal"] == 75600
    assert tokens["sla-hunyuan-720p-all"] == tokens["gna-hunyuan"] == 115200
    assert tokens["clear-flux-4096-r16"] == 66048 and tokens["gna-flux-256"] == 65536
    ideals = {r: 1 / CASES[f"clear-flux-4096-r{r}"].fraction for r in (8, 16, 32)}
    assert [round(ideals[r], 1) for r in (8, 16, 32)] == [54.7, 37.4, 17.1]
    assert CASES["gna-hunyuan"].fraction == pytest.approx(18 * 24 * 24 / 115200)
    assert CASES["sla-wan1.3b-480p-all"].fraction == pytest.approx(0.05, rel=0.03)


def test_cases_without_kernels_are_measured_only_if_named(monkeypatch):
    monkeypatch.setattr(PROCESSORS["llsa"], "backends", ("torch",))
    assert {case.mechanism for case in select([])} == {"sla", "clear", "gna"}
    assert len(select([], SCALING)) == len(SCALING)  # no case is a default one: all
    monkeypatch.setattr(PROCESSORS["llsa"], "backends", ("torch", "triton"))
    assert {case.mechanism for case in select([])} == {"sla", "clear", "gna", "llsa"}
    assert [case.goal for case in select(["llsa-256", "llsa-256-wide"])] == [30.0, 30.0]


def test_backward_cases_have_their_goals_and_small_versions():
    goals = {name: case.goal for name, case in BACKWARD.items()}
    assert goals == {
        "sla-wan1.3b-480p-10-all": 5.0, "sla-wan1.3b-480p-10-marginal": 5.0, "clear-flux-4096-r16": 10.0,
        "gna-hunyuan": 6.0, "llsa-256": 20.0, "llsa-256-wide": None,
    }  # fmt: skip
    assert BACKWARD["sla-wan1.3b-480p-10-all"].fraction == pytest.approx(0.10, rel=0.03)
    assert all(case.options == small(case).options for case in BACKWARD.values())
    assert all(small(case).layout.seq_len < 2**15 and 0 < small(case).fraction < 1 for case in BACKWARD.values())


def test_scaling_sizes_go_from_4k_to_1m_tokens():
    sizes = [case.layout.seq_len for case in SCALING.values()]
    assert sizes == sorted(sizes) and (sizes[0], sizes[-1]) == (2**12, 2**20) and len(sizes) == 9
    assert all((case.heads, case.head_dim, case.options["topk"]) == (8, 64, 8) for case in SCALING.values())
    assert len({smoke(case).layout.seq_len for case in SCALING.values()}) == 9


def test_cases_are_selected_by_name_or_prefix():
    assert [case.name for case in select(["sla-wan1.3b-480p"])] == ["sla-wan1.3b-480p-all", "sla-wan1.3b-480p-marginal"]
    assert [case.name for case in select(["llsa-256"])] == ["llsa-256"]
    with pytest.raises(ValueError, match="did you mean 'gna-hunyuan'"):
        select(["gna-hunyan"])
    with pytest.raises(ValueError, match=r"did you mean 'wan1\.3b-480p'"):
        models.select(("wan1.3b-48p",))


@pytest.mark.parametrize("name", ["clear-flux-4096-r8", "gna-hunyuan", "gna-flux-256"])
def test_reference_mask_matches_the_mechanism(name):
    """All rows agree, the mask has the case's logit fraction, and a wrong output is rejected."""
    case = smoke(CASES[name])
    tensors = case.inputs(CPU, torch.float32, "heads-first", 0)
    out = case.call(tensors, {}, "torch")
    length = case.layout.seq_len
    assert check_rows(case, tensors, out, rows=length)["rows"] == length
    rows = torch.arange(length)
    unmasked = int(reference_mask_mod(case)(0, 0, rows[:, None], rows[None]).sum())
    assert unmasked / length**2 == pytest.approx(case.fraction) and unmasked < length**2
    wrong = torch.nn.functional.scaled_dot_product_attention(*tensors)
    with pytest.raises(ArithmeticError, match=r"largest error .*, tolerance .*; not timed"):
        check_rows(case, tensors, wrong)
    with pytest.raises(ArithmeticError, match="NaN"):
        check_rows(case, tensors, torch.full_like(out, torch.nan))


def test_inputs_have_the_requested_memory_layout():
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
    monkeypatch.chdir(tmp_path)  # writes its default file
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


@pytest.mark.parametrize(
    "factor, message",
    [(1.1, "the gradient of query has a relative error of 0.1"), (torch.nan, "relative error of nan")],
)
def test_wrong_gradients_are_not_timed(factor, message, tmp_path, monkeypatch):
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
        with pytest.raises(ArithmeticError, match="the gradient of query contains NaN"):
            versus.PASSES["backward"](case, "another", request, Silent(), False)


def test_bfloat16_gradients_are_far_within_the_tolerance(tmp_path):
    """bfloat16 against float32 in plain torch, at the sizes of the check."""
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
    assert table(content).count("time grows as") == 2


def test_other_cases_run_if_one_fails(tmp_path, monkeypatch, capsys):
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


def test_row_of_an_unavailable_backend_has_the_error(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "a.json"
    chosen = ["--case", "gna-flux-256", "--backend", "triton", "--backend", "torch"]
    assert bench(["attention", *TRIAL, *chosen, "--out", str(out)], "b") == 1
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
def test_interrupted_run_keeps_finished_rows(what, tmp_path, monkeypatch, capsys):
    module, words = INTERRUPTED[what]
    measure, calls = module._measure, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            assert json.loads(out.read_text())["status"] == "running" and len(read_results(out)["rows"]) == 1
            raise Stopped(signal.SIGTERM)
        return measure(*arguments)

    monkeypatch.setattr(module, "_measure", stopping)
    out = tmp_path / f"{what}.json"
    assert bench([*words, *TRIAL, "--out", str(out)], "b") == 143
    content = read_results(out)
    assert content["kind"] == what and content["status"] == "interrupted" and len(content["rows"]) == 1
    assert "The run did not finish: interrupted" in table(content)
    assert f"stopped by SIGTERM; finished rows are in {out}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out]


def test_keep_copies_rows_of_an_earlier_run(tmp_path):
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
        (["attention", "--device", "cuda:77"], "device cuda:77 is not available"),
        (["attention", *TRIAL, "--case", "sla-wan"], "unknown case 'sla-wan'; did you mean 'sla-wan1"),
        (["attention", *TRIAL, "--backend", "tritn"], "unknown --backend 'tritn'; did you mean 'triton'"),
        (["step", *TRIAL, "--model", "flux"], "Available: wan1.3b-480p"),
        (["step", *TRIAL, "--variant", "gna"], "has no variant 'gna'; available: dense-eager, dense, sla"),
        (["attention", *TRIAL, "--repeats", "0"], "--repeats: expected an integer of at least 1, got 0"),
        (["attention", *TRIAL, "--out", "/proc/none/a.json"], "cannot write into /proc/none"),
        (["attention", *TRIAL, "--backward", "--flex"], "leave out --flex or --backward"),
        (["attention", *TRIAL, "--backward", "--case", "gna-flux-256"], "Available: sla-wan1.3b-480p-10-all"),
        (["scaling", *TRIAL, "--case", "llsa-256"], "unknown case 'llsa-256'; did you mean 'llsa-256x256'"),
        (["train", "--device", "cpu"], "bench needs a CUDA GPU; found cpu"),
        (["train", *TRIAL, "--model", "flux-1024"], "Available: wan1.3b-480p-quarter, wan1.3b-480p-half"),
        (["train", *TRIAL, "--variant", "gna"], "has no variant 'gna'; available: dense-eager, dense, sla, sla-eager"),
        (["nothing"], "'nothing'"),
        ([], "Missing command"),
        (["attention", *TRIAL, "--order", "head-first"], "did you mean 'heads-first'"),
        (["report", "--folder", "/nowhere"], "no results in /nowhere"),
    ],
)
def test_bad_input_is_reported_in_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_bench_help_lists_its_options(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "attention", "--help"])
    assert stop.value.code == 0 and "--case NAME" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        bench(["attention", "--help"], "b")
    assert stop.value.code == 0 and "--case NAME" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["step", *TRIAL],
        ["train", *TRIAL, "--model", "a", "--model", "b", "--checkpointing"],
        ["attention", "--backend", "torch", "--order", "heads-first", "--out", "a.json"],
        ["report", "--folder", "a", "--page", "b.md"],
    ],
)
def test_both_parsers_give_the_same_command(words, monkeypatch):
    seen = []
    for kind in COMMANDS.values():
        monkeypatch.setattr(kind, "run", lambda self, command: seen.append((self, command)) or 0)
    bench(words, "dit-accel bench")
    with pytest.raises(SystemExit):
        cli.main(["bench", *words])
    assert len(seen) == 2 and seen[0] == seen[1] and seen[0][1] == ("dit-accel bench", *words)


def test_bench_runs_without_typer_rich_and_matplotlib(tmp_path):
    """Runs on a machine with only torch and diffusers."""
    hidden = "import sys; sys.modules.update(dict.fromkeys(('typer', 'rich', 'matplotlib', 'torchmetrics')));"
    source = f"{hidden} import runpy; runpy.run_module('dit_accel.bench', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", source, "attention", *TRIAL, "--case", "gna-flux-256", "--out", "a.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "[1/1] gna-flux-256" in done.stdout and read_results(tmp_path / "a.json")["status"] == "complete"


def test_dense_attention_on_the_cpu_is_torch_sdpa():
    with dense_attention(CPU) as name:
        assert name == "torch SDPA (cpu)"
    assert peak_memory(lambda: torch.ones(3), CPU) is None
