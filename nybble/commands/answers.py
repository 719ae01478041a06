"""Writing answers in the order of their prompts, each as soon as those before it are out."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

import msgspec

if TYPE_CHECKING:
    from nybble.core.outputs import RequestOutput


def abort_unfinished(outputs: list[RequestOutput]) -> None:
    """What had not ended when a run was interrupted will bring no more; its readers must not wait for it."""
    for completion in (completion for output in outputs for completion in output.outputs):
        if not completion.finished:
            completion.finish_reason = "abort"


class JsonlWriter:
    """One `RequestOutput` a line, as JSON."""

    def __init__(self, sink: TextIO) -> None:
        self._sink = sink
        self._num_written = 0

    def advance(self, outputs: list[RequestOutput]) -> None:
        while self._num_written < len(outputs) and outputs[self._num_written].finished:
            self._write(outputs[self._num_written])

    def finish(self, outputs: list[RequestOutput]) -> None:
        """Write what is left, after an interrupt too."""
        for output in outputs[self._num_written :]:
            self._write(output)

    def _write(self, output: RequestOutput) -> None:
        self._sink.write(msgspec.json.encode(output).decode() + "\n")
        self._sink.flush()
        self._num_written += 1


class TextWriter:
    """The answers' text. The first unfinished answer is written while it grows.

    Several completions of a prompt get a headline each, for an answer may have many lines.

    Args:
        show_prompts: a headline for each prompt.
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
        """Write what is left, after an interrupt too; what had not even begun is left out then."""
        while self._current < len(outputs):
            completion = outputs[self._current].outputs[self._completion]
            if completion.finish_reason == "abort" and not completion.text and self._current + self._completion:
                self._next(outputs[self._current])
                continue
            self._write_new(outputs[self._current])
            self._end_completion(outputs[self._current])

    def _write_new(self, output: RequestOutput) -> None:
        completion = output.outputs[self._completion]
        if self._num_characters == 0 and not (completion.text or completion.finished):
            return
        if self._num_characters == 0 and (headline := self._headline(output)):
            self._sink.write(f"── {headline}\n")
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
        self._next(output)

    def _headline(self, output: RequestOutput) -> str:
        is_one_of_many = len(output.outputs) > 1
        parts = [f"prompt {self._current + 1}"] if self._show_prompts or is_one_of_many else []
        return ", ".join([*parts, f"completion {self._completion + 1}"] if is_one_of_many else parts)

    def _next(self, output: RequestOutput) -> None:
        self._num_characters = 0
        self._completion += 1
        if self._completion == len(output.outputs):
            self._completion = 0
            self._current += 1
