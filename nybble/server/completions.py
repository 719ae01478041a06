"""`POST /v1/completions`: a body becomes an engine request for each prompt, their deltas pieces, and those chunks or a
whole.

`echo` with `logprobs` scores a prompt: the engine is asked for `prompt_logprobs` and at least one token, which is
dropped where the client wanted none.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from nybble.core.checks import shown
from nybble.core.request import Request
from nybble.server.auth import combined_salt
from nybble.server.body import read_body
from nybble.server.completion_pieces import PromptPieces, joined
from nybble.server.context import Context
from nybble.server.errors import bad_request
from nybble.server.fields import COMPLETION_FIELDS
from nybble.server.generation import generate
from nybble.server.job import Caller, Job, engine_id, response_id, usage_wishes
from nybble.server.protocol import CompletionRequest
from nybble.server.responses import CompletionBody, CompletionChoice
from nybble.server.sampling import sampling_of
from nybble.server.stream import event


def prepare(content: bytes, context: Context, caller: Caller) -> Job:
    """Read, check and encode. Computes only, so it may run in a thread.

    Raises:
        ApiError, RequestError: what is wrong.
    """
    body = read_body(content, CompletionRequest, COMPLETION_FIELDS)
    model = context.model_name(body.model)
    shows_usage, shows_usage_always = usage_wishes(body)
    wishes: dict[str, Any] = {"logprobs": body.logprobs, "max_tokens": context.max_tokens(body.max_tokens, 16)}
    scores_only = body.echo and body.max_tokens == 0
    if scores_only:
        wishes["max_tokens"] = 1
    if body.echo and body.logprobs is not None:
        wishes["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    params = sampling_of(body, context.builder, context.limits, context.ready().vocab_size, **wishes)
    context.check_priority(body.priority)
    prompts = _prompts(body.prompt, context)
    name = response_id("cmpl", body, caller)
    requests = []
    for prompt in prompts:
        text, token_ids = None, prompt
        if isinstance(prompt, str):
            context.check_length(prompt, "prompt")
            text, token_ids = prompt, context.tokenizer.encode(prompt, body.add_special_tokens)
        context.check_prompt(token_ids, "prompt")
        requests.append(
            Request(
                request_id=engine_id(name),
                prompt_token_ids=token_ids,
                prompt=text,
                params=params,
                priority=body.priority,
                cache_salt=combined_salt(caller.key_salt, body.cache_salt),
            )
        )
    return Job(
        response_id=name,
        model=model,
        requests=requests,
        streams=body.stream,
        shows_usage=shows_usage,
        shows_usage_always=shows_usage_always,
        shows_ids=body.return_token_ids,
        names_ids=body.return_tokens_as_token_ids,
        echoes=body.echo,
        shows_prompt_logprobs=body.prompt_logprobs is not None,
        drops_generated=scores_only,
    )


def _prompts(given: Any, context: Context) -> list[str] | list[list[int]]:
    """A prompt or several, each as text or as token ids."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if type(given[0]) is int and all(type(item) is int for item in given):
            _check_vocabulary(given, context)
            return [given]
        if len(given) > context.limits.max_prompts and not isinstance(given[0], int):
            raise bad_request(
                f"prompt may have at most {context.limits.max_prompts} prompts on this server, got {len(given)}",
                "prompt",
                "limit_exceeded",
            )
        if all(isinstance(item, str) for item in given):
            return given
        if all(isinstance(item, list) and item and all(type(part) is int for part in item) for item in given):
            for item in given:
                _check_vocabulary(item, context)
            return given
    raise bad_request(
        f"prompt must be a text, a list of texts, a list of token ids or a list of such lists, none of them empty; got "
        f"{shown(given)}",
        "prompt",
        "invalid_value",
    )


def _check_vocabulary(token_ids: list[int], context: Context) -> None:
    """Before anything decodes them, which fails on ids that no token has."""
    vocab_size = context.ready().vocab_size
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise bad_request(
                f"prompt holds {shown(token_id)}; token ids of this model are in [0, {vocab_size - 1}]",
                "prompt",
                "invalid_value",
            )


async def events(job: Job, context: Context) -> AsyncGenerator[bytes]:
    """The chunks as server-sent events; those of one step together."""
    prompts = [PromptPieces(job, context, index) for index in range(len(job.requests))]
    chunk = CompletionBody(job.response_id, "text_completion", job.created, job.model, [])
    async with aclosing(generate(job, context)) as news:
        async for index, deltas in news:
            sent: list[bytes] = []
            for delta in deltas:
                job.count(index, delta)
                for piece in prompts[index].take(delta):
                    chunk.choices, chunk.usage = [piece], job.chunk_usage()
                    sent.append(event(chunk))
            if sent:
                yield b"".join(sent)
    if job.shows_usage:
        chunk.choices, chunk.usage = [], job.usage()
        yield event(chunk)


async def whole(job: Job, context: Context) -> CompletionBody:
    """The response body, when all is there."""
    prompts = [PromptPieces(job, context, index) for index in range(len(job.requests))]
    num_choices = sum(request.params.n for request in job.requests)
    pieces: list[list[CompletionChoice]] = [[] for _ in range(num_choices)]
    async with aclosing(generate(job, context)) as news:
        async for index, deltas in news:
            for delta in deltas:
                job.count(index, delta)
                for piece in prompts[index].take(delta):
                    pieces[piece.index].append(piece)
    choices = [joined(index, parts) for index, parts in enumerate(pieces)]
    return CompletionBody(job.response_id, "text_completion", job.created, job.model, choices, job.usage())
