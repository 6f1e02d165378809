"""Wheel and source distribution contain the whole library, and nothing else at top level."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OF_THE_PACKAGE = ("dit_accel", "kernels", "pipelines", "demo")


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Output of an interpreter with ``path`` and the installed packages, but no other checkout, on its path."""
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", **({"PYTHONPATH": str(path)} if path else {})}
    done = subprocess.run(
        [sys.executable, "-P", *arguments] if sys.version_info >= (3, 11) else [sys.executable, *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of_the_package() -> set[str]:
    """Files that the package must have, as paths in the wheel."""
    found = set()
    for top in OF_THE_PACKAGE:
        for file in (ROOT / top).rglob("*"):
            hidden = any(part.startswith((".", "__pycache__")) for part in file.relative_to(ROOT).parts)
            if file.is_file() and not hidden:
                inside = file.relative_to(ROOT)
                found.add(str(inside if top == "dit_accel" else Path("dit_accel") / inside))
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and source distribution, built from a clean copy of the repository."""
    folder = tmp_path_factory.mktemp("build")
    clean = folder / "clone"
    clean.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clean)
    for name in OF_THE_PACKAGE:
        ignore = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT / name, clean / name, symlinks=True, ignore=ignore)
    python("-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(clean), cwd=folder)
    return next((folder / "dist").glob("*.whl")), next((folder / "dist").glob("*.tar.gz"))


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(folder)
    return folder


def test_wheel_has_all_files_and_no_other_top_level(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == files_of_the_package()
    assert {name.split("/")[0] for name in inside} == {"dit_accel"}


def test_source_distribution_has_all_files(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files_of_the_package() <= names


def test_wheel_metadata_is_complete(built):
    with zipfile.ZipFile(built[0]) as wheel:
        info = next(name for name in wheel.namelist() if name.endswith("METADATA"))
        metadata = wheel.read(info).decode()
        scripts = wheel.read(info.replace("METADATA", "entry_points.txt")).decode()
        assert info.replace("METADATA", "licenses/LICENSE") in wheel.namelist()
    assert "Name: dit-accel" in metadata and "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata and "Provides-Extra: train" in metadata
    assert "dit-accel = dit_accel.cli.app:main" in scripts


def test_installed_wheel_works_and_shadows_no_packages(unpacked, tmp_path):
    code = """
import importlib.util, pathlib, sys
import dit_accel.cli, dit_accel.common.bundled, dit_accel.pipelines.flux
site = pathlib.Path(sys.argv[1])
assert pathlib.Path(dit_accel.__file__).is_relative_to(site), dit_accel.__file__
assert pathlib.Path(dit_accel.pipelines.flux.__file__).is_relative_to(site)
assert dit_accel.common.bundled.IMAGE.folder.is_relative_to(site)
for name in ("kernels", "pipelines", "demo"):
    found = importlib.util.find_spec(name)
    assert found is None or "dit" not in str(found.origin or found.submodule_search_locations), found
print(dit_accel.__version__)
"""
    assert python("-c", code, str(unpacked), cwd=tmp_path, path=unpacked).strip() == "0.1.0"


def test_command_runs_outside_the_repository(unpacked, tmp_path):
    assert "dit-accel 0.1.0" in python("-m", "dit_accel.cli", "--version", cwd=tmp_path, path=unpacked)
