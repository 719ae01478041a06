"""`PartTeller`: what the clients of a part tell, as steps of a progress bar."""

from __future__ import annotations

from nybble.progress import Progress


class PartTeller:
    """Turns a part's totals into steps. Without a bar it tells nothing."""

    def __init__(self, bar: Progress | None = None) -> None:
        self.bar = bar
        self._part = ""
        self._told = (0, 0)

    def __call__(self, part: str, num_done: int, num_tokens: int) -> None:
        if self.bar is None:
            return
        if part != self._part:
            self._part, self._told = part, (0, 0)
        done, tokens = self._told
        self.bar.advance(max(0, num_tokens - tokens), max(0, num_done - done), part)
        self._told = (max(done, num_done), max(tokens, num_tokens))
