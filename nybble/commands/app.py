"""The commands as one typer application. Imported by `nybble.cli` when it runs, for this takes a while."""

from __future__ import annotations

from typing import Annotated

import typer

from nybble import __version__
from nybble.commands import advise, bench, chat, compare, demo, doctor, generate, profile, serve

app = typer.Typer(
    name="nybble",
    help="Inference for 4-bit (AWQ) language models.",
    epilog="NYBBLE_LOG=info shows what happens at start; HF_TOKEN and HF_HUB_OFFLINE are respected.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(no_args_is_help=True)(generate.generate)
app.command(no_args_is_help=True)(chat.chat)
app.command(no_args_is_help=True)(serve.serve)
app.add_typer(bench.app, name="bench")
app.command(no_args_is_help=True)(compare.compare)
app.command(no_args_is_help=True)(profile.profile)
app.command(no_args_is_help=True)(advise.advise)
app.command()(doctor.doctor)
app.command()(demo.demo)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"nybble {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")] = False,
) -> None:
    # `debug` is taken out of the arguments by `main`; it is here for the help.
    pass
