"""The `nybble` command. `commands/` holds one file for each; here are what they share: errors, Ctrl-C, exit codes.

Exit codes: 0 done; 1 something failed; 2 the user can mend it (a setting, the model, the input); 130 Ctrl-C.

What takes time is imported inside `main`, where Ctrl-C is caught.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from nybble.commands.imports import ctrl_c_exits


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit. Errors are one line each, unless --debug is among the arguments.

    Args:
        arguments: None: those of the process, which ends with this call, so that Ctrl-C is ignored at the end.
    """
    if arguments is None:
        sys.unraisablehook = repeat_lost_interrupt
    try:
        try:
            code = _run(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            if arguments is None:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        if arguments is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = 130
    sys.exit(code)


def _run(arguments: list[str]) -> int | str | None:
    """Returns the exit code."""
    is_debug = _take_debug(arguments)
    # On a CPU each of a step's hundreds of small operations ends at a barrier. Threads that spin there keep the last
    # one from its core: with one busy process beside it a step of a small model took up to 100 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported, which no command has done yet
    _prepare_streams()
    with ctrl_c_exits():
        from nybble.core.errors import EngineDeadError, MeasurementError, NybbleError

    try:
        with ctrl_c_exits():
            from nybble.commands.app import app
            from nybble.core import log

        log.configure()
        app(arguments, prog_name="nybble")
    except SystemExit as exit_:  # how typer ends, after Ctrl-C with 130
        return exit_.code
    except BrokenPipeError:  # whoever read our output has gone: `nybble … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except NybbleError as error:
        return _fail(f"error: {error}", 1 if isinstance(error, EngineDeadError | MeasurementError) else 2, is_debug)
    except Exception as error:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return _fail(f"error: {what}  (--debug shows where)", 1, is_debug)
    return 0


def repeat_lost_interrupt(lost: sys.UnraisableHookArgs) -> None:
    """A `sys.unraisablehook`: Ctrl-C in a callback, where Python can only print it, comes again a moment later."""
    if lost.exc_type is KeyboardInterrupt:
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        threading.Timer(0.01, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(lost)


def _prepare_streams() -> None:
    """Python makes None of a closed stream: then nothing is there to read, and what is written goes nowhere. And a
    terminal that lacks a character shows "?" instead."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in this order they get their own numbers
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (to the end)
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _take_debug(arguments: list[str]) -> bool:
    """Remove --debug wherever it stands before `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    is_debug = len(kept) < end
    arguments[:end] = kept
    return is_debug


def _fail(message: str, code: int, is_debug: bool) -> int:
    if is_debug:
        import traceback

        traceback.print_exc()
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
