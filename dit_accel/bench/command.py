"""The arguments of ``dit-accel bench``, by argparse: ``python -m dit_accel.bench`` must run without typer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..command import BadInput, Stopped
from .request import Request, make_request

__all__ = ["bench", "main"]

_FOLDER = Path("benchmarks")


class _Parser(argparse.ArgumentParser):
    """Bad arguments raise :class:`BadInput`."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (see {self.prog} --help)")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number from 1, got {text!r}")
    return int(text)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, description="Time attention calls and whole denoiser steps against dense attention.")
    commands = parser.add_subparsers(dest="what", required=True, parser_class=_Parser, metavar="attention|step|report")
    attention = commands.add_parser(
        "attention",
        help="single attention calls",
        description="Time single attention calls against dense. LLSA's cases (llsa-256, llsa-256-wide) are measured "
        "only when named: until LLSA has kernels they run on the torch backend.",
    )
    attention.add_argument("--case", metavar="NAME", action="append", default=[],
                           help="a case, or how cases' names begin; repeatable; default all but LLSA's")  # fmt: skip
    attention.add_argument("--backend", metavar="NAME", action="append", default=[],
                           help="torch, triton or flex; repeatable; default what is taken on this machine")  # fmt: skip
    attention.add_argument("--flex", action="store_true",
                           help="time FlexAttention too where the mask is static (takes seconds)")  # fmt: skip
    attention.add_argument("--order", choices=("tokens-first", "heads-first"), default="tokens-first",
                           help="how inputs lie in memory; models have tokens-first")  # fmt: skip
    _common(attention, 20, _FOLDER / "attention.json")
    step = commands.add_parser(
        "step", help="whole denoiser steps", description="Time whole denoiser steps with random weights."
    )
    step.add_argument("--model", metavar="NAME", action="append", default=[],
                      help="wan1.3b-480p, flux-2048 and so on; repeatable; default all")  # fmt: skip
    step.add_argument("--variant", metavar="NAME", action="append", default=[],
                      help="dense, dense-eager, sla, clear-r8 …; repeatable; default all but dense-eager")  # fmt: skip
    _common(step, 5, _FOLDER / "step.json")
    report = commands.add_parser(
        "report", help="plots, and README.md's tables", description="Draw what was measured; fill README.md's tables."
    )
    report.add_argument("--folder", metavar="FOLDER", type=Path, default=_FOLDER, help="where the results are")
    report.add_argument("--readme", metavar="FILE", type=Path, default=Path("README.md"))
    return parser


def _common(parser: argparse.ArgumentParser, repeats: int, out: Path) -> None:
    parser.add_argument("--out", metavar="FILE", type=Path, default=out, help=f"default {out}")
    parser.add_argument("--keep", metavar="FILE", type=Path,
                        help="take the other rows of these results over (same GPU and versions)")  # fmt: skip
    parser.add_argument("--repeats", metavar="N", type=_positive, default=repeats, help=f"samples; default {repeats}")
    parser.add_argument("--device", metavar="NAME", help="default the GPU")
    parser.add_argument("--dtype", metavar="NAME", help="default bfloat16 on CUDA, else float32")
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on any device, to see that all works")


def bench(arguments: Sequence[str], prog: str) -> int:
    """Run the command. Returns the exit status: 0, or 1 if something failed in part, 130 or 143 if stopped.

    Raises: BadInput: one line that says what to change.
    """
    given = _parser(prog).parse_args(arguments)
    if given.what == "report":
        from .report import report

        return report(given.folder, given.readme)
    request = _request(given, (prog, *arguments))
    run: Any
    if given.what == "attention":
        from .attention import run
    else:
        from .step import run
    try:
        return run(request)
    except Stopped as stop:
        print(f"dit-accel: stopped by {stop}; what was finished is in {request.out}", file=sys.stderr)
        return stop.status


def _request(given: argparse.Namespace, command: tuple[str, ...]) -> Request:
    rest: dict[str, Any] = {"repeats": given.repeats, "seed": given.seed, "keep": given.keep, "command": command}
    if given.what == "attention":
        backends = tuple(dict.fromkeys(given.backend)) or (None,)
        rest |= {"names": tuple(given.case), "backends": backends, "flex": given.flex, "order": given.order}
    else:
        rest |= {"names": tuple(given.model), "variants": tuple(given.variant)}
    return make_request(given.device, given.dtype, given.smoke, given.out, **rest)


def main() -> None:
    """``python -m dit_accel.bench``: as ``dit-accel bench``, without typer."""
    from ..command import stoppable

    try:
        with stoppable():
            status = bench(sys.argv[1:], "python -m dit_accel.bench")
    except BadInput as error:
        print(f"dit-accel: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status)
