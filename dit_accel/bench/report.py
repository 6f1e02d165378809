"""Results as tables for README.md, and as plots beside them."""

from __future__ import annotations

import re
from pathlib import Path

from ..command import BadInput
from ..files import replacing
from .plots import plot
from .results import KEYS, read_results
from .tables import table

__all__ = ["fill", "report"]


def report(folder: Path, readme: Path) -> int:
    """Plots beside the results, and README.md's tables from them; a table that README.md has no place for is printed.

    Returns: 0.
    Raises: BadInput: no results, files that are not results, no matplotlib, a README.md that is not there.
    """
    found = [kind for kind in KEYS if (folder / f"{kind}.json").is_file()]
    if not found:
        raise BadInput(f"no results in {folder}: run dit-accel bench attention or dit-accel bench step first")
    try:
        results = {kind: read_results(folder / f"{kind}.json") for kind in found}
        text = readme.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadInput(str(error)) from None
    for kind, content in results.items():
        if (filled := fill(text, kind, table(content))) is None:
            print(f"{readme} has no <!-- bench:{kind} --> … <!-- /bench:{kind} -->; its table would be:")
            print(table(content))
        else:
            text = filled
    for kind, content in results.items():
        plot(content, folder / f"{kind}.png")
        print(folder / f"{kind}.png")
    if text != readme.read_text(encoding="utf-8"):
        with replacing(readme) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(readme)
    return 0


def fill(text: str, kind: str, content: str) -> str | None:
    """The text with this between the two comments of ``kind``; None where it has none.

    Raises: BadInput: the comments stand there more than once.
    """
    begin, end = f"<!-- bench:{kind} -->", f"<!-- /bench:{kind} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not (found := pattern.findall(text)):
        return None
    if len(found) > 1:
        raise BadInput(f"{begin} stands there {len(found)} times: one of each")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)
