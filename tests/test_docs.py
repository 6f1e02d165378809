"""The documentation matches the code: snippets run, commands and options exist, tables and figures are up to date."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from documented import PAGES, ROOT, check_command, commands, fences, inline_code, known_options, tomllib
from PIL import Image
from tiny_pipelines import save_flux, save_wan

import dit_accel
from dit_accel.bench.tables import milliseconds
from dit_accel.cli.app import main
from dit_accel.common.bundled import IMAGE, VIDEO
from dit_accel.mechanisms.attn_spec import parse_attention
from dit_accel.mechanisms.registry import PROCESSORS

LANGUAGES = {"python", "bash", "yaml", "toml", "math", ""}
SMALL = {
    "compare": "--pipeline {flux} --height 32 --width 32 --steps 1 --device cpu --prompt red",
    "convert": "--pipeline {flux} --height 32 --width 32 --steps 1 --device cpu --samples 1 --batch 1 --report 0 "
    "--prompts {prompts}",
    "evaluate": "--pipeline {flux} --height 32 --width 32 --device cpu --samples 1 --pictures 0 --levels 2 "
    "--prompts {prompts}",
}  # appended to the commands of RUN: a tiny pipeline, few steps
RUN = "docs/quickstart.md"  # the page whose commands are run


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Tiny pipelines and prompts that replace those of the snippets."""
    folder = tmp_path_factory.mktemp("tiny")
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\n")
    return {"flux": save_flux(folder / "flux"), "wan": save_wan(folder / "wan"), "prompts": prompts}


def made_small(text: str, tiny: dict[str, Path]) -> str:
    for old, new in {
        '"black-forest-labs/FLUX.1-dev"': repr(str(tiny["flux"])),
        '"Wan-AI/Wan2.1-T2V-1.3B-Diffusers"': repr(str(tiny["wan"])),
        '.to("cuda")': "",
        "dtype=torch.bfloat16": "dtype=torch.float32",
        'data_free=True, samples=64, steps=200, lr_schedule="cosine"': "data_free=True, samples=1, batch=1, steps=1, "
        "report=0, height=64, width=64, device='cpu'",
        "data_free=True, samples=8": "data_free=True, samples=1, levels=1, pictures=0, height=64, width=64, "
        "device='cpu'",
        'seed=1, out="seed-1"': 'seed=1, out="seed-1", steps=1, height=64, width=64, prompt="red", device="cpu"',
        '"a lighthouse at dusk"': '"a red circle", num_inference_steps=2',
        "height=2048, width=2048": "height=32, width=32",
        "**read_defaults(str(IMAGE.folder))": '**{**read_defaults(str(IMAGE.folder)), "height": 64, "width": 64, '
        '"num_inference_steps": 1}',
    }.items():
        text = text.replace(old, new)
    return text


@pytest.fixture
def same_mechanisms_after():
    """A page registers a mechanism, and other tests list all."""
    before = dict(dit_accel.PROCESSORS)
    yield
    dit_accel.PROCESSORS.clear()
    dit_accel.PROCESSORS.update(before)


@pytest.mark.usefixtures("same_mechanisms_after")
@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_snippets_run_and_commands_exist(page, tiny, tmp_path, monkeypatch):
    """Blocks of a page run in order, in one namespace. Blocks that need the hub or a GPU are only parsed."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("snippet")
    monkeypatch.setitem(sys.modules, "snippet", module)  # where dataclasses look for their module
    for fence in fences(page):
        assert fence.language in LANGUAGES, f"{fence}: no test for {fence.language}"
        if fence.language == "python":
            tree = ast.parse(fence.text, filename=str(fence))
            missing = {name for name in names_of_the_library(tree) if not hasattr(dit_accel, name)}
            assert not missing, f"{fence}: dit_accel has no {missing}"
            if fence.needs is None:
                exec(compile(made_small(fence.text, tiny), str(fence), "exec", dont_inherit=True), vars(module))
        elif fence.language == "bash":
            for words in commands(fence.text):
                if words[0] not in ("git", "cd") or fence.needs is None:
                    check_command(words)
                if ids(page) == RUN and words[0] == "dit-accel":
                    more = SMALL[words[1]].format(**tiny).split()
                    with pytest.raises(SystemExit) as end:
                        main([*words[1:], *more])
                    assert end.value.code == 0, f"{fence}: {words}"
        elif fence.language == "toml":
            tomllib.loads(fence.text)
        elif fence.language == "yaml":
            if "attention:" in fence.text:
                (tmp_path / "options.yaml").write_text(fence.text)
                parse_attention("options.yaml")
            else:
                check_accelerate(fence.text, tmp_path)


def names_of_the_library(tree: ast.AST) -> set[str]:
    """Attributes of ``dit_accel`` in the code, and names imported from it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dit_accel":
            found.add(node.attr)
        if isinstance(node, ast.ImportFrom) and node.module == "dit_accel":
            found |= {alias.name for alias in node.names}
    return found


def check_accelerate(text: str, folder: Path) -> None:
    """Load a configuration of accelerate, which rejects unknown keys."""
    from accelerate.commands.config.config_args import load_config_from_file

    file = folder / "accelerate.yaml"
    file.write_text("compute_environment: LOCAL_MACHINE\nuse_cpu: false\n" + text)
    load_config_from_file(str(file))


