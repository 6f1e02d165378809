"""Explanation of a failed import, if git wrote the links to kernels, pipelines and demo as text files."""

from __future__ import annotations

from pathlib import Path

__all__ = ["explain_import"]

_LINKS = ("kernels", "pipelines", "demo")


def explain_import(error: ModuleNotFoundError, package: Path) -> ImportError:
    """Error for a failed import of the package: which link is not a folder, and what to do; else ``error`` itself."""
    broken = next((package / name for name in _LINKS if not (package / name).is_dir()), None)
    if broken is None:
        return error
    if broken.is_file():
        found = f"a text file with the content {broken.read_text(encoding='utf-8', errors='replace')[:80].strip()!r}"
    else:
        found = "nothing"
    return ImportError(
        f"{broken} must be a folder, or a link to the folder ../{broken.name} in a clone, got {found}. Git writes "
        "links as text files if it may not make links. In a clone, turn on Developer Mode (Windows), run `git config "
        "core.symlinks true` and `git checkout -- dit_accel`. Or install the wheel: pip install dit-accel",
        name=error.name,
    )
