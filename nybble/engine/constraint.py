"""What the engine needs of grammars, and `PendingGrammars`: the sequences that wait until theirs is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, NamedTuple, Protocol

from nybble.core.errors import RequestError
from nybble.core.structured import Reasoning, StructuredOutputs

if TYPE_CHECKING:
    from nybble.engine.sequence import Sequence

WAIT_SECONDS = 0.005
"""While there is nothing else to do: whoever drives the engine looks for new requests in between."""


class Matcher(Protocol):
    """Where one completion stands in its grammar."""

    @property
    def mask(self) -> bytes | None: ...  # as `Row.mask`; None allows every token
    @property
    def is_finished(self) -> bool: ...  # no token may come any more

    def accept(self, token_id: int) -> None:
        """Raises ValueError where the completion cannot go on."""


class Grammar(Protocol):
    def open(self, reasoning: Reasoning | None = None) -> Matcher: ...


class GrammarSource(Protocol):
    def compile(self, form: StructuredOutputs) -> Future[Grammar]: ...

    def close(self) -> None: ...


class _Waiting(NamedTuple):
    sequences: list[Sequence]
    form: StructuredOutputs
    grammar: Future[Grammar]


class PendingGrammars:
    """Owns: which sequences wait. Args: source: None cannot compile anything."""

    def __init__(self, source: GrammarSource | None) -> None:
        self._source = source
        self._waiting: dict[str, _Waiting] = {}  # by request id

    @property
    def num_sequences(self) -> int:
        return sum(len(waiting.sequences) for waiting in self._waiting.values())

    def check(self, form: StructuredOutputs | None) -> None:
        """
        Raises:
            RequestError: this engine has no compiler.
        """
        if form is not None and self._source is None:
            raise RequestError(
                f"{form.source} needs a tokenizer whose tokens spell bytes (byte-level BPE, or SentencePiece with byte "
                f"fallback), and this engine has none",
                parameter=form.source,
            )

    def ask(self, sequences: list[Sequence]) -> None:
        """Have the grammar of a request's sequences made."""
        request = sequences[0].request
        form = request.params.structured_outputs
        assert form is not None
        assert self._source is not None
        self._waiting[request.request_id] = _Waiting(sequences, form, self._source.compile(form))

    def take(self) -> Iterator[tuple[list[Sequence], RequestError | None]]:
        """The sequences that wait no longer: their matchers are set, or the error says why there are none."""
        done = [request_id for request_id, waiting in self._waiting.items() if waiting.grammar.done()]
        for request_id in done:
            sequences, form, future = self._waiting.pop(request_id)
            try:
                grammar = future.result()
                for sequence in sequences:
                    sequence.matcher = grammar.open(form.reasoning)
            except Exception as error:  # native code's may be of any kind, and concern this request alone
                # It is shared by all who asked for this form, whatever their field's name.
                yield sequences, RequestError(f"{form.source}: {error}", parameter=form.source)
            else:
                yield sequences, None

    def drop(self, sequence: Sequence) -> bool:
        """Wait no longer for a sequence's grammar. False: it did not wait."""
        request_id = sequence.request.request_id
        waiting = self._waiting.get(request_id)
        if waiting is None or sequence not in waiting.sequences:
            return False
        waiting.sequences.remove(sequence)
        if not waiting.sequences:
            del self._waiting[request_id]
        return True

    def wait(self) -> None:
        """Until a grammar is there, or for a moment."""
        if self._waiting:
            wait([waiting.grammar for waiting in self._waiting.values()], WAIT_SECONDS, FIRST_COMPLETED)

    def close(self) -> None:
        self._waiting.clear()
        if self._source is not None:
            self._source.close()
