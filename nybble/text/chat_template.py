"""`ChatTemplate`: a conversation becomes the text the model was trained on.

Templates are Jinja programs that come with a checkpoint, so they run in a sandbox with limits, see plain data only, and
speak the dialect of the Hugging Face ecosystem (`raise_exception`, `strftime_now`, `tojson` without HTML escapes,
`{% break %}`, `{% generation %}`). Does not know: tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from nybble.core.errors import ModelError, RequestError
from nybble.text.template_sandbox import Sandbox, time_limit

CONTINUE_MARK = "\ue000continue\ue000"
"""Private-use characters: put behind the open message, they show where the template ended its text. A space follows
them, and if the template trims it away then it would have trimmed the message's own trailing space too."""


class ChatTemplate:
    """One or several named templates of a checkpoint.

    Args:
        sources: name → Jinja source; `default` is used, or `tool_use` when there are tools and it exists.
        places: name → where the source comes from, for messages.

    Raises:
        ModelError: a source is no valid template.
    """

    def __init__(self, sources: Mapping[str, str], places: Mapping[str, str]) -> None:
        environment = Sandbox()
        self.sources = dict(sources)
        self._places = places
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in sources.items():
            try:
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise ModelError(f"{places[name]}, line {error.lineno}: {error.message}") from None
            except (RecursionError, MemoryError, SyntaxError):  # the last two are what Python makes of jinja's output
                raise ModelError(f"{places[name]}: nested too deeply to be compiled") from None

    @classmethod
    def load(cls, path: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
        """The templates of the checkpoint in directory `path`; files win over `settings` (tokenizer_config.json)."""
        declared = settings.get("chat_template", [])
        try:
            sources = {"default": declared} if isinstance(declared, str) else _by_name(declared)
        except (KeyError, TypeError):
            raise ModelError(
                f"{path / 'tokenizer_config.json'}: chat_template must be a string or a list of objects with name and "
                f"template"
            ) from None
        places = {name: f"{path / 'tokenizer_config.json'}: chat template {name!r}" for name in sources}
        more = sorted((path / "additional_chat_templates").glob("*.jinja"))
        for name, file in [("default", path / "chat_template.jinja"), *((file.stem, file) for file in more)]:
            if file.is_file():
                places[name] = str(file)
                try:
                    sources[name] = file.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError) as error:
                    raise ModelError(f"{file} cannot be read as UTF-8 text: {error}") from None
        return cls(sources, places) if sources else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """See `Tokenizer.render_chat`. `variables` are what the template sees besides."""
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "add_generation_prompt begins a new answer and continue_final_message goes on with the last; set one",
                parameter="continue_final_message",
            )
        plain = [_plain_message(message, index) for index, message in enumerate(_checked_sequence(messages))]
        if continue_final_message:
            if not isinstance(plain[-1].get("content"), str):
                raise RequestError("continue_final_message needs a last message with text", parameter="messages")
            plain[-1]["content"] = plain[-1]["content"] + CONTINUE_MARK + " "
        name = self._choose(tools)
        seen = {
            **variables,
            "messages": plain,
            "tools": _plain(tools, "tools"),
            "add_generation_prompt": add_generation_prompt,
            "documents": _plain(variables.get("documents"), "documents"),
        }
        try:
            with time_limit():
                text = self._templates[name].render(**seen)
        except Exception as error:  # a template may fall over in any way on messages it was not written for
            reason = "it recurses too deeply" if isinstance(error, RecursionError) else str(error) or repr(error)
            raise RequestError(
                f"the chat template refused these messages: {reason} ({self._places[name]})", parameter="messages"
            ) from None
        if not continue_final_message:
            return text
        before, mark, after = text.rpartition(CONTINUE_MARK)
        if not mark:
            raise RequestError(
                "the chat template left the last message out; it cannot be continued", parameter="messages"
            )
        return before if after.startswith(" ") else before.rstrip()

    def _choose(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise RequestError(
                f"the checkpoint has no default chat template, only {', '.join(self._templates)}", parameter="messages"
            )
        return name


def _by_name(entries: Any) -> dict[str, str]:
    return {str(entry["name"]): str(entry["template"]) for entry in entries or ()}


def _checked_sequence(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f"messages must be a list of dicts, got {type(messages).__name__}", parameter="messages")
    if not messages:
        raise RequestError("messages must not be empty", parameter="messages")
    return messages


def _plain_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message as plain JSON data; text parts joined; keys that are None left out (templates would print "None")."""
    if not isinstance(message, Mapping):
        raise RequestError(f"messages[{index}] must be a dict, got {type(message).__name__}", parameter="messages")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(
            f"messages[{index}] needs a role such as user or assistant, got {role!r}", parameter="messages"
        )
    plain: dict[str, Any] = _plain({k: v for k, v in message.items() if v is not None}, f"messages[{index}]")
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = "\n".join(_part_text(part, index) for part in content)
    elif content is not None and not isinstance(content, str):
        raise RequestError(
            f"messages[{index}].content must be text or a list of text parts, got {type(content).__name__}",
            parameter="messages",
        )
    return plain


def _part_text(part: object, index: int) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise RequestError(
        f'messages[{index}].content: parts must be {{"type": "text", "text": …}}, got {kind!r}', parameter="messages"
    )


def _plain(value: Any, name: str) -> Any:
    """A copy in plain JSON types: the sandbox cannot guard methods of richer objects."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name} must be plain JSON data: {error}", parameter=name.partition("[")[0]) from None
