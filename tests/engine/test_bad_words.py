"""Bad words become token sequences, whatever they are made of; what has none is refused."""

import pytest
import tokenizers
from support.small_tokenizers import byte_fallback_tokenizer_json, byte_level_tokenizer_json

from nybble.core.errors import RequestError
from nybble.engine.bad_words import encode_bad_words
from nybble.text.tokenizer import Tokenizer


def make(tokenizer_json: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(tokenizer_json))


def test_a_word_alone_and_after_a_space() -> None:
    tokenizer = make(byte_level_tokenizer_json())
    bare, spaced = tokenizer.encode("the"), tokenizer.encode(" the")
    words = encode_bad_words(tokenizer, ["the", "  the"])
    assert words == ([bare, spaced] if len(bare) == len(spaced) else [bare]) * 2


@pytest.mark.parametrize("tokenizer_json", [byte_level_tokenizer_json, byte_fallback_tokenizer_json])
@pytest.mark.parametrize("word", ["\n", " ", " \n\t"])
def test_white_space_is_banned_as_it_is(tokenizer_json, word: str) -> None:
    tokenizer = make(tokenizer_json())
    ids = tokenizer.encode(word, add_special_tokens=False)
    assert ids
    assert encode_bad_words(tokenizer, [word]) == [ids]


def test_a_word_without_tokens_is_refused() -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level_tokenizer_json())
    backend.normalizer = tokenizers.normalizers.Replace("x", "")
    with pytest.raises(RequestError, match="no tokens for 'xx'") as raised:
        encode_bad_words(Tokenizer(backend), ["a", "xx"])
    assert raised.value.parameter == "bad_words"
