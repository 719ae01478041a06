"""The `nybble` command. `commands/` holds one file for each; here are what they share: errors, Ctrl-C, exit codes.

Exit codes: 0 done; 1 something failed; 2 the user can mend it (a setting, the model, the input); 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from nybble import __version__
from nybble.commands import chat, demo, doctor, generate
from nybble.core import log
from nybble.core.errors import EngineDeadError, NybbleError

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


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit. Errors are one line each, unless --debug is among the arguments."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    is_debug = _take_debug(arguments)
    # On a CPU each of a step's hundreds of small operations ends at a barrier. Threads that spin there keep the last
    # one from its core: with one busy process beside it a step of a small model took up to 100 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported, which no command has done yet
    try:
        log.configure()
        app(arguments, prog_name="nybble")
    except KeyboardInterrupt:  # as typer does while a command runs
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has gone: `nybble … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except NybbleError as error:
        _fail(f"error: {error}", 1 if isinstance(error, EngineDeadError) else 2, is_debug)
    except Exception as error:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        _fail(f"error: {what}  (--debug shows where)", 1, is_debug)


def _take_debug(arguments: list[str]) -> bool:
    """Remove --debug wherever it stands before `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    is_debug = len(kept) < end
    arguments[:end] = kept
    return is_debug


def _fail(message: str, code: int, is_debug: bool) -> None:
    if is_debug:
        traceback.print_exc()
    print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