@pytest.mark.parametrize(
    "command",
    [
        "dit-accel convert --attn sla --out x --stepps 3",
        "dit-accel convert --out x",
        "dit-accel compare --attn gna:windw=3",
        "dit-accel paint",
        "dit-accel bench step --modell x",
        "accelerate launch -m dit_accel.cli convert --attn sla --out x --stepps 3",
        "accelerate launch --fsdp_versions 2 -m dit_accel.cli convert --attn sla --out x",
        "python -m dit_accel.demo.no_such_script",
        "python -m dit_accel.demo.scenes.write_scenes image --out x",
        "python examples/generate.py --no-such-option",
        "python examples/no_such_example.py",
        "make tea",
        "pip install .[everything]",
        "pip install no-such-package",
        "rm -rf x",
    ],
)
def test_unknown_commands_are_detected(command, capsys):
    with pytest.raises(ValueError):
        check_command(command.split())


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_options_in_the_text_exist(page):
    known = known_options()
    named = {option for code in inline_code(page) for option in re.findall(r"(?<!\S)--[a-z][\w-]*", code)}
    assert named <= known, named - known


def test_unknown_options_are_detected():
    assert "--attn" in known_options() and "--stepps" not in known_options()


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=ids)
def test_links_of_front_pages_exist(page):
    """Links in docs/ are checked by mkdocs build --strict."""
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def tool(name: str):
    """Import a script in docs/tools as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_tables_are_up_to_date():
    generate = tool("generate")
    pages = {page: page.read_text(encoding="utf-8") for page in PAGES}
    assert sum(text.count("<!-- generated:") for text in pages.values()) >= len(PROCESSORS) + 7
    stale = [ids(page) for page, text in pages.items() if generate.filled(text) != text]
    assert stale == [], "run: python docs/tools/generate.py"


def test_every_mechanism_has_a_page_with_its_mask_picture():
    for name, kind in PROCESSORS.items():
        text = (ROOT / f"docs/mechanisms/{name}.md").read_text(encoding="utf-8")
        assert f"../images/mask-{name}.png" in text and kind.__name__ in text and "## Use it when" in text
        assert kind.paper.removeprefix("arXiv ") in text
    for picture in (ROOT / "docs/images").iterdir():
        assert picture.stat().st_size < 60 * 1024, picture


def test_mask_pictures_are_up_to_date(tmp_path, monkeypatch):
    masks = tool("draw_masks")
    monkeypatch.setattr(masks, "IMAGES", tmp_path)
    masks.draw_gna()
    drawn, kept = (Image.open(path / "mask-gna.png").convert("RGB") for path in (tmp_path, ROOT / "docs/images"))
    drawn, kept = (np.asarray(x.resize((200, 80)), dtype=float) for x in (drawn, kept))
    assert np.abs(drawn - kept).mean() < 2, "run: python docs/tools/draw_masks.py"


def test_api_reference_names_every_public_object():
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert [name for name in dit_accel.__all__ if f"dit_accel.{name}" not in text] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


def test_readme_figures_match_the_benchmarks():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    attention, step, quality = (
        json.loads((ROOT / f"benchmarks/{kind}.json").read_text())["rows"] for kind in ("attention", "step", "quality")
    )
    by_work = {(row["work"], row["tokens"]): row for row in attention}
    for work, tokens, text in (
        ("SLA 5 %, all, Wan2.1-1.3B 480p", 32760, "SLA 5 %, all keys"),
        ("CLEAR radius 16, Flux 4096²", 66048, "CLEAR radius 16"),
    ):
        row, line = by_work[work, tokens], next(line for line in lines if f"attention call: {text}" in line)
        times = (
            f"| {milliseconds(row['dense']['ms'])} | {milliseconds(row['ours']['ms'])} | {row['times_dense']:.2f}× |"
        )
        shape = f"({row['heads']} heads, {row['tokens']:,} tokens, head dim {row['head_dim']})"
        assert times in line and shape in line
    steps = {row["variant"]: row for row in step if row["model"] == "wan1.3b-720p"}
    dense, sla = steps["dense"], steps["sla"]
    line = next(line for line in lines if "denoiser step: SLA" in line)
    assert f"| {milliseconds(dense['ms'])} | {milliseconds(sla['ms'])} | {sla['times_dense']:.2f}× |" in line
    best = next(row for row in quality if row["teacher"] == "image, 3.0 M" and row["mechanism"] == "sla"
                and row["training"] == "prediction, mixed levels")  # fmt: skip
    check, line = best["after"]["prompt_check"], next(line for line in lines if "| quality: SLA" in line)
    points = 100 * (check["student"] - check["teacher"])
    shown = f"| {check['teacher']:.1%} | {check['student']:.1%} | −{-points:.1f} points |".replace("%", " %")
    assert shown in line and f"{best['after']['logit_fraction']:.1%}".replace("%", " %") in line
    loss = 100 * (best["after"]["flow_loss"]["student_over_teacher"] - 1)
    assert f"loss is {loss:.1f} % above the teacher's" in " ".join(lines)


def test_embedded_pipelines_are_as_small_as_documented():
    for pipeline in (IMAGE, VIDEO):
        assert sum(file.stat().st_size for file in pipeline.folder.rglob("*") if file.is_file()) < 8 * 2**20


def test_repository_metadata_is_valid():
    """Workflow, templates and citation are valid YAML; the workflow runs .ci/run; the citation has the version."""
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff"]
    read = {file.name: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}
    steps = read["ci.yml"]["jobs"]["ci"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]
    assert read["CITATION.cff"]["version"] == dit_accel.__version__
    assert all({"name", "description", "body"} <= set(read[name]) for name in ("bug.yml", "model.yml"))
    assert f"## [{dit_accel.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
