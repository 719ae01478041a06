"""Fields of OpenAI's and vLLM's requests that nybble does not implement.

A client that sends one expects something to happen, so it is told that nothing would: 400, with the field's name. The
values listed here ask for nothing, so they pass. Fields that nobody knows are ignored, as in OpenAI's server, and so
are OpenAI's that only label or place a request: user, metadata, safety_identifier, prompt_cache_key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nybble.core.checks import shown
from nybble.server.errors import bad_request

_NOTHING: tuple[Any, ...] = ()

_COMMON: dict[str, tuple[Any, ...]] = {
    "guided_json": _NOTHING,
    "guided_regex": _NOTHING,
    "guided_choice": _NOTHING,
    "guided_grammar": _NOTHING,
    "guided_decoding_backend": _NOTHING,
    "guided_whitespace_pattern": _NOTHING,
    "structural_tag": _NOTHING,
    "logits_processors": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "truncate_prompt_tokens": _NOTHING,
    "prompt_embeds": _NOTHING,
    "kv_transfer_params": _NOTHING,
    "vllm_xargs": ({},),
    "lora": _NOTHING,
    "store": (False,),
    "service_tier": ("auto", "default"),
    "thinking_token_budget": _NOTHING,
    "repetition_detection": _NOTHING,
}

REMEDIES = {
    "guided_json": 'send structured_outputs = {"json": …}',
    "guided_regex": 'send structured_outputs = {"regex": …}',
    "guided_choice": 'send structured_outputs = {"choice": …}',
    "guided_grammar": 'send structured_outputs = {"grammar": …}',
    "structural_tag": 'send structured_outputs = {"structural_tag": …}',
    "functions": "send the functions as tools",
    "function_call": "send tools and tool_choice",
    "store": "nothing is stored here",
    "chat_template": "the model's own template is used",
    "documents": "write them into a message",
    "reasoning_effort": "chat_template_kwargs has the template's switches",
    "use_beam_search": "use n",
}
"""What to do instead, where there is something."""

COMPLETION_FIELDS = {**_COMMON, "suffix": _NOTHING}

CHAT_FIELDS = {
    **_COMMON,
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": _NOTHING,
    "modalities": (["text"],),
    "prediction": _NOTHING,
    "web_search_options": _NOTHING,
    "reasoning_effort": _NOTHING,
    "verbosity": _NOTHING,
    "chat_template": _NOTHING,
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "echo": (False,),
    "include_reasoning": (True,),
}


def refuse_unsupported(body: Mapping[str, Any], fields: Mapping[str, tuple[Any, ...]]) -> None:
    """
    Raises:
        ApiError: the body asks for something of `fields`.
    """
    for name in body.keys() & fields.keys():
        value = body[name]
        if value is not None and not any(type(value) is type(passing) and value == passing for passing in fields[name]):
            remedy = f"; {REMEDIES[name]}" if name in REMEDIES else ""
            raise bad_request(
                f"{name} is not supported by this server, got {shown(value)}{remedy}", name, "unsupported_field"
            )
    # A second name for n, unless it asks for a choice among more completions than are returned.
    best_of = body.get("best_of")
    if best_of is not None and best_of != (1 if body.get("n") is None else body["n"]):
        raise bad_request("best_of is supported only where it equals n", "best_of", "unsupported_field")
