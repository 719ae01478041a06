"""`Progress`: a bar on standard error while prompts are answered. Owns nothing else."""

from __future__ import annotations

import sys
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Prompts done, or what else is counted, and tokens a second so far.

    Args:
        num_requests: prompts to come; None where nobody knows.
        is_wanted: None shows the bar if standard error is a terminal and there are several prompts.
    """

    def __init__(self, num_requests: int | None, is_wanted: bool | None = None, what: str = "prompts") -> None:
        if is_wanted is None:
            is_wanted = num_requests != 1 and sys.stderr.isatty()
        self._num_tokens = 0
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not is_wanted,
        )
        self._task = self._bar.add_task(what, total=num_requests, rate="")

    def advance(self, num_tokens: int, num_done: int, what: str | None = None) -> None:
        """So many tokens more, and so many prompts finished with them. `what` is shown before the bar from now on."""
        if self._bar.disable:
            return
        self._num_tokens += num_tokens
        elapsed = self._bar.tasks[0].elapsed or 0.0
        rate = f"{self._num_tokens / elapsed:,.0f} tokens/s" if elapsed and self._num_tokens else ""
        self._bar.update(self._task, advance=num_done, rate=rate, description=what)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
