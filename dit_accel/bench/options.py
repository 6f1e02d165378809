"""Options of the ``dit-accel bench`` commands, declared once: typer and argparse get them from these classes.

``python -m dit_accel.bench`` must run on machines without typer, so the fields carry an :class:`Option` of this module.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from ..common.choices import Dtype, Order
from ..common.errors import BadInput
from ..common.signals import Stopped
from .request import Request, make_request

__all__ = ["COMMANDS", "PAGES", "Command", "Field", "Option"]

FOLDER = Path("benchmarks")
PAGES = (Path("docs/benchmarks.md"), Path("docs/quality.md"))


@dataclass(frozen=True)
class Option:
    """Help text of an option. metavar: name of its value; None: the choices of a ``Literal`` type, or a flag."""

    help: str
    metavar: str | None = None


@dataclass(frozen=True)
class Field:
    """An option of a command. kind: type of its value. repeatable: whether it makes a list."""

    name: str
    kind: Any
    repeatable: bool
    default: Any
    help: str
    metavar: str


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command with its options as fields. The docstring of a subclass describes it in the help."""

    name: ClassVar[str]
    summary: ClassVar[str]

    def run(self, command: tuple[str, ...]) -> int:
        """Run it. command: its words, for the results. Returns: exit status."""
        raise NotImplementedError

    @classmethod
    def fields(cls) -> Iterator[Field]:
        """Options, its own before those of its base classes."""
        hints = typing.get_type_hints(cls, include_extras=True)
        names = dict.fromkeys(name for owner in cls.__mro__ for name in inspect.get_annotations(owner))
        for name in names:
            if get_origin(hints[name]) is Annotated:
                kind, option = get_args(hints[name])
                members = [x for x in get_args(kind) if x is not type(None)]
                kind = members[0] if type(None) in get_args(kind) else kind
                choices = get_args(kind) if get_origin(kind) is Literal else ()
                repeatable = get_origin(kind) is list
                yield Field(
                    name, str if choices else get_args(kind)[0] if repeatable else kind, repeatable, getattr(cls, name),
                    option.help, option.metavar or "|".join(choices),
                )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Measurement(Command):
    out: Annotated[
        Path | None,
        Option("Results file; default: benchmarks/COMMAND.json, with --backward benchmarks/backward.json.", "FILE"),
    ] = None
    keep: Annotated[
        Path | None,
        Option("Copy the rows of these results that are not measured again (same GPU and versions).", "FILE"),
    ] = None
    repeats: Annotated[int, Option("Number of timing samples.", "N")] = 5
    device: Annotated[str | None, Option("Device; default: the GPU.", "NAME")] = None
    dtype: Annotated[Dtype | None, Option("Precision; default: bfloat16 on CUDA, else float32.")] = None
    seed: Annotated[int, Option("Random seed.", "N")] = 0
    smoke: Annotated[bool, Option("Use tiny sizes on any device, to test the installation.")] = False

    def request(self, command: tuple[str, ...], kind: str | None = None, **options: Any) -> Request:
        """Checked request. kind: name of the results, if not the command's."""
        return make_request(
            self.device, self.dtype, self.smoke, self.out or FOLDER / f"{kind or self.name}.json",
            repeats=self.repeats, seed=self.seed, keep=self.keep, command=command, **options,
        )  # fmt: skip

    def run(self, command: tuple[str, ...]) -> int:
        request = self.request(command)
        try:
            status: int = import_module(f".{self.name}", __package__).run(request)
        except Stopped as stop:
            print(f"dit-accel: stopped by {stop}; finished rows are in {request.out}", file=sys.stderr)
            return stop.status
        return status


@dataclass(frozen=True, kw_only=True)
class _Calls(_Measurement):
    backend: Annotated[
        list[str] | None, Option("torch, triton or flex; repeatable; default: this machine's default.", "NAME")
    ] = None
    order: Annotated[Order, Option("Memory layout of the inputs; models use tokens-first.")] = "tokens-first"

    def calls(self) -> dict[str, Any]:
        """Options of the request that both commands share."""
        return {"backends": tuple(dict.fromkeys(self.backend or ())) or (None,), "order": self.order}


