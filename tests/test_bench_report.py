"""Growth exponents, tables, plots and documentation pages from benchmark results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from dit_accel.bench import scaling, train
from dit_accel.bench.command import PAGES, bench
from dit_accel.bench.report import fill
from dit_accel.bench.results import KEYS, Results, read_results
from dit_accel.bench.tables import table
from dit_accel.bench.timing import fit_growth
from dit_accel.common.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]


def attention_row(**changes):
    row = {
        "case": "gna-hunyuan", "backend": "triton", "work": "GNA, Hunyuan", "heads": 24, "tokens": 115200,
        "head_dim": 128, "fraction": 0.09, "goal": 9.7, "dense": {"ms": 275.0},
        "ours": {"ms": 25.0, "by_kernel": {"first": 20.0, "second": 4.5}},
        "times_dense": 11.0, "efficiency": 0.99, "reached": True, "status": "complete",
    }  # fmt: skip
    return {**row, **changes}


def scaling_row(tokens, which="forward", ms=1.0, dense=1.0):
    row = attention_row(case=f"llsa-{tokens}", work="LLSA", tokens=tokens, goal=None, ours={"ms": ms, "peak_bytes": 0})
    return {**row, "pass": which, "dense": None if dense is None else {"ms": dense}}


def test_dense_is_skipped_if_expected_to_take_over_a_second():
    quick = scaling._dense_fits_budget
    next_one = scaling_row(2000)
    assert quick([], next_one) and quick([scaling_row(4000, dense=9e9)], next_one)
    assert quick([scaling_row(1000, dense=250.0)], next_one) and not quick([scaling_row(1000, dense=251.0)], next_one)
    assert not quick([scaling_row(1000, dense=None)], next_one)
    assert quick([scaling_row(1000, "backward", dense=9e9)], next_one)


def test_growth_exponents_are_fitted():
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
        "ours": {"ms": 5.0, "both_ms": 7.0, "peak_bytes": 2**29, "by_kernel": {"only": 4.5}},
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
    {"teacher": "image, 3.0 M", "mechanism": "gna", "training": "flow, even levels",
     "attention": "gna:window=18x18", "steps": 400, "bytes": 2**19,
     "before": quality_side(1.5, 0.1), "after": quality_side(1.012, 0.94), "status": "complete"},
])  # fmt: skip
EVERYTHING = (QUALITY, ATTENTION, BACKWARD_RESULTS, SCALING_RESULTS, STEP, TRAIN)


def test_tables_of_training_and_scaling():
    backward = table(BACKWARD_RESULTS).splitlines()
    assert backward[2].startswith(
        "| SLA 10 % (24, 115,200, 128) | 31.6 ms | 5 ms | 6.32× | 4.5 ms | ≥ 5× ✓ | 43 ms | 7 ms | 6.14× |"
    )
    assert backward[2].endswith("| 1.00 GiB | 0.50 GiB |") and "failed: ValueError: no" in backward[3]
    sizes = table(SCALING_RESULTS)
    assert "| LLSA (24, 16,384, 128) | backward | – | 16.4 s |" in sizes
    assert "Forward pass, triton, 4,096 to 16,384 tokens: time grows as tokens^1.00, goal ≤ 1.15 ✓." in sizes
    steps = table(TRAIN)
    assert "| 4 blocks (32,760) | dense, compiled | 100 ms | – | 10.0% | 1.00 GiB |\n" in steps
    assert "sla, eager, 1 to 4 tokens: peak memory grows as tokens^1.00." in steps
    for lines in (backward[:4], sizes.split("\n\n")[0].splitlines(), steps.split("\n\n")[0].splitlines()):
        assert len({line.count("|") for line in lines}) == 1


def test_table_of_conversion_quality():
    line = table(QUALITY).splitlines()[2]
    assert line == (
        "| image, 3.0 M | gna | flow, even levels | 9.7% | 400 | +50.0 % | +1.2 % | 95.0 % | 10.0 % of 1,000 "
        "| 94.0 % of 1,000 | 0.50 MiB |"
    )


def test_tables_of_attention_and_steps():
    shown = table(ATTENTION).splitlines()
    assert shown[2] == (
        "| GNA, Hunyuan (24, 115,200, 128) | 275 ms | 25 ms | – | 11.00× | 24.5 ms | 9.0% | 99% | ≥ 9.7× ✓ |"
    )
    assert "| 12.8 ms |" in shown[3] and shown[3].endswith("| 1.8% | 99% | ≥ 25× ✗ |")
    assert "failed: RuntimeError: a / b" in shown[4]
    assert len({line.count("|") for line in shown[:5]}) == 1
    graphed = {"dense": {"ms": 275.0, "graph_ms": 270.0}, "ours": {"ms": 25.0, "graph_ms": 20.0}}
    both = table(hand_made("attention", [attention_row(**graphed), attention_row()])).splitlines()
    assert "| 11.00× | 13.50× | – | 9.0% |" in both[2] and "| 11.00× | – | 24.5 ms | 9.0% |" in both[3]
    assert "NVIDIA H200, driver 570.1, bfloat16, torch 2.11.0, triton 3.6.0" in shown[-1]
    assert "`dit-accel bench attention`" in shown[-1] and "2026-01-02" in shown[-1]
    steps = table(STEP).splitlines()
    assert steps[2] == "| Flux 8192² | dense, eager | 89.4 s | – | – | 3.00 GiB | – |"
    assert steps[3] == "| Flux 8192² | clear-r16 | 8 s | 11.18× | 1.0% | 2.00 GiB | ≥ 10× ✓ |"


def test_report_fills_the_pages_and_draws(tmp_path, capsys):
    for content in EVERYTHING:
        (tmp_path / f"{content['kind']}.json").write_text(json.dumps(content))
    speed, quality = tmp_path / "speed.md", tmp_path / "quality.md"
    speed.write_text("Before\n<!-- bench:attention -->\nold\n<!-- /bench:attention -->\nafter\n")
    quality.write_text("<!-- bench:quality --><!-- /bench:quality -->")
    arguments = ["report", "--folder", str(tmp_path), "--page", str(speed), "--page", str(quality)]
    for _ in range(2):  # filling is idempotent
        assert bench(arguments, "b") == 0
        filled = f"Before\n<!-- bench:attention -->\n{table(ATTENTION)}\n<!-- /bench:attention -->\nafter\n"
        assert speed.read_text() == filled
        assert quality.read_text() == f"<!-- bench:quality -->\n{table(QUALITY)}\n<!-- /bench:quality -->"
    printed = capsys.readouterr().out
    assert "no page has <!-- bench:step -->" in printed and table(STEP) in printed
    for kind in KEYS:
        with Image.open(tmp_path / f"{kind}.png") as picture:
            assert picture.width > 800 and len(picture.convert("RGB").getcolors(1 << 20)) > 10
    quality.write_text(speed.read_text())
    with pytest.raises(BadInput, match=r"is in .*speed\.md and .*quality\.md: keep one"):
        bench(arguments, "b")
    speed.write_text(speed.read_text() * 2)
    with pytest.raises(BadInput, match="2 times"):
        bench(arguments, "b")
    (tmp_path / "step.json").write_text("{}")
    with pytest.raises(BadInput, match=r"step\.json was not written by dit-accel bench"):
        bench(arguments, "b")


def test_report_without_matplotlib_names_the_package(tmp_path, monkeypatch):
    (tmp_path / "step.json").write_text(json.dumps(STEP))
    (tmp_path / "page.md").write_text("")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BadInput, match=r"pip install 'dit-accel\[bench\]'"):
        bench(["report", "--folder", str(tmp_path), "--page", str(tmp_path / "page.md")], "b")


@pytest.mark.parametrize("kind", KEYS)
def test_documentation_has_the_tables_of_the_results(kind):
    results = ROOT / "benchmarks" / f"{kind}.json"
    if not results.is_file():
        pytest.skip(f"{results.name} does not exist: not measured yet")
    content = table(read_results(results))
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    filled = [fill(text, f"bench:{kind}", content) for text in pages]
    assert sum(text is not None for text in filled) == 1, f"no page has <!-- bench:{kind} -->"
    assert all(new in (None, text) for new, text in zip(filled, pages, strict=True)), "run: dit-accel bench report"


def test_results_are_written_atomically(tmp_path, monkeypatch):
    results = Results("attention", tmp_path / "a.json", {"machine": {}})
    results.add({"case": "one"})
    with pytest.raises(ValueError, match="JSON"):
        results.add({"case": "two", "ms": float("nan")})
    assert [row["case"] for row in read_results(tmp_path / "a.json")["rows"]] == ["one"]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]
