"""`Answers`: the n choices of a chat, cut into pieces. Chunks and whole bodies are made of the same pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec import UNSET

from nybble.core.outputs import SequenceDelta
from nybble.server.context import Context
from nybble.server.job import Job
from nybble.server.logprobs import LogprobShaper
from nybble.server.reading import Reader, add_call
from nybble.server.responses import ChatChoice, ChatChunkChoice, ChatLogprobs, Delta, Message


class Answers:
    """Owns: which choices have ended, and what is counted as used."""

    def __init__(self, job: Job, context: Context) -> None:
        self._job = job
        self._all = [_Answer(job, context, index) for index in range(job.requests[0].params.n)]

    def begin(self) -> Iterator[ChatChunkChoice]:
        """The first piece of each choice."""
        for answer in self._all:
            yield answer.begin()

    def take(self, delta: SequenceDelta) -> Iterable[ChatChunkChoice]:
        """The pieces that are new. What the engine adds to a choice that was cut is dropped, and not counted."""
        answer = self._all[delta.index]
        if answer.has_ended:
            answer.is_cut = answer.is_cut and delta.finish_reason is None
            return ()
        self._job.count(0, delta)
        return answer.take(delta)

    @property
    def are_cut(self) -> bool:
        """All have ended, but the engine still works on one."""
        if self._job.reading.parallel:
            return False
        return any(answer.is_cut for answer in self._all) and all(answer.has_ended for answer in self._all)


class _Answer:
    """One choice; its pieces are what a chunk shows of it."""

    def __init__(self, job: Job, context: Context, index: int) -> None:
        num_top = job.requests[0].params.logprobs
        self.index = index
        self.has_ended = False
        self.is_cut = False  # it has ended, and the engine does not know
        self._reading = job.reading
        self._reader = None if job.reading.is_plain else Reader(job.reading)
        self._shows_ids = job.shows_ids
        self._shaper: LogprobShaper | None = None
        if num_top is not None:
            stream = context.tokenizer.open_stream(skip_special_tokens=False)
            self._shaper = LogprobShaper(context.tokenizer, stream, num_top, job.names_ids)

    def begin(self) -> ChatChunkChoice:
        """Where calls or reasoning may come, there may be no content at all."""
        return ChatChunkChoice(self.index, Delta(role="assistant", content="" if self._reader is None else None))

    def take(self, delta: SequenceDelta) -> Iterator[ChatChunkChoice]:
        """The end is a piece of its own, for some clients read no text in it."""
        is_first = True
        shows_tokens = (self._shaper or self._shows_ids) and delta.token_ids
        said_now: Iterable[Delta] = ()
        self.has_ended = delta.finish_reason is not None
        if self._reader is not None:
            said_now = self._read(self._reader, delta) or ((Delta(),) if shows_tokens else ())
        elif delta.text or shows_tokens:
            said_now = (Delta(content=delta.text),)
        for said in said_now:
            piece = ChatChunkChoice(self.index, said)
            if is_first:  # all tokens of the step are shown with the first piece
                is_first = False
                if self._shaper is not None and delta.logprobs is not None:
                    piece.logprobs = self._shaper.chat(delta.token_ids, delta.logprobs)
                if self._shows_ids:
                    piece.token_ids = delta.token_ids
            yield piece
        if self.has_ended:
            yield ChatChunkChoice(
                self.index, Delta(), finish_reason=self._finish_reason(delta), stop_reason=self._stop_reason(delta)
            )

    def _read(self, reader: Reader, delta: SequenceDelta) -> list[Delta]:
        said = list(reader.push(delta.text))
        if reader.is_done and not self.has_ended:
            self.has_ended = self.is_cut = True
        if self.has_ended:
            said += reader.finish()
        return said

    def _finish_reason(self, delta: SequenceDelta) -> str | None:
        """An answer that was cut off by its length says so, whatever is in it: its last call may be half of one."""
        reader = self._reader
        if reader is not None and reader.has_calls and (reader.is_done or delta.finish_reason == "stop"):
            return "stop" if self._reading.names_call else "tool_calls"
        return delta.finish_reason

    def _stop_reason(self, delta: SequenceDelta) -> int | str | None:
        return None if delta.stop_reason in self._reading.stop_token_ids else delta.stop_reason


class WholeChoice:
    """Joins the pieces of one choice."""

    def __init__(self, index: int) -> None:
        self._choice = ChatChoice(index, Message("assistant", ""))
        self._content: list[str] = []
        self._reasoning: list[str] = []

    def add(self, piece: ChatChunkChoice) -> None:
        choice, said = self._choice, piece.delta
        if isinstance(said.content, str):
            self._content.append(said.content)
        if isinstance(said.reasoning_content, str):
            self._reasoning.append(said.reasoning_content)
        if said.tool_calls is not UNSET:
            if choice.message.tool_calls is UNSET:
                choice.message.tool_calls = []
            for call in said.tool_calls:
                add_call(choice.message.tool_calls, call)
        if piece.logprobs is not None:
            choice.logprobs = choice.logprobs or ChatLogprobs([])
            choice.logprobs.content.extend(piece.logprobs.content)
        if piece.token_ids is not UNSET:
            if choice.token_ids is UNSET:
                choice.token_ids = []
            choice.token_ids.extend(piece.token_ids)
        if piece.finish_reason is not None:
            choice.finish_reason = piece.finish_reason
            choice.stop_reason = None if piece.stop_reason is UNSET else piece.stop_reason

    def join(self) -> ChatChoice:
        message = self._choice.message
        if self._reasoning:
            message.reasoning_content = "".join(self._reasoning)
        has_else = self._reasoning or message.tool_calls is not UNSET
        message.content = None if has_else and not self._content else "".join(self._content)
        return self._choice
