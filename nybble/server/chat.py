"""`POST /v1/chat/completions`: a body becomes one engine request, its deltas pieces, and those chunks or a whole.

Chunks and whole bodies are made of the same pieces, so they cannot differ.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from msgspec import UNSET
from msgspec.structs import replace

from nybble.core.errors import RequestError
from nybble.core.sampling import SamplingParams
from nybble.server.answer import Answers, WholeChoice
from nybble.server.auth import combined_salt
from nybble.server.body import read_body
from nybble.server.chat_format import THINK_TAGS
from nybble.server.context import Context
from nybble.server.errors import bad_request
from nybble.server.fields import CHAT_FIELDS
from nybble.server.forms import chat_form
from nybble.server.generation import generate
from nybble.server.job import Caller, Job, engine_id, response_id, usage_wishes
from nybble.server.logprobs import prompt_logprobs_of
from nybble.server.protocol import ChatCompletionRequest
from nybble.server.reading import Reading
from nybble.server.responses import ChatBody
from nybble.server.sampling import sampling_of
from nybble.server.stream import event
from nybble.server.templates import render
from nybble.server.tools import ToolWishes, tool_wishes
from nybble.text.reasoning import opens_thinking


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
    context.check_priority(body.priority)
    wishes = tool_wishes(body, context.chat_format)
    prompt = render(body.messages, body, context, wishes.tools)
    context.check_prompt(prompt.token_ids, "messages")
    reading = _reading_of(body, context, wishes, prompt.text)
    name = response_id("chatcmpl", body, caller)
    request = context.builder.from_prompt(
        prompt.token_ids,
        _adapted(params, context, wishes, reading, prompt.text),
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
        reading=reading,
    )


def _reading_of(body: ChatCompletionRequest, context: Context, wishes: ToolWishes, prompt: str) -> Reading:
    thinks = context.chat_format.may_think
    parses = wishes.plan.parses
    ends = (context.tokenizer.backend.token_to_id(token) for token in wishes.plan.stop_tokens)
    return Reading(
        tool_calls=context.chat_format.tool_calls if parses else None,
        tools=tuple(wishes.tools),
        parallel=body.parallel_tool_calls,
        may_think=thinks,
        is_thinking=thinks and (opens_thinking(prompt) or _continues_thinking(body)),
        stop_token_ids=frozenset(token_id for token_id in ends if token_id is not None)
        - frozenset(body.stop_token_ids or ()),
        names_call=wishes.names_call,
    )


def _continues_thinking(body: ChatCompletionRequest) -> bool:
    """Whether the message that the answer goes on with is still in its reasoning."""
    content = body.messages[-1].get("content")
    begin, end = THINK_TAGS
    return body.continue_final_message and isinstance(content, str) and content.rfind(begin) > content.rfind(end)


def _adapted(
    params: SamplingParams, context: Context, wishes: ToolWishes, reading: Reading, prompt: str
) -> SamplingParams:
    """With the ends and the tags that reading the answer needs, and the form that its tools ask for."""
    changes: dict[str, Any] = {}
    if reading.stop_token_ids and not params.ignore_eos:
        changes["stop_token_ids"] = [*(params.stop_token_ids or ()), *sorted(reading.stop_token_ids)]
    tags = (*wishes.plan.tags, *(THINK_TAGS if reading.may_think else ()))
    if any(context.tokenizer.backend.token_to_id(tag) in context.tokenizer.special_ids for tag in tags):
        changes["skip_special_tokens"] = False
    form = chat_form(params.structured_outputs, wishes, reading, prompt)
    if form is not None:
        changes["structured_outputs"] = form
    return replace(params, **changes) if changes else params


async def events(job: Job, context: Context) -> AsyncGenerator[bytes]:
    """The chunks as server-sent events; those of one step together."""
    request = job.requests[0]
    answers = Answers(job, context)
    chunk = ChatBody(job.response_id, "chat.completion.chunk", job.created, job.model, [])
    async with aclosing(generate(job, context)) as news:
        has_begun = False
        async for _, deltas in news:
            sent: list[bytes] = []
            if not has_begun:
                has_begun = True
                chunk.prompt_token_ids = request.prompt_token_ids if job.shows_ids else UNSET
                for piece in answers.begin():
                    chunk.choices, chunk.usage = [piece], job.chunk_usage()
                    sent.append(event(chunk))
                    chunk.prompt_token_ids = UNSET
            for delta in deltas:
                for piece in answers.take(delta):
                    chunk.choices, chunk.usage = [piece], job.chunk_usage()
                    sent.append(event(chunk))
            if sent:
                yield b"".join(sent)
            if answers.are_cut:
                _finish(job, context)
                break
    if job.shows_usage:
        chunk.choices, chunk.usage = [], job.usage()
        yield event(chunk)


async def whole(job: Job, context: Context) -> ChatBody:
    """The response body, when all is there."""
    request = job.requests[0]
    answers = Answers(job, context)
    choices = [WholeChoice(index) for index in range(request.params.n)]
    body = ChatBody(job.response_id, "chat.completion", job.created, job.model, [])
    async with aclosing(generate(job, context)) as news:
        async for _, deltas in news:
            for delta in deltas:
                if delta.prompt_logprobs is not None:
                    body.prompt_logprobs = prompt_logprobs_of(delta.prompt_logprobs)
                for piece in answers.take(delta):
                    choices[delta.index].add(piece)
            if answers.are_cut:
                _finish(job, context)
                break
    body.choices = [choice.join() for choice in choices]
    body.usage = job.usage()
    if job.shows_ids:
        body.prompt_token_ids = request.prompt_token_ids
    return body


def _finish(job: Job, context: Context) -> None:
    """The answer is complete before the engine knows: it is counted as what the client is told, not as aborted."""
    context.client.finish(job.requests[0].request_id)
    job.finish_reasons.add("stop")
