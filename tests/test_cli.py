"""Command-line arguments: accepted formats, and errors before a pipeline is loaded or a picture is drawn."""

from __future__ import annotations

import math
import re

import pytest
from tiny_pipelines import save_flux, save_wan

from dit_accel import CLEARAttnProcessor, GNAAttnProcessor, LLSAAttnProcessor, SLAAttnProcessor
from dit_accel.cli.app import main
from dit_accel.layout import TokenLayout
from dit_accel.mechanisms.attn_spec import parse_attention, parse_student, short_options
from dit_accel.mechanisms.registry import PROCESSORS
from dit_accel.weights.tensors import find_weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {"flux": str(save_flux(folder / "flux")), "wan": str(save_wan(folder / "wan"))}


@pytest.mark.parametrize(
    ("text", "processor"),
    [
        ("sla", SLAAttnProcessor()),
        ("SLA:", SLAAttnProcessor()),
        ("sla:smooth_key=true,linear_over=all", SLAAttnProcessor(smooth_key=True, linear_over="all")),
        ("gna:window=16x8,stride=8", GNAAttnProcessor(window=(16, 8), stride=8)),
        ("gna: window=2x8, is_causal=truexfalse", GNAAttnProcessor(window=(2, 8), is_causal=(True, False))),
        ("gna:window=7,dilation=2,dense_steps=3", GNAAttnProcessor(window=7, dilation=2, dense_steps=3)),
        ("clear:radius=8", CLEARAttnProcessor(radius=8.0)),
        ("clear:radius=4x8.5x8.5,scale=none", CLEARAttnProcessor(radius=(4.0, 8.5, 8.5))),
        ("clear:radius=inf,train_tokens=4608", CLEARAttnProcessor(radius=math.inf, train_tokens=4608)),
        ("llsa:levels=none,topk=4,enrich=False", LLSAAttnProcessor(topk=4, enrich=False)),
        ("llsa:levels=2", LLSAAttnProcessor(levels=2)),
    ],
)  # fmt: skip
def test_attention_text_is_parsed_to_a_processor(text, processor):
    assert parse_attention(text).processor() == processor


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slaa", r"unknown attention 'slaa'; did you mean 'sla'\?"),
        ("xyz", r"unknown attention 'xyz'\. Available: sla, clear, llsa, gna"),
        ("gna:windw=3", r"gna has no option 'windw'; did you mean 'window'\?"),
        ("clear:Radius=3", r"clear has no option 'Radius'; did you mean 'radius'\?"),
        ("sla:topk=3", "sla has no option 'topk'"),
        ("gna:window", "option window has no value"),
        ("gna:window=3,window=5", "option window is given twice"),
        ("gna:window=wide", "window takes an integer or one per axis such as 16x16, got 'wide'"),
        ("gna:window=3.5", "window takes an integer or one per axis"),
        ("gna:window=16x", "window takes an integer or one per axis"),
        ("sla:smooth_key=yes", "smooth_key takes true or false, got 'yes'"),
        ("sla:critical=1.5", "critical must be in"),
        ("clear:radius=nan", "radius must be"),
        ("clear:radius=0", "radius must be"),
        ("gna:window=4,stride=8", "stride 8 is larger than window 4"),
        ("llsa:topk=0", "topk"),
        ("llsa:block_size=1", "block_size"),
        ("gna:window=4;window=8", "expected options and layers, got 'window=8'; write key=VALUE@LAYERS"),
        ("gna:window=4;@blocks", "expected options and layers, got '@blocks'"),
        ("gna:window=4;windw=8@blocks", "gna has no option 'windw'"),
        ("gna:window=4;stride=8@blocks", "stride 8 is larger than window 4"),
        ("gna:window=4;window=8@(blocks", "is not a regular expression"),
        ("gna:window=4;window=8@blocks{99999999999}", "is not a regular expression.*too large"),
        ("gna:window=4;window=8@" + "(" * 5000 + ")" * 5000, "is not a regular expression"),
    ],
)
def test_invalid_attention_text_is_rejected_with_a_hint(text, message):
    with pytest.raises(ValueError, match=message):
        parse_attention(text)


def test_names_too_long_for_a_file_are_rejected():
    with pytest.raises(ValueError, match="unknown attention 'aaa"):
        parse_student("a" * 5000)
    with pytest.raises(FileNotFoundError, match="no attention file at aaa"):
        find_weights("a" * 5000)


def test_options_per_layer_are_parsed():
    spec = parse_attention(r"gna:window=4x4,stride=2; window=8x8@blocks\.1\. ;stride=1@single")
    default = GNAAttnProcessor(window=(4, 4), stride=2)
    wide, dense_stride = GNAAttnProcessor(window=(8, 8), stride=2), GNAAttnProcessor(window=(4, 4), stride=1)
    assert spec.by_layer(spec.processor()) == ((None, default), (r"blocks\.1\.", wide), ("single", dense_stride))


@pytest.mark.parametrize("name", ["clear", "gna"])
@pytest.mark.parametrize("grid", [(64, 64), (32, 96), (9, 20, 20), (21, 30, 52)])
def test_default_windows_compute_about_a_tenth_of_the_logits(name, grid):
    processor = parse_attention(name).processor(grid)
    layout = TokenLayout(grid)
    assert 0.05 < processor.layer_logits(layout) / layout.seq_len**2 < 0.13


