"""Incremental decoding: one token id in, the text that is certain by now out.

Three ways to write tokens are known. Each is a `TokenStream`, and `open_stream` picks the one of a tokenizer's decoder:
byte-level BPE (GPT-2, Qwen, Llama 3), SentencePiece with byte fallback (Llama 2, Mistral), and any other through
windows of the whole decode. For the first two a token is a fixed run of bytes, found once and then looked up.

The texts a stream returns, concatenated, equal one decode of all ids.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from itertools import islice
from typing import Any, Protocol

import tokenizers

SPACE_MARK = "▁"  # U+2581, SentencePiece's space
REPLACEMENT = "\ufffd"


class TokenStream(Protocol):
    def push(self, token_id: int) -> str:
        """The text that is certain now that this token came; "" while a character is unfinished."""
        ...

    def flush(self) -> str:
        """What was held back, at the end of the stream."""
        ...


def open_stream(
    backend: tokenizers.Tokenizer, pieces: Pieces | None, skip_ids: frozenset[int], prompt_token_ids: Sequence[int]
) -> TokenStream:
    """A stream for text that continues `prompt_token_ids`, without the tokens `skip_ids`."""
    if pieces is None:
        return WindowStream(backend, skip_ids, prompt_token_ids)
    if isinstance(pieces, ByteFallbackPieces):
        # SentencePiece drops the space in front of a text's first word, but an answer that continues a text needs it.
        continues_text = any(pieces[token_id] and token_id not in skip_ids for token_id in prompt_token_ids)
        return ByteFallbackStream(pieces, skip_ids, strip_spaces=0 if continues_text else pieces.strip_spaces)
    return ByteLevelStream(pieces, skip_ids)


class Pieces(dict[int, bytes]):
    """Token id → its bytes, filled at first use: a vocabulary is large and a process meets little of it."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        # Embeddings are often padded beyond the vocabulary; such ids have no text.
        piece = b"" if token is None else self.to_bytes(token)
        self[token_id] = piece
        return piece

    def to_bytes(self, token: str) -> bytes:
        raise NotImplementedError


class ByteLevelPieces(Pieces):
    """GPT-2's spelling: each byte is one printable character."""

    def to_bytes(self, token: str) -> bytes:
        try:
            return bytes(BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # an added token, spelled as itself
            return token.encode()


class ByteFallbackPieces(Pieces):
    """SentencePiece: ▁ is a space, and <0xE4> is a byte of a character that the vocabulary lacks."""

    def __init__(self, backend: tokenizers.Tokenizer, strip_spaces: int) -> None:
        super().__init__(backend)
        self.strip_spaces = strip_spaces  # how many spaces a text's beginning loses
        self.byte_ids: set[int] = set()

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is not None and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            self.byte_ids.add(token_id)
            self[token_id] = bytes([int(token[3:5], 16)])
            return self[token_id]
        return super().__missing__(token_id)

    def to_bytes(self, token: str) -> bytes:
        return token.replace(SPACE_MARK, " ").encode()


def pieces_of(backend: tokenizers.Tokenizer) -> Pieces | None:
    """How this tokenizer's tokens spell bytes; None if in neither of the two known ways."""
    if backend.decoder is None:
        return None
    decoder: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    if decoder["type"] == "ByteLevel":
        return ByteLevelPieces(backend)
    steps: list[dict[str, Any]] = decoder.get("decoders", [])
    kinds = [step["type"] for step in steps]
    if kinds not in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        return None
    strip: dict[str, Any] = steps[3] if len(steps) == 4 else {"content": " ", "start": 0, "stop": 0}
    if steps[0]["pattern"] != {"String": SPACE_MARK} or steps[0]["content"] != " ":
        return None
    if strip["content"] != " " or strip["stop"]:
        return None
    return ByteFallbackPieces(backend, strip["start"])


class ByteLevelStream:
    """All tokens' bytes are one UTF-8 text; invalid ones become �, as the whole decode has it."""

    def __init__(self, pieces: Pieces, skip_ids: frozenset[int]) -> None:
        self._pieces = pieces
        self._skip_ids = skip_ids
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skip_ids else self._decode(self._pieces[token_id])

    def flush(self) -> str:
        return self._decode(b"", True)


class ByteFallbackStream:
    """Tokens are texts, but runs of byte tokens are decoded as a whole: one bad byte turns each byte of the run into �.

    A run is therefore held back until it ends.
    """

    def __init__(self, pieces: ByteFallbackPieces, skip_ids: frozenset[int], *, strip_spaces: int) -> None:
        self._pieces = pieces
        self._skip_ids = skip_ids
        self._run = bytearray()
        self._strip_spaces = strip_spaces

    def push(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if token_id in self._skip_ids or not piece:
            return ""
        if token_id in self._pieces.byte_ids:
            self._run += piece
            return ""
        text = piece.decode()
        return self._stripped(self._end_run() + text if self._run else text)

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip_spaces and text:
            if text[0] != " ":
                self._strip_spaces = 0
                break
            text = text[1:]
            self._strip_spaces -= 1
        return text


class WindowStream:
    """For any other decoder: decode a window of tokens with and without the new one, and return the difference.

    The window starts at the last tokens already shown, because a decoder may treat a text's beginning specially. Ids
    without a token never enter it: the decoder does not see them, so a window of them would be a text's beginning.
    """

    PROMPT_WINDOW = 8  # tokens
    MAX_WINDOW = 64  # a text that has stayed unfinished over this many tokens is shown as it is

    def __init__(
        self, backend: tokenizers.Tokenizer, skip_ids: frozenset[int], prompt_token_ids: Sequence[int]
    ) -> None:
        self._backend = backend
        self._skip_ids = skip_ids
        seen = (token_id for token_id in reversed(prompt_token_ids) if self._is_seen(token_id))
        self._window = list(islice(seen, self.PROMPT_WINDOW))[::-1]
        self._num_shown = len(self._window)
        self._shown = self._decode(self._window)

    def push(self, token_id: int) -> str:
        if not self._is_seen(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and len(self._window) < self.MAX_WINDOW:
            return ""
        return self._show(text)

    def flush(self) -> str:
        return self._show(self._decode(self._window)) if len(self._window) > self._num_shown else ""

    def _show(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        self._shown = self._decode(self._window)
        return new

    def _is_seen(self, token_id: int) -> bool:
        return token_id not in self._skip_ids and self._backend.id_to_token(token_id) is not None

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._backend.decode(token_ids, skip_special_tokens=False)) if token_ids else ""


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes are themselves, the other 68 are U+0100 and up, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()
