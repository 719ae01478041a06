"""Messages as clients send them → the text that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from nybble.server.context import Context
from nybble.server.errors import bad_request
from nybble.server.messages import checked_messages
from nybble.server.protocol import TemplateFields
from nybble.text.tokenizer import NAMED_TOKENS
from nybble.text.tool_calls import Tool

RESERVED = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "tokenize",
        "self",
        "raise_exception",
        "strftime_now",
        *NAMED_TOKENS,
    }
)
"""Template variables that are not a client's to set."""


class Rendered(NamedTuple):
    text: str
    token_ids: list[int]


def render(messages: Any, fields: TemplateFields, context: Context, tools: Sequence[Tool]) -> Rendered:
    """A conversation as the model reads it.

    Raises:
        ApiError, RequestError: the messages, or what is wished for the template, are not sound.
    """
    variables = fields.chat_template_kwargs or {}
    for name in variables.keys() & RESERVED:
        raise bad_request(
            f"chat_template_kwargs cannot set {name}: the server does", "chat_template_kwargs", "invalid_value"
        )
    # vLLM and OpenAI's clients leave add_generation_prompt out where they ask for a message to be continued.
    begins_answer = fields.add_generation_prompt
    text = context.tokenizer.render_chat(
        checked_messages(messages, context.limits),
        add_generation_prompt=not fields.continue_final_message if begins_answer is None else begins_answer,
        continue_final_message=fields.continue_final_message,
        tools=tools or None,
        **variables,
    )
    context.check_length(text, "messages")
    return Rendered(text, context.tokenizer.encode(text, add_special_tokens=bool(fields.add_special_tokens)))
