"""The compiling process: `python -m nybble.grammar.worker` reads forms from standard input and writes grammars.

A form is what a stranger sent, and compiling it is native code that no one can interrupt. So it happens here, where
the kernel ends what takes too long (an alarm) or too much memory (a limit): nothing but this process dies of it. Leaves
when standard input ends. Runs at a low priority, for the engine's thread must not wait for a core.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import tempfile
import time
from typing import BinaryIO

import numpy as np

from nybble.core.structured import StructuredOutputs
from nybble.grammar import messages
from nybble.grammar.light import import_xgrammar

MAX_MORE_MEMORY_BYTES = 2**31
MAX_GRAMMAR_BYTES = 2**26
TRIED_TOKENS = 64
MAX_TRIED_SECONDS = 0.32
NICENESS = 10
MAX_WHITESPACE = 13
"""Between two parts of JSON: a line break and three levels of indentation. Without a limit models may write blanks
forever; with a higher one grammars take more memory."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal
    os.nice(NICENESS)
    source = sys.stdin.buffer
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the messages
    begin = _read(source)
    assert isinstance(begin, messages.Begin)
    import_xgrammar()
    compiler = Compiler(begin.vocabulary)
    _limit_memory()
    _write(sink, messages.Started())
    while (message := _read(source)) is not None:
        assert isinstance(message, messages.Compile)
        signal.setitimer(signal.ITIMER_REAL, begin.seconds)  # its default is to end the process
        answer = compiler.compile(message.form)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(sink, answer)


class Compiler:
    """Makes grammars for one vocabulary."""

    def __init__(self, vocabulary: messages.Vocabulary) -> None:
        import xgrammar

        self._xgrammar = xgrammar
        self._compiler = xgrammar.GrammarCompiler(vocabulary.info(), max_threads=2, cache_enabled=False)

    def compile(self, form: StructuredOutputs) -> messages.Compiled | messages.Rejected:
        try:
            with _Warnings() as warnings:
                grammar = self._grammar(form)
                text = grammar.serialize_json().encode()
        except Exception as error:  # xgrammar raises RuntimeError, and others for structural tags
            is_memory = isinstance(error, MemoryError) or "bad_alloc" in str(error)
            return messages.Rejected("it needs too much memory" if is_memory else _first_line(str(error)))
        if warnings.text:  # it would have ignored a part of what was asked
            return messages.Rejected(_first_line(warnings.text))
        if len(text) > MAX_GRAMMAR_BYTES:
            return messages.Rejected(f"compiled it has {len(text)} bytes; at most {MAX_GRAMMAR_BYTES} are allowed")
        if (reason := self._try_out(grammar)) is not None:
            return messages.Rejected(reason)
        return messages.Compiled(text)

    def _grammar(self, form: StructuredOutputs):  # type: ignore[no-untyped-def]
        compiler, text = self._compiler, form.text
        spaces = {"any_whitespace": not form.disable_any_whitespace}
        if form.disable_any_whitespace:
            spaces["separators"] = (",", ":")
        else:
            spaces["max_whitespace_cnt"] = MAX_WHITESPACE
        match form.kind:
            case "json":
                return compiler.compile_json_schema(text, **spaces)
            case "json_object":
                return compiler.compile_json_schema('{"type": "object"}', **spaces)
            case "regex":
                return compiler.compile_regex(text)
            case "choice":
                texts = [{"type": "const_string", "value": choice} for choice in form.choice or ()]
                tag = {"type": "structural_tag", "format": {"type": "or", "elements": texts}}
                return compiler.compile_structural_tag(tag)
            case "grammar":
                is_lark = "::=" not in text
                return compiler.compile_lark(text) if is_lark else compiler.compile_grammar(text)
        return compiler.compile_structural_tag(text)

    def _try_out(self, grammar) -> str | None:  # type: ignore[no-untyped-def]
        """Follow the grammar along random tokens. Returns what is wrong with it: it leads nowhere, or is too slow.

        A token costs some 0.1 ms; of ambiguous grammars a thousand times that, all of it in the engine's thread.
        """
        mask = np.zeros((1, -(-grammar.tokenizer_info.vocab_size // 32)), dtype=np.int32)
        choose = random.Random(0)
        begin = time.thread_time()
        matcher = None
        for _ in range(TRIED_TOKENS):
            if matcher is None or matcher.is_terminated():
                matcher = self._xgrammar.GrammarMatcher(grammar)
            mask.fill(-1)
            matcher.fill_next_token_bitmask(mask)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            if not len(allowed):
                return "no text has this form"
            matcher.accept_token(int(choose.choice(allowed)))
            if time.thread_time() - begin > MAX_TRIED_SECONDS:
                return "it is too ambiguous: finding the tokens that may follow takes too long"
        return None


class _Warnings:
    """Catches what native code writes to standard error, which is where xgrammar says what it leaves out."""

    def __enter__(self) -> _Warnings:
        self.text = ""
        self._file = tempfile.TemporaryFile()
        self._stderr = os.dup(2)
        os.dup2(self._file.fileno(), 2)
        return self

    def __exit__(self, *_: object) -> None:
        os.dup2(self._stderr, 2)
        os.close(self._stderr)
        self._file.seek(0)
        self.text = self._file.read(4096).decode(errors="replace")
        self._file.close()


def _first_line(text: str) -> str:
    """Without the time and the place in xgrammar's source that it begins with."""
    line = next((line for line in text.splitlines() if line.strip()), "it cannot be compiled")
    if line.startswith("["):
        line = line.partition("] ")[2].partition(": ")[2]
    return line.removeprefix("Warning: ")[:400]


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_MORE_MEMORY_BYTES, resource.RLIM_INFINITY))


def _read(source: BinaryIO) -> messages.ToWorker | None:
    header = source.read(messages.LENGTH_BYTES)
    if len(header) < messages.LENGTH_BYTES:
        return None
    return messages.decode_to_worker(source.read(int.from_bytes(header, "little")))


def _write(sink: BinaryIO, message: messages.FromWorker) -> None:
    sink.write(messages.encode(message))
    sink.flush()


if __name__ == "__main__":
    main()
