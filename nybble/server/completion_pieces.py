"""Pieces of completions: what a chunk shows of a choice. A whole choice is its pieces joined, so both say the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec import UNSET

from nybble.core.outputs import SequenceDelta, TokenLogprobs
from nybble.core.request import Request
from nybble.server.context import Context
from nybble.server.job import Job
from nybble.server.logprobs import LogprobShaper, prompt_logprobs_of
from nybble.server.responses import CompletionChoice, CompletionLogprobs


class PromptPieces:
    """One prompt's n choices, cut into pieces that are what a chunk shows of them.

    The engine tells a prompt's log-probabilities once, with the first completion. Where they are to be echoed, what
    comes of the others before is held back.
    """

    def __init__(self, job: Job, context: Context, index: int) -> None:
        self._request = job.requests[index]
        num_choices = self._request.params.n
        self._choices = [_Choice(job, context, self._request, index * num_choices + i) for i in range(num_choices)]
        self._held: list[SequenceDelta] = []
        self._waits = job.echoes and self._request.params.logprobs is not None
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None

    def take(self, delta: SequenceDelta) -> Iterator[CompletionChoice]:
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
        if self._waits:
            self._held.append(delta)
            # An aborted completion may end without having told them.
            if self._prompt_logprobs is None and not (delta.index == 0 and delta.finish_reason):
                return
            self._waits = False
            for held in self._held:
                yield from self._choices[held.index].take(held, self._prompt_logprobs)
        else:
            yield from self._choices[delta.index].take(delta, self._prompt_logprobs)


class _Choice:
    def __init__(self, job: Job, context: Context, request: Request, index: int) -> None:
        self.index = index
        self._job = job
        self._context = context
        self._request = request
        self._has_begun = False
        self._shaper: LogprobShaper | None = None
        params = request.params
        if params.logprobs is not None:
            stream = context.tokenizer.open_stream(
                skip_special_tokens=params.skip_special_tokens,
                prompt_token_ids=() if job.echoes else request.prompt_token_ids,
            )
            self._shaper = LogprobShaper(context.tokenizer, stream, params.logprobs, job.names_ids)

    def take(
        self, delta: SequenceDelta, prompt_logprobs: list[TokenLogprobs | None] | None
    ) -> Iterator[CompletionChoice]:
        """What is new; the end is a piece of its own, for some clients read no text in it."""
        job = self._job
        if not self._has_begun:
            self._has_begun = True
            yield from self._begin(prompt_logprobs)
        shows_tokens = (self._shaper or job.shows_ids) and delta.token_ids
        if not job.drops_generated and (delta.text or shows_tokens):
            piece = CompletionChoice(self.index, delta.text)
            if self._shaper is not None and delta.logprobs is not None:
                piece.logprobs = self._shaper.completion(delta.token_ids, delta.logprobs)
            if job.shows_ids:
                piece.token_ids = delta.token_ids
            yield piece
        if delta.finish_reason is not None:
            piece = CompletionChoice(self.index, "", finish_reason=delta.finish_reason, stop_reason=delta.stop_reason)
            if job.drops_generated and delta.finish_reason == "stop":
                piece.finish_reason, piece.stop_reason = "length", None
            yield piece

    def _begin(self, prompt_logprobs: list[TokenLogprobs | None] | None) -> Iterator[CompletionChoice]:
        """The prompt, as far as the client wants it back."""
        job, request = self._job, self._request
        piece = CompletionChoice(self.index, "")
        if job.echoes:
            piece.text = request.prompt or self._context.tokenizer.decode(
                request.prompt_token_ids, skip_special_tokens=request.params.skip_special_tokens
            )
            if self._shaper is not None and prompt_logprobs is not None:
                piece.logprobs = self._shaper.completion(request.prompt_token_ids, prompt_logprobs)
        if job.shows_ids:
            piece.prompt_token_ids = request.prompt_token_ids
            piece.token_ids = []
        if job.shows_prompt_logprobs and prompt_logprobs is not None:
            piece.prompt_logprobs = prompt_logprobs_of(prompt_logprobs)
        if job.echoes or job.shows_ids or job.shows_prompt_logprobs:
            yield piece


def joined(index: int, pieces: Iterable[CompletionChoice]) -> CompletionChoice:
    choice = CompletionChoice(index, "", stop_reason=None)
    texts = []
    for piece in pieces:
        texts.append(piece.text)
        if piece.logprobs is not None:
            choice.logprobs = choice.logprobs or CompletionLogprobs()
            choice.logprobs.extend(piece.logprobs)
        if piece.token_ids is not UNSET:
            choice.token_ids = [] if choice.token_ids is UNSET else choice.token_ids
            choice.token_ids.extend(piece.token_ids)
        if piece.prompt_token_ids is not UNSET:
            choice.prompt_token_ids = piece.prompt_token_ids
        if piece.prompt_logprobs is not UNSET:
            choice.prompt_logprobs = piece.prompt_logprobs
        if piece.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason
    choice.text = "".join(texts)
    return choice
