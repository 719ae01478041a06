"""`POST /tokenize` and `/detokenize`, with vLLM's fields."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from nybble.core.checks import shown
from nybble.server.body import read_body
from nybble.server.context import Context
from nybble.server.errors import bad_request
from nybble.server.fields import CHAT_FIELDS
from nybble.server.protocol import DetokenizeRequest, TokenizeRequest
from nybble.server.templates import render
from nybble.server.tools import tool_wishes


class Tokens(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType | None = UNSET


class Text(msgspec.Struct):
    prompt: str


def tokenize(content: bytes, context: Context) -> Tokens:
    body = read_body(content, TokenizeRequest, CHAT_FIELDS)
    context.model_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either prompt or messages", "prompt", "invalid_value")
    if body.prompt is not None:
        context.check_length(body.prompt, "prompt")
        adds_special_tokens = body.add_special_tokens is not False
        token_ids = context.tokenizer.encode(body.prompt, add_special_tokens=adds_special_tokens)
    else:
        tools = tool_wishes(body, context.chat_format).tools
        token_ids = render(body.messages, body, context, tools).token_ids
    tokens = Tokens(len(token_ids), context.ready().max_model_len, token_ids)
    if body.return_token_strs:
        tokens.token_strs = [context.tokenizer.token_text(token_id) for token_id in token_ids]
    return tokens


def detokenize(content: bytes, context: Context) -> Text:
    body = read_body(content, DetokenizeRequest, {})
    context.model_name(body.model)
    vocab_size = context.ready().vocab_size
    for token_id in body.tokens:
        if not 0 <= token_id < vocab_size:
            raise bad_request(
                f"tokens holds {shown(token_id)}; token ids of this model are in [0, {vocab_size - 1}]",
                "tokens",
                "invalid_value",
            )
    return Text(context.tokenizer.decode(body.tokens, skip_special_tokens=False))
