"""The wheels and the source distribution: files, sizes, metadata, and use without the repository or a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dit_accel
from dit_accel.cli.app import main
from dit_accel.common import bundled
from dit_accel.common.errors import BadInput
from dit_accel.common.links import explain_import
from dit_accel.demo.ui.engine import Engine

ROOT = Path(__file__).parent.parent
LINKS = ("kernels", "pipelines", "demo")
DATA = ("conversions", "image", "video")  # folders of demo/ in the wheel dit-accel-demo
MAX_WHEEL_BYTES = 3_000_000


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess:
    """Run a command offline, with nothing but ``path`` in PYTHONPATH."""
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def output(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that has to succeed."""
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_under(folder: Path) -> set[Path]:
    """Files of a folder of the repository, relative to it, without caches, builds and hidden files."""
    found = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    skipped = re.compile(r"\.|__pycache__|build$|.*\.egg-info$")
    return {file for file in found if not any(skipped.match(part) for part in file.parts)}


def library_files() -> set[str]:
    """Files that the wheel dit-accel must have."""
    files = {Path("dit_accel") / file for file in files_under(ROOT / "dit_accel") if file.parts[0] not in LINKS}
    for name in LINKS:
        files |= {Path("dit_accel") / name / file for file in files_under(ROOT / name) if file.suffix == ".py"}
    return {str(file) for file in files if file.parts[1:3] != ("demo", "training")}


def data_files() -> set[str]:
    """Files that the wheel dit-accel-demo must have."""
    return {str(Path("dit_accel_demo") / name / file) for name in DATA for file in files_under(ROOT / "demo" / name)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder of the source distribution, the wheel made from it, and the wheel of the pipelines."""
    folder = tmp_path_factory.mktemp("build")
    clean, dist = folder / "clone", folder / "dist"
    ignore = shutil.ignore_patterns("__pycache__", ".*", "build", "*.egg-info")
    clean.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clean)
    for name in ("dit_accel", *LINKS):
        shutil.copytree(ROOT / name, clean / name, symlinks=True, ignore=ignore)
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", dist)
    output(*build, clean, cwd=folder)
    output(*build, "--wheel", clean / "demo", cwd=folder)
    return dist


def wheel(built: Path, name: str) -> Path:
    [found] = built.glob(f"{name}-*.whl")
    return found


@pytest.fixture(scope="module")
def python(built, tmp_path_factory):
    """Python of an environment with both wheels, for tests that do not change it."""
    return installed(built, tmp_path_factory.mktemp("environment"))[0]


def installed(built: Path, folder: Path) -> tuple[Path, Path, Callable[..., None]]:
    """Install both wheels beside this environment's packages; return the new python, its site-packages, and its pip."""
    output(sys.executable, "-m", "venv", "--without-pip", folder, cwd=built)
    python = folder / "bin/python"
    [site] = folder.glob("lib/python*/site-packages")
    # a path in a .pth file adds the packages there, without the .pth file of an editable dit-accel
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))

    def pip(*arguments: str | Path) -> None:
        output(sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *arguments, cwd=built)

    pip("install", "--no-index", "--no-deps", "--no-compile", *built.glob("*.whl"))
    return python, site, pip


def contents(file: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(file).namelist() if ".dist-info/" not in name}


def test_library_wheel_is_small_and_has_all_modules(built):
    file = wheel(built, "dit_accel")
    assert file.stat().st_size <= MAX_WHEEL_BYTES
    assert contents(file) == library_files()
    assert {name.split("/")[0] for name in contents(file)} == {"dit_accel"}


def test_demo_wheel_has_pipelines_and_no_code(built):
    found = contents(wheel(built, "dit_accel_demo"))
    assert found == data_files() and not any(name.endswith(".py") for name in found)
    assert {
        "dit_accel_demo/image/model_index.json",
        "dit_accel_demo/conversions/video/sla/dit_accel.safetensors",
    } < found


def test_source_distribution_has_all_modules_and_no_links(built):
    """The wheel under test was built from it, so a system without links builds the same wheel."""
    [file] = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        assert [member.name for member in archive if member.issym() or member.islnk()] == []
        assert library_files() <= {name.partition("/")[2] for name in archive.getnames()}
    assert file.stat().st_size <= MAX_WHEEL_BYTES


@pytest.mark.parametrize("name", ["dit_accel", "dit_accel_demo"])
def test_wheel_metadata_is_complete(built, name):
    with zipfile.ZipFile(wheel(built, name)) as archive:
        info = f"{name}-{dit_accel.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode().splitlines()
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert f"Name: {name.replace('_', '-')}" in metadata and f"Version: {dit_accel.__version__}" in metadata
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Python: >=3.10" in metadata


