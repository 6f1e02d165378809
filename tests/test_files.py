"""Atomic file writes: error messages, leftovers of killed processes, and folder locks."""

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from dit_accel.common import files
from dit_accel.common.files import CannotWrite, locked, remove_leftovers, replacing, write_json
from dit_accel.comparison.sheet import save_clip

NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
WRITERS = {
    "torch": lambda path: torch.save({"a": torch.zeros(100_000)}, path),
    "safetensors": lambda path: save_file({"a": torch.zeros(100_000)}, path),  # replaces the file itself
    "PIL": lambda path: Image.fromarray(NOISE).save(path, "PNG"),
    "text": lambda path: path.write_text("a" * 100_000),
}


def raise_as_safetensors(_):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("write", [WRITERS["torch"], WRITERS["PIL"], WRITERS["text"], raise_as_safetensors])
def test_full_disk_is_reported_for_every_library(tmp_path, write):
    """Writes to /dev/full fail as on a full disk."""
    path = tmp_path / "a.pt"
    path.write_text("before")
    with pytest.raises(CannotWrite) as caught, replacing(path) as temporary:
        temporary.symlink_to("/dev/full")
        write(temporary)
    assert caught.value.errno == 28
    assert str(caught.value).startswith(f"cannot write {path}: the disk is full (")
    assert f"at {tmp_path}): free some space" in str(caught.value)
    assert [x.name for x in tmp_path.iterdir()] == ["a.pt"] and path.read_text() == "before"


@pytest.mark.parametrize("writer", WRITERS)
def test_other_write_errors_are_reported(tmp_path, writer):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(CannotWrite, match=r"a\.pt: File too large$"), replacing(tmp_path / "a.pt") as temporary:
            WRITERS[writer](temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_full_disk_is_reported_for_clips(tmp_path, monkeypatch):
    """ffmpeg runs in another process; only a broken pipe is visible."""
    make = files.tempfile.mkdtemp

    def full(**options):
        folder = make(**options)
        os.symlink("/dev/full", f"{folder}/a.mp4")
        return folder

    monkeypatch.setattr(files.tempfile, "mkdtemp", full)
    with pytest.raises(CannotWrite, match=r"a\.mp4: the disk is full"):
        save_clip(tmp_path / "a.mp4", iter([NOISE] * 200), 8)


def test_other_errors_are_not_changed(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    with pytest.raises(RuntimeError, match="of its own"), replacing(tmp_path / "a.json"):
        raise RuntimeError("of its own")
    assert not list(tmp_path.iterdir())


KILLED = """
import runpy, sys
from pathlib import Path
files, folder = runpy.run_path(sys.argv[1]), Path(sys.argv[2])  # importing the package takes seconds
with files["locked"](folder, print), files["replacing"](folder / "a.pt") as temporary:
    temporary.write_text("half of it")
    print("there", flush=True)
    sys.stdin.read()
"""


def test_killed_process_leaves_neither_lock_nor_leftovers(tmp_path):
    """While the process runs, its temporary file stays and other processes cannot lock the folder."""
    for name in (".a.pt", ".notes.dit-accel-x", "dit-accel-12345678.pt"):
        (tmp_path / name).write_text("not ours")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, files.__file__, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"there\n"
    before = {x.name for x in tmp_path.iterdir()}
    assert len(before) == 5
    remove_leftovers(tmp_path)
    assert {x.name for x in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match=rf"process {process.pid} on .* is writing into .*choose another --out"):  # noqa: SIM117
        with locked(tmp_path, print):
            pass
    process.kill()
    process.wait()
    with locked(tmp_path, print):
        remove_leftovers(tmp_path)
        assert {x.name for x in tmp_path.iterdir()} == {".a.pt", ".notes.dit-accel-x", "dit-accel-12345678.pt", ".lock"}
    assert not (tmp_path / ".lock").exists()


def test_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    warnings = []
    with locked(tmp_path, warnings.append):
        assert len(warnings) == 1 and f"{tmp_path} is on a file system without locks" in warnings[0]
    write_json(tmp_path / "a.json", {})
    assert json.loads((tmp_path / "a.json").read_text()) == {}
