"""Command line of ``python -m dit_accel.bench``: ``dit-accel bench`` by argparse, for machines without typer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ..common.errors import BadInput
from .options import COMMANDS, PAGES

__all__ = ["PAGES", "bench", "main"]


class _Parser(argparse.ArgumentParser):
    """Parser that raises :class:`BadInput` for invalid arguments."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (see {self.prog} --help)")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog, description="Time attention calls, denoiser steps and training steps against dense attention."
    )
    commands = parser.add_subparsers(dest="what", required=True, parser_class=_Parser, metavar="|".join(COMMANDS))
    for name, kind in COMMANDS.items():
        command = commands.add_parser(name, help=kind.summary, description=kind.__doc__)
        for field in kind.fields():
            given: dict[str, Any] = {"help": field.help.replace("%", "%%"), "default": field.default}
            if field.kind is bool:
                given["action"] = "store_true"
            else:
                given |= {"type": field.kind, "metavar": field.metavar}
                given |= {"action": "append"} if field.repeatable else {}
                given["help"] += "" if field.default is None else f" Default: {field.default}."
            command.add_argument(f"--{field.name}", **given)
    return parser


def bench(arguments: Sequence[str], prog: str) -> int:
    """Run the command. Returns: exit status: 0, or 1 if a part failed, 130 or 143 if stopped.

    Raises: BadInput: invalid arguments; the message says in one line what to change.
    """
    given = vars(_parser(prog).parse_args(arguments))
    return COMMANDS[given.pop("what")](**given).run((prog, *arguments))


def main() -> None:
    """Entry point of ``python -m dit_accel.bench``."""
    from ..common.signals import interruptible

    try:
        with interruptible():
            status = bench(sys.argv[1:], "python -m dit_accel.bench")
    except BadInput as error:
        print(f"dit-accel: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status)
