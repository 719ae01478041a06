"""The tokenizer of `tiny`: byte-level BPE learned from its own training text, each digit a token, and ChatML.

python -m training.tiny.tokenizer DIRECTORY     # writes tokenizer.json and tokenizer_config.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from training.tiny.data import document
from training.tiny.vocabulary import MONTHS, WORDS

VOCABULARY_SIZE = 1280
END_OF_TEXT, TURN_START, TURN_END = SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# ChatML as the Qwen family writes it, without a default system prompt.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""


def train_tokenizer(num_documents: int = 20_000, seed: int = 0) -> Tokenizer:
    """Learn the merges. Words in capitals are shown more often than the tasks do, so that they stay short."""
    tokenizer = Tokenizer(models.BPE())
    # Single digits make arithmetic learnable: 123 and 1234 share their digits, whatever BPE would merge.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = Random(seed)
    texts = ["".join(text for text, _ in document(rng, 800)) for _ in range(num_documents)]
    texts += [f" {word} {word.upper()} {word.title()}" for word in WORDS + MONTHS] * 10
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, max_tokens: int) -> None:
    """Write the two files that Hugging Face and nybble read."""
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [TURN_START, TURN_END],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    save_tokenizer(train_tokenizer(), target, max_tokens=2048)
