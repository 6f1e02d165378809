"""Fill the generated tables of the documentation from the code.

    python docs/tools/generate.py           # write
    python docs/tools/generate.py --check   # exit with 1 if a page is not up to date

A page marks a table as ``<!-- generated:NAME --> … <!-- /generated:NAME -->``. ``options-sla`` is the option table of a
mechanism, ``options-common`` that of all processors, ``cli-convert`` that of a command, ``recipes`` the conversion
recipes, ``families`` the known denoisers, ``backends`` the backends of each mechanism.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields
from inspect import getdoc
from pathlib import Path
from typing import Any

import typer.main

from dit_accel.bench.report import fill
from dit_accel.cli.app import app
from dit_accel.conversion.recipes.recipe import RECIPES, Stage
from dit_accel.mechanisms.backend import BACKENDS
from dit_accel.mechanisms.processor import AcceleratedAttnProcessor
from dit_accel.mechanisms.registry import PROCESSORS

DOCS = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"<!-- (generated:[\w-]+) -->")
LOSSES = ("flow", "prediction", "variance", "attention", "transfer", "matching", "selection")


def filled(text: str) -> str:
    """The page with every generated table as the code has it. Raises: KeyError: an unknown name of a table."""
    for marker in MARKER.findall(text):
        text = fill(text, marker, TABLES[marker.partition(":")[2]]()) or text
    return text


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def documented_arguments(documented: Any) -> dict[str, str]:
    """Descriptions under ``Args:`` in a docstring, by name; ``a, b: text`` describes both."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", (getdoc(documented) or "") + "\n", re.MULTILINE)
    found: dict[str, str] = {}
    for names, text in re.findall(r"^    ([\w, ]+): ((?:.*)(?:\n        .*)*)", section[1] if section else "", re.M):
        found |= dict.fromkeys(re.split(r",\s*", names), " ".join(text.split()))
    return found


def one_sentence(text: str) -> str:
    """With a capital, unless a value comes first as in ``new (…)``, a full stop, and single backticks."""
    text = re.sub(r":func:`(?:~?[\w.]*\.)?(\w+)`", r"`\1`", text.strip()).replace("``", "`").rstrip(".")
    capital = text[:1].isascii() and not re.match(r"\w+ \(", text)
    return f"{text[:1].upper() if capital else text[:1]}{text[1:]}." if text else ""


def options(name: str) -> str:
    """Options of one mechanism's processor."""
    kind = PROCESSORS[name]
    common = {field.name for field in fields(AcceleratedAttnProcessor)}
    described = documented_arguments(kind)
    rows = [
        (f"`{field.name}`", _type(field), _default(field.default), one_sentence(described[field.name]))
        for field in fields(kind)
        if field.name not in common
    ]
    return markdown(("option", "type", "default", "meaning"), rows)


def common_options() -> str:
    described = documented_arguments(AcceleratedAttnProcessor)
    rows = [
        (f"`{field.name}`", _type(field), _default(field.default), one_sentence(described[field.name]))
        for field in fields(AcceleratedAttnProcessor)
    ]
    return markdown(("option", "type", "default", "meaning"), rows)


def _type(field: Any) -> str:
    words = str(field.type).replace(" | ", " or ")
    return re.sub(r"Sequence\[\w+\]", "one per axis", words)


def _default(value: Any) -> str:
    return "required" if value is MISSING else f"`{value!r}`".replace("'", '"')


def command(name: str) -> str:
    """Options of a ``dit-accel`` command."""
    group: Any = typer.main.get_command(app)
    rows = []
    for option in group.commands[name].params:
        value = "" if option.is_flag else f" {option.metavar or 'VALUE'}"
        default = "required" if option.required else "" if option.default in (None, False) else f"`{option.default}`"
        rows.append((f"`{option.opts[0]}{value}`", default, one_sentence(option.help or "")))
    return markdown(("option", "default", "meaning"), rows)


def recipes() -> str:
    rows = []
    for recipe in RECIPES.values():
        for stage in recipe.stages:
            weights = ", ".join(f"{loss} {stage.weight(loss):g}" for loss in LOSSES if stage.weight(loss))
            share = "all" if stage.share == 1 else f"{stage.share:.0%}"
            rows.append((f"`{recipe.name}`", stage.name, share, _trained(stage), f"{stage.lr:g}", weights))
    return markdown(("recipe", "stage", "steps", "trained", "learning rate", "loss weights"), rows)


def _trained(stage: Stage) -> str:
    return {"adapter": "LoRA alone"}.get(stage.train, f"`--train {stage.train}`")


def backends() -> str:
    rows = [
        (f"`{name}`", *("yes" if b in kind.backends else "–" for b in BACKENDS)) for name, kind in PROCESSORS.items()
    ]
    return markdown(("mechanism", *(f"`{backend}`" for backend in BACKENDS)), rows)


TABLES: dict[str, Callable[[], str]] = {
    "options-common": common_options,
    "recipes": recipes,
    "backends": backends,
    **{f"options-{name}": lambda name=name: options(name) for name in PROCESSORS},
    **{f"cli-{name}": lambda name=name: command(name) for name in ("compare", "convert", "evaluate", "demo")},
}


def main(arguments: Sequence[str]) -> int:
    check = "--check" in arguments
    stale = {page: new for page in sorted(DOCS.rglob("*.md")) if (new := filled(old := page.read_text())) != old}
    for page, text in stale.items():
        print(f"{page} is {'not up to date: run python docs/tools/generate.py' if check else 'written'}")
        if not check:
            page.write_text(text)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
