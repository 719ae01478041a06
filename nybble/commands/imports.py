"""Importing what takes long, torch above all, while Ctrl-C may come."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nybble.llm import LLM


def import_llm() -> type[LLM]:
    with ctrl_c_exits():
        from nybble.llm import LLM
    return LLM


@contextmanager
def ctrl_c_exits() -> Iterator[None]:
    """Ctrl-C ends the process at once. An exception could be raised where it is lost: in a callback of the import
    machinery, which prints it and goes on, or in torch's C++ code, which imports Python modules too and leaves half a
    numpy behind, or aborts."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, or a program's that called `main`
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