def test_only_the_demo_extra_needs_the_pipelines(built):
    with zipfile.ZipFile(wheel(built, "dit_accel")) as archive:
        info = f"dit_accel-{dit_accel.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        assert "dit-accel = dit_accel.cli.app:main" in archive.read(f"{info}/entry_points.txt").decode()
    needed = re.findall("^Requires-Dist: (dit-accel-demo.*)$", metadata, re.MULTILINE)
    assert needed == [f'dit-accel-demo=={dit_accel.__version__}; extra == "demo"']
    assert {"bench", "demo", "dev", "docs", "train"} == set(
        re.findall("^Provides-Extra: (.*)$", metadata, re.MULTILINE)
    )


def test_installed_wheels_compare_offline_and_shadow_nothing(python, tmp_path):
    code = """
import importlib.util, pathlib, sys
import torch, diffusers
before = set(sys.modules)
import dit_accel
heavy = ("gradio", "typer", "torch._dynamo", "torch._inductor", "dit_accel.cli", "dit_accel.conversion")
assert not [name for name in set(sys.modules) - before if name.startswith(heavy)]
import dit_accel.demo.app, dit_accel.pipelines.flux
from dit_accel.common.bundled import IMAGE, VIDEO
site = pathlib.Path(dit_accel.__file__).parents[1]
assert site.is_relative_to(sys.prefix), site
assert pathlib.Path(dit_accel.pipelines.flux.__file__).is_relative_to(site)
assert VIDEO.folder == site / "dit_accel_demo/video" and (VIDEO.conversions / "sla").is_dir()
for name in ("kernels", "pipelines", "demo"):
    found = importlib.util.find_spec(name)
    assert found is None or "dit" not in str(found.origin or found.submodule_search_locations), found
from dit_accel.cli.app import main
small = ["--steps", "1", "--height", "64", "--width", "64", "--prompt", "red"]
main(["compare", "--attn", str(IMAGE.conversions / "clear"), *small, "--out", "out"])
"""
    assert (python.parent / "dit-accel").is_file()
    output(python, "-c", code, cwd=tmp_path)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["status"] == "complete"


@pytest.mark.parametrize("removed, kept", [("dit-accel", data_files), ("dit-accel-demo", library_files)])
def test_uninstalling_a_wheel_keeps_files_of_the_other(built, tmp_path, removed, kept):
    _, site, pip = installed(built, tmp_path / "environment")
    pip("uninstall", "--yes", removed)
    assert {file for file in kept() if not (site / file).is_file()} == set()
    assert not [file for file in site.glob(f"{removed.replace('-', '_')}/**/*") if file.is_file()]


@pytest.fixture
def no_pipelines(tmp_path, monkeypatch):
    """Installation without dit-accel-demo; pip has left the empty folder of the package."""
    (tmp_path / "dit_accel_demo").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(bundled, "_CLONE", tmp_path / "demo")
    bundled._data_folder.cache_clear()
    yield f"got none in {tmp_path / 'demo'} or {tmp_path / 'dit_accel_demo'}: pip install 'dit-accel[demo]'"
    bundled._data_folder.cache_clear()


def test_command_says_how_to_install_missing_pipelines(no_pipelines, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--out", str(tmp_path / "out")])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and no_pipelines in message
    assert f"expected the embedded pipelines of dit-accel-demo {dit_accel.__version__}" in message


def test_demo_app_says_how_to_install_missing_pipelines(no_pipelines):
    with pytest.raises(BadInput, match=re.escape(no_pipelines)):
        Engine(None, torch.device("cpu"), torch.float32)


def test_other_pipelines_do_not_need_the_embedded_ones(no_pipelines):
    assert bundled.prompts_of("a pipeline of the user") == bundled.OTHER_PROMPTS


def test_import_without_links_says_what_to_do(python, tmp_path):
    """Git writes links as text files on Windows without Developer Mode."""
    package = tmp_path / "dit_accel"
    shutil.copytree(ROOT / "dit_accel", package, ignore=shutil.ignore_patterns("__pycache__", *LINKS))
    for name in LINKS:
        (package / name).write_text(f"../{name}")
    done = run(python, "-c", "import dit_accel", cwd=tmp_path, path=tmp_path)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and error.startswith(f"ImportError: {package / 'kernels'} must be a folder")
    assert "got a text file with the content '../kernels'" in error
    assert "core.symlinks true" in error and "Developer Mode" in error and "pip install dit-accel" in error
    (package / "kernels").unlink()
    assert "got nothing" in str(explain_import(ModuleNotFoundError("kernels"), package))


def test_other_import_errors_are_not_replaced():
    error = ModuleNotFoundError("No module named 'torch'", name="torch")
    assert explain_import(error, ROOT / "dit_accel") is error
