"""What clients may send: pydantic models of the request bodies, under OpenAI's and vLLM's names.

Types are strict ("5" is no number), ranges are left to `SamplingParams`, which names the field too. A field that is
null counts as absent. What has many elements is typed by hand (`Any` here, a schema for /openapi.json): pydantic would
make an error of each wrong one.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

_INTS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "required": ["type", "text"],
                            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        },
                    },
                    {"type": "null", "description": "of an assistant's message with tool_calls"},
                ]
            },
            "tool_calls": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["function"],
                    "properties": {
                        "id": {"type": "string"},
                        "type": {"const": "function"},
                        "function": {
                            "type": "object",
                            "required": ["name"],
                            "properties": {
                                "name": {"type": "string"},
                                "arguments": {"type": "string", "description": "JSON text of an object"},
                            },
                        },
                    },
                },
            },
            "tool_call_id": {"type": "string"},
        },
    },
}
_TOOLS = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["type", "function"],
        "properties": {
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"type": "string"},
                    "description": {"type": "string"},
                    "parameters": {"type": "object", "description": "a JSON schema"},
                },
            },
        },
    },
}
_TOOL_CHOICE = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
            },
        },
    ]
}
_RESPONSE_FORMAT = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": {"enum": ["text", "json_object", "json_schema", "structural_tag"]},
        "json_schema": {
            "type": "object",
            "required": ["schema"],
            "properties": {
                "name": {"type": "string"},
                "schema": {"type": "object", "description": "a JSON schema"},
                "strict": {"type": "boolean", "description": "the schema is always kept"},
            },
        },
    },
}
_STRUCTURED_OUTPUTS = {
    "type": "object",
    "description": "exactly one of these: the text's form",
    "minProperties": 1,
    "properties": {
        "json": {"anyOf": [{"type": "object"}, {"type": "string"}], "description": "a JSON schema"},
        "regex": {"type": "string"},
        "choice": _TEXTS,
        "grammar": {"type": "string", "description": "in GBNF or Lark"},
        "json_object": {"type": "boolean"},
        "structural_tag": {"anyOf": [{"type": "object"}, {"type": "string"}]},
        "disable_any_whitespace": {"type": "boolean"},
    },
}

Prompts = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, _INTS, {"type": "array", "items": _INTS, "minItems": 1}]}),
]
Messages = Annotated[Any, WithJsonSchema(_MESSAGES)]
Tools = Annotated[Any, WithJsonSchema(_TOOLS)]
ToolChoice = Annotated[Any, WithJsonSchema(_TOOL_CHOICE)]
ResponseFormat = Annotated[Any, WithJsonSchema(_RESPONSE_FORMAT)]
StructuredFields = Annotated[Any, WithJsonSchema(_STRUCTURED_OUTPUTS)]
Biases = Annotated[
    Any, WithJsonSchema({"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}})
]
Ints = Annotated[list[int], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
RequestId = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$")]


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(Body):
    """What the two generating routes share. None: the checkpoint's default, or else the engine's."""

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | Texts | None = None
    stop_token_ids: Ints | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    bad_words: Texts | None = None
    logit_bias: Biases = None
    allowed_token_ids: Ints | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    response_format: ResponseFormat = None
    structured_outputs: StructuredFields = None

    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    priority: int = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    request_id: RequestId | None = None
    user: str | None = None


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`."""

    prompt: Prompts
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True


class ToolFields(BaseModel):
    """Functions of the client that the model may call."""

    tools: Tools = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool = True


class TemplateFields(ToolFields):
    """How a conversation is written as text."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None  # the template writes them, so by default none are added


class ChatCompletionRequest(SamplingFields, TemplateFields):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None


class TokenizeRequest(Body, TemplateFields):
    """`POST /tokenize`: a `prompt`, or `messages`."""

    prompt: str | None = None
    messages: Messages = None
    return_token_strs: bool = False


class AbortRequest(Body):
    """`POST /abort_requests`: `request_ids` are those of the responses, such as "chatcmpl-17"."""

    request_ids: Annotated[Texts, Field(min_length=1)] | None = None
    abort_all: bool = False


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    tokens: Ints
