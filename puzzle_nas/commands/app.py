"""The command line that commands add themselves to, and the arguments that several of them share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from puzzle_nas import __version__

app = typer.Typer(
    name="puzzle",
    help="Turn a trained LLM into a smaller, faster child that meets your limits, measured on your machine.\n\n"
    "Start with: puzzle run recipes/quickstart.yaml",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def puzzle(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    if version:
        print(f"puzzle-nas {__version__}")
        raise typer.Exit
    show_help_alone(context)


def show_help_alone(context: typer.Context) -> None:
    """Print the help if no command is given."""
    if context.invoked_subcommand is None:
        print(context.get_help())


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as gkd.tokens=100000."),
]
Again = Annotated[bool, typer.Option("--again", help="Discard what this stage has made and make it again.")]
