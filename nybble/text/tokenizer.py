"""`Tokenizer`: text ↔ token ids, and chat messages → text.

Owns: the files of a checkpoint that say how text is cut (tokenizer.json, tokenizer_config.json, chat templates). Built
on the `tokenizers` library alone; transformers is asked only to convert a checkpoint that brings no tokenizer.json.
Does not know: the model, requests, what a stop string is. Reads local files only and never runs a checkpoint's code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from nybble.core.errors import ModelError, RequestError, UnsupportedError
from nybble.text.chat_template import ChatTemplate
from nybble.text.token_stream import TokenStream, open_stream, pieces_of

CONVERTIBLE_FILES = ("tokenizer.model", "spiece.model", "vocab.json")
"""Without a tokenizer.json, transformers can make one out of these."""

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """A checkpoint's tokenizer.

    Args:
        backend: does the cutting.
        settings: contents of tokenizer_config.json.
        chat_template: None where the checkpoint has none.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any] | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        # Some files carry the length limits of their training; the engine has its own.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.named_tokens = _named_tokens(settings or {})
        added = backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        eos = self.named_tokens.get("eos_token")
        self.eos_token_id: int | None = None if eos is None else backend.token_to_id(eos)
        self.chat_template = chat_template
        self._pieces = pieces_of(backend)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read the tokenizer of the checkpoint in directory `path`.

        Raises:
            ModelError: files are missing or damaged; names them.
        """
        settings = _read_json(path / "tokenizer_config.json")
        backend = _read_backend(path)
        _add_declared_tokens(backend, settings, path)
        return cls(backend, settings, ChatTemplate.load(path, settings))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Cut `text` into ids. `add_special_tokens` lets the checkpoint's post-processor add its BOS (and others)."""
        if not isinstance(text, str):
            raise RequestError(f"a prompt must be text, got {type(text).__name__}", parameter="prompt")
        try:
            # As a batch, because only then the library lets other threads run meanwhile.
            return list(self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)
        except TypeError:  # what the library makes of lone surrogates
            raise RequestError(
                "the prompt is not valid Unicode: it holds lone surrogates", parameter="prompt"
            ) from None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids` standing alone."""
        return str(self.backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0])

    def token_text(self, token_id: int) -> str:
        """The text of one token, its leading space kept; "�" stands for bytes that are no whole character."""
        if self._pieces is None:
            return self.decode([token_id], skip_special_tokens=False)
        return self._pieces[token_id].decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; several tokens may share one character's."""
        return self.token_text(token_id).encode() if self._pieces is None else self._pieces[token_id]

    @property
    def knows_bytes(self) -> bool:
        """Whether each token writes the same bytes wherever it stands."""
        return self._pieces is not None

    def open_stream(self, *, skip_special_tokens: bool, prompt_token_ids: Sequence[int] = ()) -> TokenStream:
        """An incremental decoder for text that continues a prompt."""
        skip_ids = self.special_ids if skip_special_tokens else frozenset()
        return open_stream(self.backend, self._pieces, skip_ids, prompt_token_ids)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_variables: Any,
    ) -> str:
        """Write a conversation the way the model was trained to read it. Encode it with add_special_tokens=False.

        Args:
            messages: dicts with `role` and `content` (text, or a list of {"type": "text", "text": …} parts).
            add_generation_prompt: end with the header of the answer to come.
            continue_final_message: leave the last message open, so that the model goes on with it.
            tools: JSON schemas of functions the model may call.
            template_variables: whatever else the template knows, for instance enable_thinking.

        Raises:
            RequestError: the checkpoint has no chat template, or the template refuses these messages.
        """
        if self.chat_template is None:
            raise RequestError(
                "this checkpoint has no chat template (looked for chat_template in tokenizer_config.json and for "
                "chat_template.jinja); send a plain prompt instead, or add a chat_template.jinja to its directory",
                parameter="messages",
            )
        return self.chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables={**self.named_tokens, **template_variables},
        )


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}; download the checkpoint again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, found {type(content).__name__}")
    return content


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    file = path / "tokenizer.json"
    if file.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
            raise ModelError(f"{file} is damaged: {error}; download the checkpoint again") from None
    found = next((name for name in CONVERTIBLE_FILES if (path / name).is_file()), None)
    if found is not None:
        return _convert(path, found)
    if (path / "tekken.json").is_file():
        raise UnsupportedError(
            f"{path} brings its tokenizer as tekken.json only, which nybble does not read; "
            f"take the tokenizer.json of the model's Hugging Face repository"
        )
    raise ModelError(
        f"no tokenizer in {path}: looked for tokenizer.json, {', '.join(CONVERTIBLE_FILES)}; "
        f"copy these files from the model's original repository"
    )


def _convert(path: Path, found: str) -> tokenizers.Tokenizer:
    """Let transformers turn an older tokenizer file into a fast tokenizer."""
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        ).backend_tokenizer
    except Exception as error:  # transformers raises many kinds here; the remedy is the same
        raise ModelError(
            f"{path} has no tokenizer.json, and its {found} could not be converted: {error}; "
            f"install sentencepiece and protobuf, or take a tokenizer.json from the model's original repository"
        ) from error
    assert isinstance(backend, tokenizers.Tokenizer)
    return backend


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and so on as texts; the file has each as a string or as an object."""
    named: dict[str, str] = {}
    for name in NAMED_TOKENS:
        value = settings.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            named[name] = value
    return named


def _add_declared_tokens(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], path: Path) -> None:
    """Add the tokens that only tokenizer_config.json declares; with another id than declared they would do harm."""
    file = path / "tokenizer_config.json"
    try:
        declared = sorted((int(key), dict(spec)) for key, spec in settings.get("added_tokens_decoder", {}).items())
        contents = [str(spec["content"]) for _, spec in declared]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ModelError(f"{file}: added_tokens_decoder must map ids to objects with a content") from None
    for (token_id, spec), content in zip(declared, contents, strict=True):
        if backend.token_to_id(content) is not None:
            continue
        flags = {name: bool(spec.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "special")}
        flags["normalized"] = bool(spec.get("normalized", not flags["special"]))
        backend.add_tokens([tokenizers.AddedToken(content, **flags)])
        if backend.token_to_id(content) != token_id:
            raise ModelError(
                f"{file}: added token {content!r} is declared with id {token_id}, but "
                f"tokenizer.json leaves it {backend.token_to_id(content)}; the two files do not belong together"
            )
