"""Helpers of the documentation tests: read code fences of Markdown pages, check that shell commands exist."""

from __future__ import annotations

import argparse
import functools
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import typer.main
from markdown_it import MarkdownIt

from dit_accel.cli.app import app
from dit_accel.mechanisms.attn_spec import parse_attention
from dit_accel.mechanisms.registry import PROCESSORS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = re.compile(r"<!-- needs: (.+?) -->")


@dataclass(frozen=True)
class Fence:
    """A fenced code block. ``needs``: text of a comment ``<!-- needs: … -->`` before it; such a block is not run."""

    page: Path
    line: int
    language: str
    text: str
    needs: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def fences(page: Path) -> list[Fence]:
    found, needs = [], None
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence":
            line = (token.map or [0])[0] + 1
            found.append(Fence(page, line, token.info.split(" ")[0], token.content, needs))
        marker = NEEDS.search(token.content) if token.type == "html_block" else None
        needs = marker[1] if marker else None
    return found


def inline_code(page: Path) -> Iterator[str]:
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        yield from (child.content for child in token.children or () if child.type == "code_inline")


def commands(text: str) -> list[list[str]]:
    """Commands of a shell block, split into words."""
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [found for found in words if found]


class _Parsed(Exception):
    """Raised after arguments were parsed, to stop the script."""


def _parse_only(run: Any, arguments: list[str]) -> argparse.ArgumentParser:
    """Run a script only until its arguments are parsed. Returns: its parser.

    Raises: ValueError: the script rejects the arguments.
    """
    parsers = []
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        parsers.append(self)
        try:
            parse(self, args, namespace)
        except SystemExit as error:
            raise ValueError(f"{self.prog} rejects {arguments}") from error
        raise _Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), mock.patch.object(sys, "argv", arguments):
        try:
            run()
        except _Parsed:
            return parsers[0]
    raise ValueError(f"{arguments[0]} parses no arguments")


def check_command(words: list[str]) -> None:
    """Check that a documented command exists.

    Raises: ValueError: an unknown program, target, extra, module, option or mechanism.
    """
    program, *rest = words
    checks = {"dit-accel": _dit_accel, "make": _make, "pip": _pip, "python": _python, "accelerate": _accelerate}
    check = checks.get(program)
    if check is None:
        raise ValueError(f"no check for {program}: mark the block with <!-- needs: … -->")
    check(rest)


def _dit_accel(rest: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    if rest[:1] == ["bench"]:
        group, rest = group.commands["bench"], rest[1:]
    name, *arguments = rest
    if name not in group.commands:
        raise ValueError(f"dit-accel has no command {name}")
    try:
        given = group.commands[name].make_context(name, list(arguments)).params
    except Exception as error:
        raise ValueError(f"dit-accel {' '.join(rest)}: {error}") from error
    attention = given.get("attn") or ()
    for text in [attention] if isinstance(attention, str) else attention:
        if text.partition(":")[0] in PROCESSORS or ":" in text:
            parse_attention(text)


def _make(rest: list[str]) -> None:
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    if unknown := [word for word in rest if word not in targets[1].split()]:
        raise ValueError(f"the Makefile has no target {unknown[0]}")


def _pip(rest: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    known = {re.split(r"[<>=\[;]", need)[0] for needs in extras.values() for need in needs}
    assert rest[0] == "install"
    for word in rest[1:]:
        if word in ("--no-index", "--no-deps") or re.fullmatch(r"dist/dit_accel(_demo)?-\*\.whl", word):
            continue
        if word.startswith("./"):
            if not (ROOT / word / "pyproject.toml").is_file():
                raise ValueError(f"{word} is not a folder with a pyproject.toml")
            continue
        own = re.fullmatch(r"(?:\.|dit-accel)(?:\[(\w+)\])?", word)
        if own and own[1] is not None and own[1] not in extras:
            raise ValueError(f"pyproject.toml has no extra {own[1]}")
        if not own and word not in known:
            raise ValueError(f"pyproject.toml does not name {word}")


def _python(rest: list[str]) -> None:
    script_parser(rest)


def script_parser(rest: list[str]) -> argparse.ArgumentParser | None:
    """Parser of a script, given the arguments of ``python``; None if the script has no parser."""
    if rest[0] == "-m":
        try:
            module = importlib.import_module(
                f"{rest[1]}.__main__" if rest[1] in ("dit_accel.bench", "dit_accel.cli") else rest[1]
            )
        except ImportError as error:
            raise ValueError(f"no module {rest[1]}") from error
        return _parse_only(module.main, [rest[1], *rest[2:]])
    script = ROOT / rest[0]
    if not script.is_file():
        raise ValueError(f"no file {rest[0]}")
    if script.parent.name != "examples":
        return None
    return _parse_only(lambda: runpy.run_path(str(script), run_name="__main__"), [str(script), *rest[1:]])


def _accelerate(rest: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert rest[0] == "launch"
    try:
        given = launch_command_parser().parse_args(rest[1:])
    except SystemExit as error:
        raise ValueError(f"accelerate rejects {rest}") from error
    if not given.module or given.training_script != "dit_accel.cli":
        raise ValueError(f"expected -m dit_accel.cli, got {given.training_script}")
    _dit_accel(given.training_script_args)


@functools.cache
def known_options() -> set[str]:
    """All options of the documented commands."""
    from accelerate.commands.launch import launch_command_parser

    group: Any = typer.main.get_command(app)
    commands = [*group.commands.values(), *group.commands["bench"].commands.values()]
    found = {name for command in commands for option in command.params for name in option.opts}
    found |= {name for option in group.params for name in option.opts} | {"--help"}
    scripts = ["train_embedded", "convert_embedded"]
    own = [script_parser(["-m", f"dit_accel.demo.training.{name}", "image", "--out", "x"]) for name in scripts]
    for parser in (launch_command_parser(), *own):
        assert parser is not None
        found |= set(parser._option_string_actions)
    return found
