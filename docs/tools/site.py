"""Hooks of the documentation's build (``hooks`` in mkdocs.yml).

- Fences of the language ``math`` become MathML, which browsers draw without a script.
- Pictures in ``assets/`` and ``benchmarks/`` are part of the site; pages name them by the path that GitHub shows, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ("assets", "benchmarks")


def on_files(files: Any, config: Any) -> Any:
    for folder in PICTURES:
        for picture in sorted((ROOT / folder).glob("*.png")):
            files.append(File.generated(config, f"{folder}/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    depth = page.file.src_uri.count("/")
    markdown = re.sub(rf"\]\((?:\.\./)+({'|'.join(PICTURES)})/", rf"]({'../' * depth}\1/", markdown)
    return re.sub(r"^```math\n(.*?)\n```$", _mathml, markdown, flags=re.DOTALL | re.MULTILINE)


def _mathml(found: re.Match[str]) -> str:
    return f'<div class="equation">{convert(found[1], display="block")}</div>'
