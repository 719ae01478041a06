"""Tokenizer: loading what checkpoints bring, and clear errors for what they lack."""

import json
from pathlib import Path

import pytest
import tokenizers
from support.small_tokenizers import (
    CHATML,
    byte_fallback_tokenizer_json,
    byte_level_tokenizer_json,
    write_tokenizer,
)

from nybble.core.errors import ModelError, RequestError, UnsupportedError
from nybble.text.tokenizer import Tokenizer


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path, byte_level_tokenizer_json(), eos_token="<|im_end|>", chat_template=CHATML)


def test_round_trip(qwen: Path) -> None:
    tokenizer = Tokenizer.load(qwen)
    text = "Hello, 世界 🙂!"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == tokenizer.backend.token_to_id("<|im_end|>")
    assert tokenizer.eos_token_id in tokenizer.special_ids
    assert len(tokenizer.special_ids) == 3
    assert tokenizer.vocab_size == tokenizer.backend.get_vocab_size()


def test_special_tokens_in_text_and_out(qwen: Path) -> None:
    tokenizer = Tokenizer.load(qwen)
    ids = tokenizer.encode("<|im_start|>user")
    assert ids[0] in tokenizer.special_ids
    assert tokenizer.decode(ids) == "user"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>user"


def test_bos_comes_from_the_post_processor(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, byte_fallback_tokenizer_json(), eos_token={"content": "</s>"}))
    assert tokenizer.encode("the")[0] == 1
    assert tokenizer.encode("the", add_special_tokens=False)[0] != 1
    assert tokenizer.eos_token_id == 2


def test_token_text_keeps_spaces_and_shows_broken_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, byte_fallback_tokenizer_json()))
    assert tokenizer.token_text(tokenizer.backend.token_to_id("▁the")) == " the"
    assert tokenizer.token_text(tokenizer.backend.token_to_id("<0xE4>")) == "\ufffd"
    assert tokenizer.token_text(tokenizer.backend.token_to_id("<0x41>")) == "A"
    assert tokenizer.token_text(10**6) == ""


def test_truncation_of_training_is_switched_off(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level_tokenizer_json())
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, backend.to_str()))
    assert tokenizer.decode(tokenizer.encode("a b c d e f g h i j k l m n")) == "a b c d e f g h i j k l m n"


def test_tokens_declared_only_in_the_config(tmp_path: Path) -> None:
    size = tokenizers.Tokenizer.from_str(byte_level_tokenizer_json()).get_vocab_size()
    declared = {str(size): {"content": "<think>", "special": False}, str(size + 1): {"content": "<x>", "special": True}}
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, byte_level_tokenizer_json(), added_tokens_decoder=declared))
    assert tokenizer.encode("<think><x>") == [size, size + 1]
    assert size + 1 in tokenizer.special_ids
    assert size not in tokenizer.special_ids
    declared = {"9999": {"content": "<far>", "special": True}}
    write_tokenizer(tmp_path, byte_level_tokenizer_json(), added_tokens_decoder=declared)
    with pytest.raises(ModelError, match=r"'<far>' is declared with id 9999.*do not belong together"):
        Tokenizer.load(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"looked for tokenizer\.json, tokenizer\.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(UnsupportedError, match=r"tekken\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}', "\x00\xff"])
def test_damaged_tokenizer_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json is damaged"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", '"x"'])
def test_damaged_tokenizer_config(tmp_path: Path, content: str) -> None:
    write_tokenizer(tmp_path, byte_level_tokenizer_json())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("declared", [["x"], {"a": {}}, {"1": "x"}, {"1": {}}])
def test_nonsense_in_added_tokens(tmp_path: Path, declared: object) -> None:
    write_tokenizer(tmp_path, byte_level_tokenizer_json(), added_tokens_decoder=declared)
    with pytest.raises(ModelError, match="added_tokens_decoder"):
        Tokenizer.load(tmp_path)


@pytest.mark.slow
def test_older_files_are_converted(tmp_path: Path) -> None:
    backend = json.loads(byte_level_tokenizer_json())
    model = backend["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("Hello 世界")) == "Hello 世界"


@pytest.mark.slow
def test_a_damaged_sentencepiece_model_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.raises(ModelError, match="install sentencepiece"):
        Tokenizer.load(tmp_path)


def test_prompts_that_are_no_text(qwen: Path) -> None:
    tokenizer = Tokenizer.load(qwen)
    with pytest.raises(RequestError, match="must be text, got int"):
        tokenizer.encode(5)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer.encode("a\ud800")
