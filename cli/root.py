"""The root command: which commands there are, and how every error ends."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import graphsplit
from graphsplit.cli import (
    console,
    depth,
    draw,
    ensemble,
    export,
    fuse,
    inspect,
    merge,
    partition,
    prune_units,
    run,
    sparsify,
    study,
    verify,
)
from graphsplit.errors import GraphsplitError

INTERRUPTED = 130
CLOSED_PIPE = 141
BUG = 70

EPILOG = """\b
Exit codes:
    0  all went well
    1  an error without a code of its own
    2  the command line is not understood
    3  the model's file, the model or its inputs cannot be used
    4  torch.export cannot trace the model
    5  the model cannot be divided or exported as asked
    6  a plan, a bundle or weights do not fit, or a folder is in the way
    7  a check failed: the pieces do not compute what they should
   70  a bug in graphsplit: please report it
  130  interrupted
  141  the reader of stdout went away
"""


@dataclass
class Settings:
    """Options that the handling of errors needs."""

    verbose: bool = False


class Commands(TyperGroup):
    """Ends every error with one sentence on stderr and the exit code of its kind."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        ctx.obj = Settings()
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except KeyboardInterrupt:
            console.note("interrupted; nothing was left half-written")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            _discard_stdout()
            raise typer.Exit(CLOSED_PIPE) from None
        except GraphsplitError as error:
            console.error(error, verbose=ctx.obj.verbose)
            raise typer.Exit(error.exit_code) from None
        except Exception as error:
            if type(error).__module__.startswith(("typer.", "click.")):
                raise
            console.bug(error, verbose=ctx.obj.verbose)
            raise typer.Exit(BUG) from None
        return result


def _discard_stdout() -> None:
    """What Python would still flush at exit has no reader."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        sys.stdout = io.StringIO()


app = typer.Typer(
    cls=Commands,
    name="graphsplit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EPILOG,
)

COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect.inspect,
    "partition": partition.partition,
    "merge": merge.merge,
    "fuse": fuse.fuse,
    "critics": depth.critics,
    "sil": depth.sil,
    "sparsify": sparsify.sparsify,
    "prune-units": prune_units.prune_units,
    "ensemble": ensemble.ensemble,
    "study": study.study,
    "verify": verify.verify,
    "export": export.export,
    "draw": draw.draw,
    "run": run.run,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graphsplit {graphsplit.__version__}")
        raise typer.Exit


@app.callback()
def graphsplit_(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Split a PyTorch model into sub-models that train apart, and merge them again, with proof."""


def main() -> None:
    """Run the command line."""
    app(prog_name="graphsplit")