@dataclass(frozen=True, kw_only=True)
class Attention(_Calls):
    """Time single attention calls against dense attention: the forward or the backward pass.

    Cases of mechanisms without Triton kernels run on the torch backend and are measured only if named with --case.
    """

    name = "attention"
    summary = "single attention calls"

    case: Annotated[
        list[str] | None,
        Option("Name of a case, or prefix of names; repeatable; default: all cases with Triton kernels.", "NAME"),
    ] = None
    backward: Annotated[bool, Option("Time the backward pass, with its own set of cases.")] = False
    flex: Annotated[bool, Option("Also time FlexAttention if the mask is static (compiles for seconds).")] = False
    repeats: Annotated[int, Option("Number of timing samples.", "N")] = 20

    def request(self, command: tuple[str, ...], kind: str | None = None, **options: Any) -> Request:
        if self.backward and self.flex:
            raise BadInput("--flex times only FlexAttention's forward pass: leave out --flex or --backward")
        kind = "backward" if self.backward else None
        names = tuple(self.case or ())
        return super().request(
            command, kind, names=names, flex=self.flex, backward=self.backward, **self.calls(), **options
        )


@dataclass(frozen=True, kw_only=True)
class Step(_Measurement):
    """Time whole denoiser steps with random weights."""

    name = "step"
    summary = "whole denoiser steps"

    model: Annotated[
        list[str] | None, Option("wan1.3b-480p, flux-2048, …; repeatable; default: all models.", "NAME")
    ] = None
    variant: Annotated[
        list[str] | None,
        Option("dense, dense-eager, sla, clear-r8, …; repeatable; default: compiled variants.", "NAME"),
    ] = None

    def request(self, command: tuple[str, ...], kind: str | None = None, **options: Any) -> Request:
        names, variants = tuple(self.model or ()), tuple(self.variant or ())
        return super().request(command, kind, names=names, variants=variants, **options)


@dataclass(frozen=True, kw_only=True)
class Train(Step):
    """Time training steps (forward, backward, AdamW) of four Wan blocks with random weights.

    Also measures their peak memory for a quarter, half and all of a clip.
    """

    name = "train"
    summary = "training steps"

    model: Annotated[
        list[str] | None,
        Option("wan1.3b-480p, wan1.3b-480p-half or wan1.3b-480p-quarter; repeatable; default: all three.", "NAME"),
    ] = None
    variant: Annotated[
        list[str] | None,
        Option(
            "dense, dense-eager, sla, sla-eager; repeatable; default: all for the full clip, the eager ones for the "
            "shorter clips.",
            "NAME",
        ),
    ] = None
    checkpointing: Annotated[bool, Option("Use gradient checkpointing; --keep keeps the rows measured without it.")] = (
        False
    )

    def request(self, command: tuple[str, ...], kind: str | None = None, **options: Any) -> Request:
        return super().request(command, kind, checkpointing=self.checkpointing, **options)


@dataclass(frozen=True, kw_only=True)
class Scaling(_Calls):
    """Time LLSA's forward and backward pass from 4,096 to 1,048,576 tokens and fit the exponent of the growth.

    Dense attention is timed, too, if it takes at most one second.
    """

    name = "scaling"
    summary = "time against the number of tokens"

    case: Annotated[
        list[str] | None, Option("llsa-64x64 to llsa-1024x1024; repeatable; default: all sizes.", "NAME")
    ] = None
    repeats: Annotated[int, Option("Number of timing samples.", "N")] = 10

    def request(self, command: tuple[str, ...], kind: str | None = None, **options: Any) -> Request:
        return super().request(command, kind, names=tuple(self.case or ()), **self.calls(), **options)


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Plot the results and fill the tables of the documentation."""

    name = "report"
    summary = "plots and documentation tables"

    folder: Annotated[Path, Option("Folder with the results.", "FOLDER")] = FOLDER
    page: Annotated[
        list[Path] | None,
        Option(f"Page with tables; repeatable; default: {' and '.join(map(str, PAGES))}.", "FILE"),
    ] = None

    def run(self, command: tuple[str, ...]) -> int:
        from .report import report

        return report(self.folder, self.page or PAGES)


COMMANDS: dict[str, type[Command]] = {kind.name: kind for kind in (Attention, Step, Train, Scaling, Report)}
