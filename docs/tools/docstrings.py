"""Griffe extension: the library's docstrings as mkdocstrings reads them.

The library writes ``Returns: one line``, ``a, b: text`` under ``Args`` and ``:func:`name` ``. Griffe's Google parser
expects a section on lines of its own, one name per entry and cross-references as Markdown.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|mod|meth):`~?\.?([\w.]+)`")
SECTION = re.compile(r"^(Args|Returns|Raises): (\S.*(?:\n(?:    .*|(?!\w+:|\n).+))*)", re.MULTILINE)
SEVERAL = re.compile(r"^(    )(\w+(?:, \w+)+): (.*(?:\n {8}.*)*)$", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = google_style(obj.docstring.value)


def google_style(text: str) -> str:
    text = ROLE.sub(lambda found: f"`{found[1]}`", text).replace("``", "`")
    text = SECTION.sub(_own_lines, text)
    text = re.sub(r"(?<=[^\n])\n(?=(?:Args|Returns|Raises):\n)", "\n\n", text)
    return SEVERAL.sub(lambda found: "\n".join(f"    {name}: {found[3]}" for name in found[2].split(", ")), text)


def _own_lines(found: re.Match[str]) -> str:
    """``Raises: A: why; B: why`` has an entry per error."""
    body = " ".join(found[2].split())
    if found[1] != "Raises":
        return f"{found[1]}:\n    {body}"
    errors = re.split(r"; (?=\w+(?:Error|Exception):)", body)
    return "Raises:\n" + "\n".join(f"    {error}" for error in errors)
