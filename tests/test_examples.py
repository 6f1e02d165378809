"""The scripts in examples/ run at small sizes on the embedded pipelines, and are short."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SMALL = ("--size", "64", "--steps", "3")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Function that runs an example with arguments in an empty folder and returns its output."""
    monkeypatch.chdir(tmp_path)

    def run_example(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_examples_are_short():
    assert len(EXAMPLES) == 5
    assert all(len(path.read_text().splitlines()) <= 40 for path in EXAMPLES)


def test_generate_draws_with_a_mechanism(run, tmp_path):
    out = run("generate", *SMALL, "--out", "small.png")
    assert Image.open(tmp_path / "small.png").size == (64, 64)
    assert "sla(critical=0.3" in out and "of the logits; the picture is small.png" in out


def test_choose_layers_leaves_double_blocks_dense(run):
    out = run("choose_layers", *SMALL)
    assert "window=40" in out and "window=16" in out and "first 2 steps dense" in out
    assert "transformer: 2 self-attention layers" in out and "transformer: all layers" in out


def test_save_and_load_restores_the_weights(run, tmp_path):
    out = run("save_and_load", "--out", "attention")
    assert (tmp_path / "attention/dit_accel.safetensors").is_file()
    assert "learned tensors loaded" in out and "restored bit for bit: True" in out


def test_fine_tune_learns_from_a_folder(run, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i, colour in enumerate(("red", "green")):
        Image.new("RGB", (64, 64), colour).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"a {colour} square")
    out = run("fine_tune", "data", "--size", "64", "--steps", "1", "--out", "tuned")
    assert (tmp_path / "tuned/convert.json").is_file() and "gna(window=(20, 20), stride=(4, 4))" in out


def test_compare_shows_every_mechanism(run):
    lines = [line for line in run("compare", *SMALL[:3], "1").splitlines() if "of the logits, PSNR" in line]
    assert [line.split("(")[0] for line in lines] == ["sla", "llsa", "clear", "gna"]
