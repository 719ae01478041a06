"""`POST /v1/chat/completions`: a body becomes one engine request, its deltas pieces, and those chunks or a whole.

Chunks and whole bodies are made of the same pieces, so they cannot differ.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from msgspec import UNSET

from nybble.core.errors import RequestError
from nybble.core.outputs import SequenceDelta
from nybble.server.auth import combined_salt
from nybble.server.body import read_body
from nybble.server.context import Context
from nybble.server.errors import bad_request
from nybble.server.fields import CHAT_FIELDS
from nybble.server.generation import generate
from nybble.server.job import Caller, Job, engine_id, response_id, usage_wishes
from nybble.server.logprobs import LogprobShaper, prompt_logprobs_of
from nybble.server.protocol import ChatCompletionRequest
from nybble.server.responses import (
    ChatBody,
    ChatChoice,
    ChatChunkChoice,
    ChatLogprobs,
    Delta,
    Message,
)
from nybble.server.sampling import sampling_of
from nybble.server.stream import event
from nybble.server.templates import render


def prepare(content: bytes, context: Context, caller: Caller) -> Job:
    """Read, check, render and encode. Computes only, so it may run in a thread.

    Raises:
        ApiError, RequestError: what is wrong.
    """
    body = read_body(content, ChatCompletionRequest, CHAT_FIELDS)
    model = context.model_name(body.model)
    shows_usage, shows_usage_always = usage_wishes(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs = true", "top_logprobs", "invalid_value")
    if body.stream and body.prompt_logprobs is not None:
        raise bad_request("prompt_logprobs cannot be streamed", "prompt_logprobs", "invalid_value")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    max_tokens = context.max_tokens(max_tokens, None)  # unlike a completion, an answer may fill the context
    num_top = (body.top_logprobs or 0) if body.logprobs else None
    try:
        params = sampling_of(
            body, context.builder, context.limits, context.ready().vocab_size, max_tokens=max_tokens, logprobs=num_top
        )
    except RequestError as error:
        if error.parameter == "logprobs":
            raise RequestError(f"top_{error}", parameter="top_logprobs") from None
        if error.parameter == "max_tokens" and body.max_completion_tokens is not None:
            raise RequestError(str(error), parameter="max_completion_tokens") from None
        raise
    token_ids = render(body.messages, body, context.tokenizer)
    context.check_prompt(token_ids, "messages")
    name = response_id("chatcmpl", body, caller)
    request = context.builder.from_prompt(
        token_ids,
        params,
        request_id=engine_id(name),
        priority=body.priority,
        cache_salt=combined_salt(caller.key_salt, body.cache_salt),
    )
    return Job(
        response_id=name,
        model=model,
        requests=[request],
        streams=body.stream,
        shows_usage=shows_usage,
        shows_usage_always=shows_usage_always,
        shows_ids=body.return_token_ids,
        names_ids=body.return_tokens_as_token_ids,
    )


class _Answer:
    """One of the n choices, cut into pieces that are what a chunk shows of it."""

    def __init__(self, job: Job, context: Context, index: int) -> None:
        num_top = job.requests[0].params.logprobs
        self.index = index
        self._shows_ids = job.shows_ids
        self._shaper: LogprobShaper | None = None
        if num_top is not None:
            stream = context.tokenizer.open_stream(skip_special_tokens=False)
            self._shaper = LogprobShaper(context.tokenizer, stream, num_top, job.names_ids)

    def begin(self) -> ChatChunkChoice:
        return ChatChunkChoice(self.index, Delta(role="assistant", content=""))

    def take(self, delta: SequenceDelta) -> Iterator[ChatChunkChoice]:
        """What is new; the end is a piece of its own, for some clients read no text in it."""
        if delta.text or ((self._shaper or self._shows_ids) and delta.token_ids):
            piece = ChatChunkChoice(self.index, Delta(content=delta.text))
            if self._shaper is not None and delta.logprobs is not None:
                piece.logprobs = self._shaper.chat(delta.token_ids, delta.logprobs)
            if self._shows_ids:
                piece.token_ids = delta.token_ids
            yield piece
        if delta.finish_reason is not None:
            yield ChatChunkChoice(self.index, Delta(), finish_reason=delta.finish_reason, stop_reason=delta.stop_reason)


async def events(job: Job, context: Context) -> AsyncGenerator[bytes]:
    """The chunks as server-sent events; those of one step together."""
    request = job.requests[0]
    answers = [_Answer(job, context, index) for index in range(request.params.n)]
    chunk = ChatBody(job.response_id, "chat.completion.chunk", job.created, job.model, [])
    async with aclosing(generate(context.client, job.requests, context.admission)) as news:
        has_begun = False
        async for _, deltas in news:
            sent: list[bytes] = []
            if not has_begun:
                has_begun = True
                chunk.prompt_token_ids = request.prompt_token_ids if job.shows_ids else UNSET
                for answer in answers:
                    chunk.choices, chunk.usage = [answer.begin()], job.chunk_usage()
                    sent.append(event(chunk))
                    chunk.prompt_token_ids = UNSET
            for delta in deltas:
                job.count(0, delta)
                for piece in answers[delta.index].take(delta):
                    chunk.choices, chunk.usage = [piece], job.chunk_usage()
                    sent.append(event(chunk))
            if sent:
                yield b"".join(sent)
    if job.shows_usage:
        chunk.choices, chunk.usage = [], job.usage()
        yield event(chunk)


async def whole(job: Job, context: Context) -> ChatBody:
    """The response body, when all is there."""
    request = job.requests[0]
    answers = [_Answer(job, context, index) for index in range(request.params.n)]
    choices = [ChatChoice(index, Message("assistant", "")) for index in range(request.params.n)]
    texts: list[list[str]] = [[] for _ in choices]
    body = ChatBody(job.response_id, "chat.completion", job.created, job.model, choices)
    async with aclosing(generate(context.client, job.requests, context.admission)) as news:
        async for _, deltas in news:
            for delta in deltas:
                job.count(0, delta)
                if delta.prompt_logprobs is not None:
                    body.prompt_logprobs = prompt_logprobs_of(delta.prompt_logprobs)
                for piece in answers[delta.index].take(delta):
                    texts[delta.index].append(piece.delta.content or "")
                    _add(choices[delta.index], piece)
    for choice, parts in zip(choices, texts, strict=True):
        choice.message.content = "".join(parts)
    body.usage = job.usage()
    if job.shows_ids:
        body.prompt_token_ids = request.prompt_token_ids
    return body


def _add(choice: ChatChoice, piece: ChatChunkChoice) -> None:
    """All but the text."""
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
