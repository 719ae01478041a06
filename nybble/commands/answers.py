"""Writing answers in the order of their prompts, each as soon as those before it are out."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

import msgspec

if TYPE_CHECKING:
    from nybble.core.outputs import RequestOutput


class JsonlWriter:
    """One `RequestOutput` a line, as JSON."""

    def __init__(self, sink: TextIO) -> None:
        self._sink = sink
        self._num_written = 0

    def advance(self, outputs: list[RequestOutput]) -> None:
        while self._num_written < len(outputs) and outputs[self._num_written].finished:
            self._write(outputs[self._num_written])

    def finish(self, outputs: list[RequestOutput]) -> None:
        """After an interrupt some have not ended; what they have is written with `finish_reason` null."""
        for output in outputs[self._num_written :]:
            self._write(output)

    def _write(self, output: RequestOutput) -> None:
        self._sink.write(msgspec.json.encode(output).decode() + "\n")
        self._sink.flush()
        self._num_written += 1


class TextWriter:
    """The answers' text. The first unfinished answer is written while it grows.

    Args:
        show_prompts: put each prompt above its answer.
    """

    def __init__(self, sink: TextIO, *, show_prompts: bool) -> None:
        self._sink = sink
        self._show_prompts = show_prompts
        self._current = 0  # the output being written
        self._completion = 0  # its completion being written
        self._num_characters = 0  # of that completion already written

    def advance(self, outputs: list[RequestOutput]) -> None:
        while self._current < len(outputs):
            output = outputs[self._current]
            self._write_new(output)
            if not output.outputs[self._completion].finished:
                return
            self._end_completion(output)

    def finish(self, outputs: list[RequestOutput]) -> None:
        """Write what is left, after an interrupt too."""
        while self._current < len(outputs):
            self._write_new(outputs[self._current])
            self._end_completion(outputs[self._current])

    def _write_new(self, output: RequestOutput) -> None:
        completion = output.outputs[self._completion]
        if self._num_characters == 0 and not (completion.text or completion.finished):
            return
        if self._num_characters == 0 and self._show_prompts and self._completion == 0:
            self._sink.write(f"── prompt {self._current + 1}\n")
        new = completion.text[self._num_characters :]
        self._num_characters += len(new)
        if new:
            self._sink.write(new)
            self._sink.flush()

    def _end_completion(self, output: RequestOutput) -> None:
        completion = output.outputs[self._completion]
        if completion.error:
            self._sink.write(f"[error: {completion.error}]")
        self._sink.write("\n")
        self._sink.flush()
        self._num_characters = 0
        self._completion += 1
        if self._completion == len(output.outputs):
            self._completion = 0
            self._current += 1
