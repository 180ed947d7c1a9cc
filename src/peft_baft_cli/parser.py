"""Parse the command line with typer, and write its error messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from peft_baft_cli.errors import EXIT_CODES
from peft_baft_cli.options import COMMANDS, Command
from peft_baft_cli.screen import is_rich_terminal, shown
from peft_baft_cli.values import flag
from peft_baft_cli.version import installed_versions

CONTEXT = {"max_content_width": 120, "help_option_names": ["-h", "--help"]}


def parse(words: Sequence[str]) -> Command | int:
    """Parse the words after `baft` into a command.

    Returns:
        The command. Or the exit code, if typer has handled the words: `--help`, `--version`, and shell completion.

    Raises:
        typer.TyperException: the words are not a valid command line.
    """
    baft: Any = typer.main.get_command(_application(words))
    if not words or words[0] not in COMMANDS:
        code: int = baft.main(list(words), prog_name="baft", standalone_mode=False)
        return code
    # Called through `baft`, the command would first process the options of `baft`, for which typer imports pydantic.
    parsed: Command | int = baft.commands[words[0]].main(
        list(words[1:]), prog_name=f"baft {words[0]}", standalone_mode=False
    )
    return parsed


def error_message(error: typer.TyperException, words: Sequence[str]) -> str:
    """Return an error in the command line as one line that names the command. Without any words, return the help."""
    if not words:
        return error.message
    command = f"baft {words[0]}" if words[0] in COMMANDS else "baft"
    if isinstance(error, typer.BadParameter) and error.param is not None:
        is_option = error.param.param_type_name == "option"
        name = error.param.opts[0] if is_option else error.param.metavar
        problem = f": {error.message}" if error.message else " is missing"
        text = f"argument {name}{problem}"
    else:
        text = error.message.replace("No such option:", "unknown:")
        if similar := getattr(error, "possibilities", None):
            text += f". Did you mean {' or '.join(similar)}?"
    text = text if text.endswith((".", "?")) else f"{text}."
    return f"{command}: {shown(text)} See {command} --help."


def _application(words: Sequence[str]) -> typer.Typer:
    """Return the typer application. On a terminal, rich draws its help with colours and panels."""
    app = typer.Typer(
        cls=_PlainGroup,
        rich_markup_mode="rich" if words and is_rich_terminal() else None,
        no_args_is_help=True,
        epilog="\n\n".join(
            ["Exit codes:", *(f"{code}  {meaning}" for code, meaning in EXIT_CODES.items())]
        ),
        context_settings=CONTEXT,
    )
    app.callback()(_baft)
    for name, command in COMMANDS.items():
        app.command(name, cls=_PlainCommand, short_help=command.__doc__, context_settings=CONTEXT)(
            command
        )
    return app


def _show_versions(wanted: bool) -> None:
    if wanted:
        print(installed_versions())
        raise typer.Exit()


def _baft(
    version: Annotated[
        bool,
        flag(
            "--version",
            help="show the versions of the package and its dependencies",
            is_eager=True,
            callback=_show_versions,
        ),
    ] = False,
) -> None:
    """Edit what a language model knows, and save the edits as a PEFT adapter."""


class _PlainCommand(TyperCommand):
    """A command whose plain help groups options under the same headings as rich's panels."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            heading = "Arguments" if parameter.param_type_name == "argument" else "Options"
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(
                    getattr(parameter, "rich_help_panel", None) or heading, []
                ).append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


class _PlainGroup(TyperGroup):
    """The command `baft`, whose plain help ends with a table of exit codes."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])
