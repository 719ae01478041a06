"""`StructuredOutputs`: the form that a completion's text must have.

Names and meanings are vLLM's. What it holds is checked for its type and size only: whether it is a sound grammar shows
when it is compiled, which happens elsewhere and takes time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import msgspec
from msgspec.structs import force_setattr

from nybble.core.checks import fits, shown
from nybble.core.errors import RequestError
from nybble.core.json_schema import unsupported_keyword

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
FIELDS = (*KINDS, "disable_any_whitespace")
MAX_CHARS = 2**18
"""Of a grammar's text. Real schemas have some thousand; what is larger costs more to look at than it can be worth."""

Reasoning = Literal["may_open", "is_open"]


class StructuredOutputs(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Exactly one of the first six says what the text must be.

    Args:
        json: a JSON schema, as an object or as its text; the text is JSON that the schema allows. Properties come in
            the schema's order, and no others, unless the schema asks for them.
        regex: the whole text matches it. Look-around, word borders and back-references are not supported.
        choice: the text is one of these.
        grammar: rules in GBNF (`root ::= …`), or in Lark (`start: …`).
        json_object: True: any JSON object.
        structural_tag: xgrammar's description of tags and what is in them, as an object or as its text.
        disable_any_whitespace: JSON without white space between its parts.
        reasoning: the answer may open its reasoning with <think>, or the prompt did; the form is that of what follows
            </think>.
        source: the request field that asked for it; errors name it.

    Raises:
        RequestError: not exactly one is given, or it is of a wrong type or too long.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False
    reasoning: Reasoning | None = None
    source: str = "structured_outputs"

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None and getattr(self, name) is not False]
        if len(given) != 1:
            what = f"has {' and '.join(given)}" if given else "has none of them"
            self._fail(f"needs exactly one of {', '.join(KINDS)}, and {what}")
        name = given[0]
        value = getattr(self, name)
        if name in ("json", "structural_tag"):
            force_setattr(self, name, self._json_text(name, value))
        elif name == "choice":
            if not isinstance(value, list | tuple) or not value or not all(isinstance(text, str) for text in value):
                self._fail(f"choice must be a list of at least one string, got {shown(value)}")
            force_setattr(self, name, list(value))
        elif name == "json_object":
            if value is not True:
                self._fail(f"json_object must be True or False, got {shown(value)}")
        elif not isinstance(value, str) or not value:
            self._fail(f"{name} must be a non-empty string, got {shown(value)}")
        if not fits(bool, self.disable_any_whitespace):
            self._fail(f"disable_any_whitespace must be True or False, got {shown(self.disable_any_whitespace)}")
        try:
            length = len(self.text.encode())
        except UnicodeEncodeError:
            self._fail(f"{name} is not valid Unicode: it holds lone surrogates")
        if length > MAX_CHARS:
            self._fail(f"{name} has {length} bytes; it may have at most {MAX_CHARS}")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> StructuredOutputs:
        """Made of what a JSON document says.

        Raises:
            RequestError: it has other fields than users may send, too.
        """
        if unknown := sorted(map(str, fields.keys() - set(FIELDS))):
            raise RequestError(
                f"structured_outputs has no field {shown(unknown[0])}; there are {', '.join(FIELDS)}",
                parameter="structured_outputs",
            )
        return cls(**{name: value for name, value in fields.items() if value is not None})

    @property
    def kind(self) -> str:
        return next(name for name in KINDS if getattr(self, name) not in (None, False))

    @property
    def text(self) -> str:
        """What `kind` holds, as text."""
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else msgspec.json.encode(value).decode()

    def _json_text(self, name: str, value: object) -> str:
        try:
            if isinstance(value, str):
                if len(value) <= MAX_CHARS:  # longer ones are refused for that
                    value = msgspec.json.decode(value)
                else:
                    return value
            text = msgspec.json.encode(value).decode()
        except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as error:
            self._fail(f"{name} is not valid JSON: {error}")
        if not isinstance(value, dict):
            self._fail(f"{name} must be a JSON object, got {shown(value)}")
        if name == "structural_tag" and not isinstance(value.get("format"), dict):
            self._fail("structural_tag must have an object `format`")
        if name == "json" and (keyword := unsupported_keyword(value)) is not None:
            self._fail(f"the JSON schema uses {keyword}, which is not supported; leave it out")
        return text

    def _fail(self, rule: str) -> NoReturn:
        raise RequestError(f"{self.source}: {rule}", parameter=self.source)
