"""What the command line takes and refuses, before a pipeline is loaded and before anything is drawn."""

from __future__ import annotations

import math

import pytest
from tiny_pipelines import save_flux, save_wan

from dit_accel import CLEARAttnProcessor, GNAAttnProcessor, LLSAAttnProcessor, SLAAttnProcessor
from dit_accel.attn_spec import grid_defaults, parse_attention, parse_student, short_options
from dit_accel.cli import main
from dit_accel.layout import TokenLayout
from dit_accel.processor import PROCESSORS
from dit_accel.weights import find_weights


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
def test_attention_is_read_as_the_processor_that_it_names(text, processor):
    assert parse_attention(text).processor() == processor


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slaa", r"unknown attention 'slaa'; did you mean 'sla'\?"),
        ("xyz", "unknown attention 'xyz'; There are: sla, clear, llsa, gna"),
        ("gna:windw=3", r"gna has no option 'windw'; did you mean 'window'\?"),
        ("clear:Radius=3", r"clear has no option 'Radius'; did you mean 'radius'\?"),
        ("sla:topk=3", "sla has no option 'topk'"),
        ("gna:window", "option window has no value"),
        ("gna:window=3,window=5", "option window is given twice"),
        ("gna:window=wide", "window takes a whole number or one per axis such as 16x16, got 'wide'"),
        ("gna:window=3.5", "window takes a whole number or one per axis"),
        ("gna:window=16x", "window takes a whole number or one per axis"),
        ("sla:smooth_key=yes", "smooth_key takes true or false, got 'yes'"),
        ("sla:critical=1.5", "critical must be in"),
        ("clear:radius=nan", "radius must be"),
        ("clear:radius=0", "radius must be"),
        ("gna:window=4,stride=8", "stride 8 is larger than window 4"),
        ("llsa:topk=0", "topk"),
        ("llsa:block_size=1", "block_size"),
        ("gna:window=4;window=8", "does not say which options on which layers; write key=VALUE@LAYERS"),
        ("gna:window=4;@blocks", "does not say which options on which layers"),
        ("gna:window=4;windw=8@blocks", "gna has no option 'windw'"),
        ("gna:window=4;stride=8@blocks", "stride 8 is larger than window 4"),
        ("gna:window=4;window=8@(blocks", "is no regular expression"),
        ("gna:window=4;window=8@blocks{99999999999}", "is no regular expression.*too large"),
        ("gna:window=4;window=8@" + "(" * 5000 + ")" * 5000, "is no regular expression"),
    ],
)
def test_attention_that_cannot_be_is_refused_with_what_would_be_right(text, message):
    with pytest.raises(ValueError, match=message):
        parse_attention(text)


def test_names_too_long_for_a_file_are_refused():
    with pytest.raises(ValueError, match="unknown attention 'aaa"):
        parse_student("a" * 5000)
    with pytest.raises(FileNotFoundError, match="no attention file at aaa"):
        find_weights("a" * 5000)


def test_options_that_differ_by_layer_are_read():
    spec = parse_attention(r"gna:window=4x4,stride=2; window=8x8@blocks\.1\. ;stride=1@single")
    usual = GNAAttnProcessor(window=(4, 4), stride=2)
    wide, even = GNAAttnProcessor(window=(8, 8), stride=2), GNAAttnProcessor(window=(4, 4), stride=1)
    assert spec.by_layer(spec.processor()) == ((None, usual), (r"blocks\.1\.", wide), ("single", even))


@pytest.mark.parametrize("name", ["clear", "gna"])
@pytest.mark.parametrize("grid", [(64, 64), (32, 96), (9, 20, 20), (21, 30, 52)])
def test_bare_windows_compute_about_a_tenth_of_the_logits(name, grid):
    processor = parse_attention(name).processor(grid)
    layout = TokenLayout(grid)
    options = processor.mechanism.fit(layout, **processor.layer_options(layout))
    assert 0.05 < processor.mechanism.count_logits(layout, **options) / layout.seq_len**2 < 0.13


def test_bare_window_on_an_unknown_grid_asks_for_the_option():
    with pytest.raises(ValueError, match="clear needs radius for this pipeline"):
        parse_attention("clear").processor()


def test_defaults_on_the_papers_grid_are_the_papers():
    window = grid_defaults("gna", (256, 256))
    assert window == {"window": (81, 81), "stride": (16, 16)}  # 80 and 16 in the paper


@pytest.mark.parametrize(
    "text", ["gna:window=16x8,stride=4x4", "sla:critical=0.1,negligible=0.2", "llsa:block_size=4,topk=2"]
)
def test_short_options_can_be_given_back(text):
    assert short_options(parse_attention(text).processor()) == text.partition(":")[2]


def test_all_mechanisms_have_a_short_form():
    for name in PROCESSORS:
        assert short_options(parse_attention(name).processor((64, 64)))


def refused(capsys, *arguments):
    """The one line on stderr with which the command refuses these arguments."""
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
        (["--device", "cuda:99"], "cuda:99 is not there"),
        (["--device", "meta"], "meta cannot draw"),
        (["--dtype", "int8"], "unknown dtype 'int8'; give float32, float16, bfloat16"),
        (["--video", "--pipeline", "some/where"], "not both"),
        (["--pipeline", "./nowhere"], "there is no folder ./nowhere"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(capsys, tmp_path, arguments, message):
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert message in refused(capsys, "compare", *arguments, *out)
    assert not list(tmp_path.glob("out/*"))


def test_unknown_command_is_refused(capsys):
    assert "'compair'" in refused(capsys, "compair")


def test_out_folder_that_cannot_be_made_or_written_is_refused(capsys, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        assert f"cannot write into {out}" in refused(capsys, "compare", "--out", str(out))


def test_folder_without_a_pipeline_is_refused(capsys, tmp_path):
    line = refused(capsys, "compare", "--pipeline", str(tmp_path), "--out", str(tmp_path / "out"))
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
def test_what_the_pipeline_cannot_draw_is_refused_before_it_draws(
    capsys, tmp_path, folders, pipeline, arguments, message
):
    out = tmp_path / "out"
    line = refused(capsys, "compare", "--pipeline", folders[pipeline], "--out", str(out), *arguments)
    assert message in line
    assert not list(out.iterdir())


def test_version_and_help_end_well(capsys):
    for arguments in (["--version"], ["--help"], ["compare", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert "dit-accel" in capsys.readouterr().out
