"""The ``dit-accel bench`` commands, made of the classes in :mod:`dit_accel.bench.options`."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from ..bench.options import COMMANDS, Command

__all__ = ["bench_app"]

bench_app = typer.Typer(
    help="Time attention calls, denoiser steps and training steps against dense attention on this GPU.",
    rich_markup_mode=None,
)


def _command(kind: type[Command]) -> Any:
    """Function with the signature that typer reads, which runs the command."""

    def run(context: typer.Context, **options: Any) -> int:
        return kind(**options).run(("dit-accel bench", *context.obj[1:]))

    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for field in kind.fields():
        value: Any = list[field.kind] if field.repeatable else field.kind  # type: ignore[name-defined]
        hint: Any = value | None if field.default is None else value
        option = typer.Option(f"--{field.name}", help=field.help, metavar=field.metavar or None)
        annotation: Any = Annotated[hint, option]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)
        )
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = kind.__doc__
    return run


for _name, _kind in COMMANDS.items():
    bench_app.command(_name, short_help=_kind.summary)(_command(_kind))
