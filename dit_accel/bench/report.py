"""Documentation tables and plots of benchmark results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..common.errors import BadInput
from ..common.files import replacing
from .plots import plot
from .results import KEYS, read_results
from .tables import table

__all__ = ["fill", "report"]


def report(folder: Path, pages: Sequence[Path]) -> int:
    """Save plots in the folder of the results and fill the tables of the pages. Tables without a marker are printed.

    Returns: 0.
    Raises: BadInput: no results, invalid results, a missing page, a table with several markers, or no matplotlib.
    """
    found = [kind for kind in KEYS if (folder / f"{kind}.json").is_file()]
    if not found:
        raise BadInput(f"no results in {folder}: run dit-accel bench attention or dit-accel bench step first")
    try:
        results = {kind: read_results(folder / f"{kind}.json") for kind in found}
        before = {page: page.read_text(encoding="utf-8") for page in pages}
    except (OSError, ValueError) as error:
        raise BadInput(str(error)) from None
    texts = dict(before)
    for kind, content in results.items():
        marker = f"bench:{kind}"
        filled = {page: new for page, text in texts.items() if (new := fill(text, marker, table(content))) is not None}
        if len(filled) > 1:
            raise BadInput(f"<!-- {marker} --> is in {' and '.join(map(str, filled))}: keep one of them")
        if not filled:
            print(f"no page has <!-- {marker} --> … <!-- /{marker} -->; the table is:")
            print(table(content))
        texts |= filled
    for kind, content in results.items():
        plot(content, folder / f"{kind}.png")
        print(folder / f"{kind}.png")
    for page in (page for page, text in texts.items() if text != before[page]):
        with replacing(page) as temporary:
            temporary.write_text(texts[page], encoding="utf-8")
        print(page)
    return 0


def fill(text: str, marker: str, content: str) -> str | None:
    """Replace the text between ``<!-- marker -->`` and ``<!-- /marker -->`` by ``content``.

    Returns: the new text; None if it does not have these comments.
    Raises: BadInput: the comments occur more than once.
    """
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not (found := pattern.findall(text)):
        return None
    if len(found) > 1:
        raise BadInput(f"{begin} occurs {len(found)} times: keep one of them")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)
