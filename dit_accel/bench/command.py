"""The arguments of ``dit-accel bench``, by argparse: ``python -m dit_accel.bench`` must run without typer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from ..errors import BadInput
from ..signals import Stopped
from .request import Request, make_request

__all__ = ["PAGES", "bench", "main"]

_FOLDER = Path("benchmarks")
PAGES = (Path("docs/benchmarks.md"), Path("docs/quality.md"))


class _Parser(argparse.ArgumentParser):
    """Bad arguments raise :class:`BadInput`."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (see {self.prog} --help)")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number from 1, got {text!r}")
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
        description="Time single attention calls against dense: the forward pass, or the backward pass. Cases of "
        "mechanisms that have no Triton kernels are measured only when named: they run on the torch backend.",
    )
    attention.add_argument("--case", metavar="NAME", action="append", default=[],
                           help="a case, or how cases' names begin; repeatable; default all with kernels")  # fmt: skip
    attention.add_argument("--backward", action="store_true",
                           help="the backward pass instead, of other cases")  # fmt: skip
    attention.add_argument("--flex", action="store_true",
                           help="time FlexAttention too where the mask is static (takes seconds)")  # fmt: skip
    _calls(attention)
    _common(attention, 20, "benchmarks/attention.json, or benchmarks/backward.json")
    step = commands.add_parser(
        "step", help="whole denoiser steps", description="Time whole denoiser steps with random weights."
    )
    step.add_argument("--model", metavar="NAME", action="append", default=[],
                      help="wan1.3b-480p, flux-2048 and so on; repeatable; default all")  # fmt: skip
    step.add_argument("--variant", metavar="NAME", action="append", default=[],
                      help="dense, dense-eager, sla, clear-r8 …; repeatable; default the compiled ones")  # fmt: skip
    _common(step, 5, "benchmarks/step.json")
    train = commands.add_parser(
        "train",
        help="training steps",
        description="Time training steps (forward, backward, AdamW) of four Wan blocks with random weights, and "
        "measure the memory they take with a quarter, half and all of a clip.",
    )
    train.add_argument("--model", metavar="NAME", action="append", default=[],
                       help="wan1.3b-480p, or that with -half or -quarter; repeatable; default all")  # fmt: skip
    train.add_argument("--variant", metavar="NAME", action="append", default=[],
                       help="dense, dense-eager, sla, sla-eager; repeatable; default all, eager ones for the shorter "
                       "clips")  # fmt: skip
    train.add_argument("--checkpointing", action="store_true",
                       help="compute blocks anew in the backward pass; its rows stand beside those without in --keep's "
                       "results")  # fmt: skip
    _common(train, 5, "benchmarks/train.json")
    scaling = commands.add_parser(
        "scaling",
        help="time against the number of tokens",
        description="Time LLSA's forward and backward pass from 4,096 to 1,048,576 tokens, beside dense attention as "
        "long as that takes no more than a second, and fit how they grow.",
    )
    scaling.add_argument("--case", metavar="NAME", action="append", default=[],
                         help="llsa-64x64 to llsa-1024x1024; repeatable; default all")  # fmt: skip
    _calls(scaling)
    _common(scaling, 10, "benchmarks/scaling.json")
    report = commands.add_parser(
        "report",
        help="plots, and the tables of the documentation",
        description="Draw the results as plots and fill the tables of the documentation.",
    )
    report.add_argument("--folder", metavar="FOLDER", type=Path, default=_FOLDER, help="where the results are")
    report.add_argument("--page", metavar="FILE", type=Path, action="append",
                        help=f"a page with tables; repeatable; default {' and '.join(map(str, PAGES))}")  # fmt: skip
    return parser


def _calls(parser: argparse.ArgumentParser) -> None:
    """What commands that time single calls have in common."""
    parser.add_argument("--backend", metavar="NAME", action="append", default=[],
                        help="torch, triton or flex; repeatable; default what is taken on this machine")  # fmt: skip
    parser.add_argument("--order", choices=("tokens-first", "heads-first"), default="tokens-first",
                        help="how inputs lie in memory; models have tokens-first")  # fmt: skip


def _common(parser: argparse.ArgumentParser, repeats: int, out: str) -> None:
    parser.add_argument("--out", metavar="FILE", type=Path, help=f"default {out}")
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

        return report(given.folder, given.page or PAGES)
    request = _request(given, (prog, *arguments))
    try:
        return import_module(f".{given.what}", __package__).run(request)
    except Stopped as stop:
        print(f"dit-accel: stopped by {stop}; what was finished is in {request.out}", file=sys.stderr)
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
            raise BadInput("--flex times FlexAttention's forward pass: leave out --flex or --backward")
        rest |= {"flex": given.flex, "backward": given.backward}
        kind = "backward" if given.backward else kind
    elif kind == "train":
        rest |= {"checkpointing": given.checkpointing}
    return make_request(given.device, given.dtype, given.smoke, given.out or _FOLDER / f"{kind}.json", **rest)


def main() -> None:
    """``python -m dit_accel.bench``: as ``dit-accel bench``, without typer."""
    from ..signals import interruptible

    try:
        with interruptible():
            status = bench(sys.argv[1:], "python -m dit_accel.bench")
    except BadInput as error:
        print(f"dit-accel: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status)
