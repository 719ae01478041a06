"""Messages as clients send them → the text that the model reads."""

from __future__ import annotations

from typing import Any

from nybble.core.checks import shown
from nybble.server.errors import ApiError, bad_request
from nybble.server.protocol import TemplateFields
from nybble.text.tokenizer import NAMED_TOKENS, Tokenizer

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
"""What clients call a speaker → what templates do. OpenAI renamed system, models did not."""

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


def render(messages: Any, fields: TemplateFields, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a conversation.

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
    text = tokenizer.render_chat(
        _checked(messages),
        add_generation_prompt=not fields.continue_final_message if begins_answer is None else begins_answer,
        continue_final_message=fields.continue_final_message,
        **variables,
    )
    return tokenizer.encode(text, add_special_tokens=bool(fields.add_special_tokens))


def _checked(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages must be a list of at least one message", messages)
    return [_checked_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _checked_message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _wrong(f"{place} must be an object", message)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _wrong(f"{place}.role must be one of {', '.join(ROLES)}", role)
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise _wrong(f"{place}.{name} is not supported by this server", message[name])
    content = message.get("content")
    if isinstance(content, list):
        if not content:
            raise _wrong(f"{place}.content must have at least one part", content)
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise _wrong(f'{place}.content may hold parts {{"type": "text", "text": …}} only', part)
    elif not isinstance(content, str):
        raise _wrong(f"{place}.content must be text or a list of text parts", content)
    return {**message, "role": ROLES[role]}


def _wrong(rule: str, value: object) -> ApiError:
    return bad_request(f"{rule}, got {shown(value)}", "messages", "invalid_value")
