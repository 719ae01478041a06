"""`nybble generate`: prompts in, answers out; one prompt or a file of many, all batched together."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from nybble.commands.answers import JsonlWriter, TextWriter, abort_unfinished
from nybble.commands.imports import import_llm
from nybble.commands.options import ModelArgument, with_flags
from nybble.commands.prompts import PromptLine, from_texts, read_prompts
from nybble.core.errors import ConfigError

if TYPE_CHECKING:
    from nybble.core.outputs import RequestOutput
    from nybble.core.request import Request
    from nybble.llm import LLM


@with_flags()
def generate(
    model: ModelArgument,
    prompts: Annotated[list[str] | None, typer.Argument(help="One or more prompts.", show_default=False)] = None,
    input: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="File with a prompt a line; `.jsonl`: an object a line."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write here, not to standard output.")] = None,
    format: Annotated[
        Literal["text", "jsonl"] | None,
        typer.Option(help="What to write; default: jsonl if the output or the input is `.jsonl`, else text."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompts as they are: no chat template.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")] = False,
    *,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Answer prompts: arguments, the lines of a file, or standard input as one prompt.

    Prompts go through the model's chat template where it has one. Sampling is what the checkpoint recommends, with at
    most 256 tokens, unless flags say otherwise.

    A line of a `.jsonl` file is an object with `prompt`, `messages` or `prompt_token_ids`; it may also have
    `request_id`, `priority`, `cache_salt` and any sampling parameter, which then wins over the flag. JSONL output has
    one object a line, in the order of the prompts.
    """
    lines = _collect(prompts or [], input)
    is_jsonl = format == "jsonl" if format else any(path and path.suffix == ".jsonl" for path in (output, input))
    for line in lines:
        line.check(sampling)  # bad input shows before a large model is loaded
    if is_jsonl and output is None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")  # JSON is, whatever the terminal is
    with _open(output) as sink, import_llm()(model, **engine) as llm:
        requests = [line.request(llm.requests, sampling, raw=raw) for line in lines]
        _empty(sink)  # only now: input that a model refuses must not cost the answers of an earlier run
        show_prompts = len(requests) > 1 and output is None and sys.stdout.isatty()
        writer = JsonlWriter(sink) if is_jsonl else TextWriter(sink, show_prompts=show_prompts)
        failed = _run(llm, requests, writer, quiet=quiet, shows_answers=output is None)
    if failed:
        print(f"error: {failed} of {len(requests)} prompts failed; see their `error`", file=sys.stderr)
        raise typer.Exit(1)


def _collect(prompts: list[str], input: Path | None) -> list[PromptLine]:
    if prompts and input:
        raise ConfigError("prompts were given both as arguments and by --input; give one of them")
    if prompts:
        return from_texts(prompts)
    if input is None and sys.stdin.isatty():
        raise ConfigError("no prompt: give one as an argument, a file by --input, or pipe text in")
    lines = read_prompts(input)
    if not lines:
        raise ConfigError(f"{input or 'standard input'} holds no prompt")
    return lines


def _run(
    llm: LLM, requests: list[Request], writer: JsonlWriter | TextWriter, *, quiet: bool, shows_answers: bool
) -> int:
    """Serve, write in order, say how fast it was. Returns how many failed."""
    from nybble.core.outputs import RequestOutput
    from nybble.progress import Progress

    outputs = [RequestOutput.begin(request) for request in requests]
    by_id = {output.request_id: output for output in outputs}
    begin = time.perf_counter()
    # A bar would cut through answers on the same terminal.
    is_bar_wanted = False if quiet or (shows_answers and sys.stdout.isatty()) else None
    try:
        with Progress(len(requests), is_bar_wanted) as bar:
            for deltas in llm.run(requests, raise_refused=False):
                for delta in deltas:
                    output = by_id[delta.request_id]
                    output.add(delta)
                    bar.advance(len(delta.token_ids), int(delta.finish_reason is not None and output.finished))
                writer.advance(outputs)
    finally:
        abort_unfinished(outputs)
        writer.finish(outputs)  # after Ctrl-C, too: what is there is kept
    if not quiet:
        print(summary(outputs, time.perf_counter() - begin), file=sys.stderr)
    return sum(any(completion.error for completion in output.outputs) for output in outputs)


def summary(outputs: list[RequestOutput], seconds: float) -> str:
    """One line: how much, how fast, how long until the first token."""
    completions = [completion for output in outputs for completion in output.outputs]
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    waits = sorted(
        wait for c in completions if c.timing is not None and (wait := c.timing.time_to_first_token_s) is not None
    )
    first = f", time to first token {waits[len(waits) // 2] * 1e3:.0f} ms" if waits else ""
    median = " (median)" if len(waits) > 1 else ""
    prompts = f"{len(outputs)} prompt{'s' if len(outputs) != 1 else ''}"
    return f"{prompts}, {num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:,.1f} tokens/s{first}{median}"


@contextmanager
def _open(path: Path | None) -> Iterator[TextIO]:
    """A bad path shows before a model is loaded; what the file holds stays for now."""
    if path is None:
        yield sys.stdout
        return
    try:
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror}") from None
    with file:
        yield file


def _empty(sink: TextIO) -> None:
    if sink is not sys.stdout and stat.S_ISREG(os.fstat(sink.fileno()).st_mode):  # a pipe or a device has no length
        sink.truncate(0)
