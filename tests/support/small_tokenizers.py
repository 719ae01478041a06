"""Small tokenizers of the kinds that checkpoints bring, and their files on disk."""

import json
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog. 0123456789",
    "naïve café — “quoted”, 你好，世界。 Привет, мир! 🙂👩‍👩‍👧",
    "system user assistant\nYou are a helpful assistant. Say hello to the world, please.",
    "one two three four five six seven eight nine ten: stop! Observation: END of text </answer>",
] * 4

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@cache
def byte_level_tokenizer_json() -> str:
    """As Qwen and Llama 3 have it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
        ),
    )
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<tool call>", normalized=False), AddedToken("日本 語", normalized=False)])
    return backend.to_str()


@cache
def byte_fallback_tokenizer_json() -> str:
    """As Llama 2 and Mistral have it."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))])}
    merges: list[tuple[str, str]] = []
    for character in "▁abcdefghijklmnopqrstuvwxyzEND.,!:é你":
        vocab[character] = len(vocab)
    for left, right in [
        ("▁", "t"),
        ("h", "e"),
        ("▁t", "he"),
        ("l", "l"),
        ("▁", "h"),
        ("E", "N"),
        ("EN", "D"),
        ("▁", "▁"),
    ]:
        vocab[left + right] = len(vocab)
        merges.append((left, right))
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return backend.to_str()


@cache
def metaspace_tokenizer_json() -> str:
    """A kind that nybble decodes through windows."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, show_progress=False, special_tokens=["<unk>", "<s>"])
    )
    return backend.to_str()


def write_tokenizer(path: Path, tokenizer_json: str, **settings: object) -> Path:
    """Lay the files of a tokenizer into directory `path`."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path
