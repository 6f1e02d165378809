"""Tables for the documentation and plots from benchmark results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import BadInput
from ..files import replacing
from .plots import plot
from .results import KEYS, read_results
from .tables import table

__all__ = ["fill", "report"]


def report(folder: Path, pages: Sequence[Path]) -> int:
    """Draw the plots beside the results and fill the tables of the pages; a table without a place is printed.

    Returns: 0.
    Raises: BadInput: no results, files that are not results, no matplotlib, a missing page, a table with two places.
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
            print(f"no page has <!-- {marker} --> … <!-- /{marker} -->; its table would be:")
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
    """The text with ``content`` between the comments ``<!-- marker -->`` and ``<!-- /marker -->``; None without them.

    Raises: BadInput: more than one pair of comments.
    """
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not (found := pattern.findall(text)):
        return None
    if len(found) > 1:
        raise BadInput(f"{begin} stands there {len(found)} times: one of each")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)