def test_missing_option_on_an_unknown_grid_is_an_error():
    with pytest.raises(ValueError, match="clear needs radius for this pipeline"):
        parse_attention("clear").processor()


def test_gna_defaults_match_the_paper_on_its_grid():
    window = PROCESSORS["gna"].suggest((256, 256))
    assert window == {"window": (81, 81), "stride": (16, 16)}  # 80 and 16 in the paper


@pytest.mark.parametrize(
    "text", ["gna:window=16x8,stride=4x4", "sla:critical=0.1,negligible=0.2", "llsa:block_size=4,topk=2"]
)
def test_short_options_round_trip(text):
    assert short_options(parse_attention(text).processor()) == text.partition(":")[2]


def test_all_mechanisms_have_a_short_form():
    for name in PROCESSORS:
        assert short_options(parse_attention(name).processor((64, 64)))


def rejection(capsys, *arguments):
    """Run the command with invalid arguments. Returns: its one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("dit-accel: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attn", "glear"], "did you mean 'clear'"),
        (["--attn", "sla", "--attn", "gna:windows=3"], "did you mean 'window'"),
        (["--steps", "0"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--height", "-8"], "--height"),
        (["--seed", "-1"], "--seed"),
        (["--promt", "a"], "--promt"),
        (["--prompt", " "], "--prompt is empty"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--device", "cuda:99"], "cuda:99 is not available"),
        (["--device", "meta"], "meta is not supported"),
        (["--dtype", "int8"], "unknown dtype 'int8'; give float32, float16, bfloat16"),
        (["--video", "--pipeline", "some/where"], "not both"),
        (["--pipeline", "./nowhere"], "there is no folder ./nowhere"),
    ],
)
def test_bad_arguments_are_rejected_in_one_line(capsys, tmp_path, arguments, message):
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert message in rejection(capsys, "compare", *arguments, *out)
    assert not list(tmp_path.glob("out/*"))


def test_unknown_command_is_rejected(capsys):
    assert "'compair'" in rejection(capsys, "compair")


def test_unwritable_output_folder_is_rejected(capsys, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        assert f"cannot write into {out}" in rejection(capsys, "compare", "--out", str(out))


def test_folder_without_a_pipeline_is_rejected(capsys, tmp_path):
    line = rejection(capsys, "compare", "--pipeline", str(tmp_path), "--out", str(tmp_path / "out"))
    assert f"cannot load a diffusers pipeline from {tmp_path}" in line


@pytest.mark.parametrize(
    ("pipeline", "arguments", "message"),
    [
        ("flux", ["--height", "30", "--width", "32"], "got 30×32; nearest: 28×32 or 32×32"),
        ("flux", ["--height", "2", "--width", "32"], "nearest: 4×32"),
        ("flux", ["--frames", "5"], "FluxPipeline draws pictures"),
        ("wan", ["--height", "40", "--width", "50"], "got 40×50; nearest: 32×48 or 48×64"),
        ("wan", ["--height", "32", "--width", "32", "--frames", "6"], "got 6; nearest: 5 or 9"),
        ("flux", ["--attn", "gna:window=3x3x3"], "axes"),
    ],
)
def test_unsupported_sizes_are_rejected_before_drawing(capsys, tmp_path, folders, pipeline, arguments, message):
    out = tmp_path / "out"
    line = rejection(capsys, "compare", "--pipeline", folders[pipeline], "--out", str(out), *arguments)
    assert message in line
    assert not list(out.iterdir())


def test_version_and_help_exit_with_status_0(capsys):
    for arguments in (["--version"], ["--help"], ["compare", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert "dit-accel" in capsys.readouterr().out


def test_options_per_layer_from_a_yaml_file(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(
        "attention: clear\noptions: {radius: [3.5, .inf], train_tokens: null}\n"
        "layers:\n  'blocks\\.1\\.': {radius: 8, down_factor: 2}\n  single: {radius: 2x4.5}\n"
    )
    text = r"clear:radius=3.5xinf,train_tokens=none;radius=8,down_factor=2@blocks\.1\.;radius=2x4.5@single"
    assert parse_attention(str(file)) == parse_student(str(file)) == parse_attention(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ("attention: [", "is not a YAML file"),
        ("- gna", "expected a mapping with the key attention"),
        ("attention: gnaa", "did you mean 'gna'"),
        ("attention: gna\noption: {window: 3}", "unknown key 'option'; did you mean 'options'"),
        ("attention: gna\noptions: {windw: 3}", "no option 'windw'; did you mean 'window'"),
        ("attention: gna\noptions: {window: wide}", "window takes an integer"),
        ("attention: gna\noptions: {window: 3, stride: 4}", "stride 4 is larger than window 3"),
        ("attention: gna\noptions: [3]", "options must be a mapping"),
        ("attention: gna\noptions: {window: 3}\nlayers: [a]", "layers must map"),
        ("attention: gna\noptions: {window: 3}\nlayers: {'(': {window: 5}}", "not a regular expression"),
    ],
)
def test_bad_yaml_file_is_refused_with_a_reason(tmp_path, content, message):
    file = tmp_path / "options.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_attention(str(file))
