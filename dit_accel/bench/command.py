"""Command line of ``dit-accel bench``. It uses argparse, so that ``python -m dit_accel.bench`` runs without typer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from ..common.errors import BadInput
from ..common.signals import Stopped
from .request import Request, make_request

__all__ = ["PAGES", "bench", "main"]

_FOLDER = Path("benchmarks")
PAGES = (Path("docs/benchmarks.md"), Path("docs/quality.md"))


class _Parser(argparse.ArgumentParser):
    """Parser that raises :class:`BadInput` for invalid arguments."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (see {self.prog} --help)")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog, description="Time attention calls, denoiser steps and training steps against dense attention."
    )
    commands = parser.add_subparsers(
        dest="what", required=True, parser_class=_Parser, metavar="attention|step|train|scaling|report"
    )
    attention = commands.add_parser(
        "attention",
        help="single attention calls",
        description="Time single attention calls against dense attention: the forward or the backward pass. Cases of "
        "mechanisms without Triton kernels run on the torch backend and are measured only if named with --case.",
    )
    attention.add_argument("--case", metavar="NAME", action="append", default=[],
                           help="name of a case, or prefix of names; repeatable; default: all cases with Triton "
                           "kernels")  # fmt: skip
    attention.add_argument("--backward", action="store_true",
                           help="time the backward pass, with its own set of cases")  # fmt: skip
    attention.add_argument("--flex", action="store_true",
                           help="also time FlexAttention if the mask is static (compiles for seconds)")  # fmt: skip
    _calls(attention)
    _common(attention, 20, "benchmarks/attention.json, or benchmarks/backward.json")
    step = commands.add_parser(
        "step", help="whole denoiser steps", description="Time whole denoiser steps with random weights."
    )
    step.add_argument("--model", metavar="NAME", action="append", default=[],
                      help="wan1.3b-480p, flux-2048, …; repeatable; default: all models")  # fmt: skip
    step.add_argument("--variant", metavar="NAME", action="append", default=[],
                      help="dense, dense-eager, sla, clear-r8, …; repeatable; default: compiled variants")  # fmt: skip
    _common(step, 5, "benchmarks/step.json")
    train = commands.add_parser(
        "train",
        help="training steps",
        description="Time training steps (forward, backward, AdamW) of four Wan blocks with random weights, and "
        "measure their peak memory for a quarter, half and all of a clip.",
    )
    train.add_argument("--model", metavar="NAME", action="append", default=[],
                       help="wan1.3b-480p, wan1.3b-480p-half or wan1.3b-480p-quarter; repeatable; "
                       "default: all three")  # fmt: skip
    train.add_argument("--variant", metavar="NAME", action="append", default=[],
                       help="dense, dense-eager, sla, sla-eager; repeatable; default: all for the full clip, the eager "
                       "ones for the shorter clips")  # fmt: skip
    train.add_argument("--checkpointing", action="store_true",
                       help="use gradient checkpointing; --keep keeps the rows measured without it")  # fmt: skip
    _common(train, 5, "benchmarks/train.json")
    scaling = commands.add_parser(
        "scaling",
        help="time against the number of tokens",
        description="Time LLSA's forward and backward pass from 4,096 to 1,048,576 tokens and fit the exponent of the "
        "growth. Dense attention is timed, too, if it takes at most one second.",
    )
    scaling.add_argument("--case", metavar="NAME", action="append", default=[],
                         help="llsa-64x64 to llsa-1024x1024; repeatable; default: all sizes")  # fmt: skip
    _calls(scaling)
    _common(scaling, 10, "benchmarks/scaling.json")
    report = commands.add_parser(
        "report",
        help="plots and documentation tables",
        description="Plot the results and fill the tables of the documentation.",
    )
    report.add_argument("--folder", metavar="FOLDER", type=Path, default=_FOLDER, help="folder with the results")
    report.add_argument("--page", metavar="FILE", type=Path, action="append",
                        help=f"page with tables; repeatable; default: {' and '.join(map(str, PAGES))}")  # fmt: skip
    return parser


def _calls(parser: argparse.ArgumentParser) -> None:
    """Add the options of the commands that time single attention calls."""
    parser.add_argument("--backend", metavar="NAME", action="append", default=[],
                        help="torch, triton or flex; repeatable; default: this machine's default")  # fmt: skip
    parser.add_argument("--order", choices=("tokens-first", "heads-first"), default="tokens-first",
                        help="memory layout of the inputs; models use tokens-first")  # fmt: skip


def _common(parser: argparse.ArgumentParser, repeats: int, out: str) -> None:
    """Add the options of all commands that measure."""
    parser.add_argument("--out", metavar="FILE", type=Path, help=f"results file; default: {out}")
    parser.add_argument("--keep", metavar="FILE", type=Path,
                        help="copy the rows of these results that are not measured again (same GPU and "
                        "versions)")  # fmt: skip
    parser.add_argument("--repeats", metavar="N", type=_positive, default=repeats,
                        help=f"number of timing samples; default: {repeats}")  # fmt: skip
    parser.add_argument("--device", metavar="NAME", help="default: the GPU")
    parser.add_argument("--dtype", metavar="NAME", help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="random seed; default: 0")
    parser.add_argument("--smoke", action="store_true", help="use tiny sizes on any device, to test the installation")


def bench(arguments: Sequence[str], prog: str) -> int:
    """Run the command. Returns: exit status: 0, or 1 if a part failed, 130 or 143 if stopped.

    Raises: BadInput: invalid arguments; the message says in one line what to change.
    """
    given = _parser(prog).parse_args(arguments)
    if given.what == "report":
        from .report import report

        return report(given.folder, given.page or PAGES)
    request = _request(given, (prog, *arguments))
    try:
        return import_module(f".{given.what}", __package__).run(request)
    except Stopped as stop:
        print(f"dit-accel: stopped by {stop}; finished rows are in {request.out}", file=sys.stderr)
        return stop.status


def _request(given: argparse.Namespace, command: tuple[str, ...]) -> Request:
    rest: dict[str, Any] = {"repeats": given.repeats, "seed": given.seed, "keep": given.keep, "command": command}
    kind = given.what
    if "case" in given:
        backends = tuple(dict.fromkeys(given.backend)) or (None,)
        rest |= {"names": tuple(given.case), "backends": backends, "order": given.order}
    else:
        rest |= {"names": tuple(given.model), "variants": tuple(given.variant)}
    if kind == "attention":
        if given.backward and given.flex:
            raise BadInput("--flex times only FlexAttention's forward pass: leave out --flex or --backward")
        rest |= {"flex": given.flex, "backward": given.backward}
        kind = "backward" if given.backward else kind
    elif kind == "train":
        rest |= {"checkpointing": given.checkpointing}
    return make_request(given.device, given.dtype, given.smoke, given.out or _FOLDER / f"{kind}.json", **rest)


def main() -> None:
    """Entry point of ``python -m dit_accel.bench``: ``dit-accel bench`` without typer."""
    from ..common.signals import interruptible

    try:
        with interruptible():
            status = bench(sys.argv[1:], "python -m dit_accel.bench")
    except BadInput as error:
        print(f"dit-accel: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status)
