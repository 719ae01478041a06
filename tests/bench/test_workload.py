"""Workloads: lengths, seeds, no prompt twice, files."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from nybble.bench.prompt_text import WordCost
from nybble.bench.workload import Workload, WorkloadSettings
from nybble.core.errors import ConfigError
from nybble.models.checkpoint import TINY
from nybble.text.tokenizer import Tokenizer


def made(**settings: Any) -> Workload:
    return Workload(WorkloadSettings(**settings))


def test_prompts_have_exactly_the_tokens_asked_for_with_a_tokenizer() -> None:
    workload = made(input_len=(3, 200), output_len=(5, 9), tokenizer=str(TINY))
    tokenizer = Tokenizer.load(TINY)
    turns = [turn for i in range(40) for turn in workload.conversation("p", i)]
    lengths = [len(tokenizer.encode(str(turn.prompt))) for turn in turns]
    draws = {turn.num_output_tokens for turn in turns}
    assert draws == {5, 6, 7, 8, 9}
    assert min(lengths) >= 3
    assert max(lengths) <= 200
    assert len(set(lengths)) > 25
    exact = made(input_len=(64, 64), tokenizer=str(TINY))
    assert {len(tokenizer.encode(str(exact.conversation("p", i)[0].prompt))) for i in range(40)} == {64}


def test_a_vocabulary_without_words(tmp_path: Path) -> None:
    """Letters are tokens, and names that no text becomes: what synthetic checkpoints have."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {text: i for i, text in enumerate([*sorted(alphabet), *(f"tok{i}" for i in range(500))])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    (turn,) = made(input_len=(50, 50), tokenizer=str(tmp_path)).conversation("p", 0)
    assert len(Tokenizer.load(tmp_path).encode(str(turn.prompt))) == 50


def test_prompts_have_about_the_tokens_asked_for_without() -> None:
    workload = made(input_len=(100, 100), word_cost=WordCost(fixed=20, each=1.6))
    (turn,) = workload.conversation("p", 0)
    assert len(str(turn.prompt).split()) == 50


def test_no_prompt_comes_twice_unless_asked() -> None:
    workload = made(input_len=(16, 16))
    prompts = [str(workload.conversation(part, i)[0].prompt) for part in ("a", "b") for i in range(200)]
    assert len({prompt[:40] for prompt in prompts}) == 400  # not even their beginnings
    again = made(input_len=(16, 16), repeats_prompts=True)
    assert again.conversation("a", 3) == again.conversation("b", 3)


def test_the_seed_decides() -> None:
    one, same, other = (made(input_len=(8, 64), seed=seed) for seed in (1, 1, 2))
    assert one.conversation("p", 5) == same.conversation("p", 5) != other.conversation("p", 5)


def test_shared_prefixes() -> None:
    workload = made(input_len=(4, 4), prefix_len=30, num_prefixes=2)
    starts = [" ".join(str(workload.conversation("p", i)[0].prompt).split()[:30]) for i in range(6)]
    assert len(set(starts)) == 2
    assert starts[0] == starts[2] != starts[1]


def test_turns_are_messages_on_the_chat_route() -> None:
    turns = made(num_turns=3, route="chat").conversation("p", 0)
    assert len(turns) == 3
    assert turns[0].prompt[0]["role"] == "user"  # type: ignore[index,call-overload]


def test_token_ids() -> None:
    (turn,) = made(input_len=(7, 7), as_ids=True, tokenizer=str(TINY)).conversation("p", 0)
    assert len(turn.prompt) == 7
    assert all(isinstance(token_id, int) for token_id in turn.prompt)
    for settings in ({"tokenizer": None}, {"route": "chat"}, {"num_turns": 2}):
        with pytest.raises(ConfigError, match="--prompt-ids"):
            made(**({"as_ids": True, "tokenizer": str(TINY)} | settings))


def write(path: Path, *rows: object) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_prompts_of_a_jsonl_file(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", {"prompt": "one", "max_tokens": 3}, {"prompt": "two"})
    turns = [made(dataset=file).conversation("p", i)[0] for i in range(2)]
    assert sorted(turns) == [("one", 3), ("two", 64)]
    assert made(dataset=file, output_len=(9, 9)).conversation("p", 0)[0].num_output_tokens == 9
    (turn,) = made(dataset=file, prefix_len=5).conversation("p", 0)
    assert len(str(turn.prompt).split()) == 6


def test_conversations_of_a_sharegpt_file(tmp_path: Path) -> None:
    said = [
        {"from": "human", "value": "q1"},
        {"from": "gpt", "value": "a b c d e"},
        {"from": "human", "value": "q2"},
        {"from": "gpt", "value": "f"},
    ]
    file = tmp_path / "s.json"
    file.write_text(json.dumps([{"conversations": said}, {"conversations": said[2:]}, {"conversations": []}]))
    workload = made(dataset=str(file), num_turns=2)
    assert len(workload.entries or ()) == 1  # the second one's answer is too short
    assert workload.conversation("p", 0) == [("q1", 5), ("q2", 1)]


@pytest.mark.parametrize("kind", ["mooncake", "azure"])
def test_traces(tmp_path: Path, kind: str) -> None:
    if kind == "mooncake":
        rows = [{"timestamp": 3000 + 500 * i, "input_length": 10 + i, "output_length": 2 + i} for i in range(3)]
        file = write(tmp_path / "t.jsonl", *rows)
    else:
        lines = [f"2024-05-10 00:00:0{i / 2 + 1:.1f},{10 + i},{2 + i}" for i in range(3)]
        (tmp_path / "t.csv").write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
        file = str(tmp_path / "t.csv")
    workload = made(dataset=file)
    assert workload.due_times(9) == pytest.approx([0.0, 0.5, 1.0])
    turns = [workload.conversation("p", i)[0] for i in range(3)]
    assert [(len(str(turn.prompt).split()), turn.num_output_tokens) for turn in turns] == [(10, 2), (11, 3), (12, 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no usable prompt"),
        ("{}", "line 1: needs exactly one of prompt"),
        ('{"prompt": "x"}\n[1]', "line 2: must be a JSON object"),
        ('{"prompt": "x"}\nnot', "line 2: no JSON"),
        ('{"prompt": "x", "max_tokens": 0}', "output_len"),
        ('{"timestamp": 1, "input_length": "many", "output_length": 1}', "line 1: a trace has"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 1}', "at least 1 token"),
        ("[1, 2]", "conversations"),
        ("[", "no JSON"),
    ],
)
def test_bad_files_are_told_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        made(dataset=str(tmp_path / "p.jsonl"))
    with pytest.raises(ConfigError, match="No such file"):
        made(dataset=str(tmp_path / "none.jsonl"))


def test_messages_need_the_chat_route(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", {"messages": [{"role": "user", "content": "x"}]})
    assert made(dataset=file, route="chat").conversation("p", 0)[0].prompt == [{"role": "user", "content": "x"}]
    with pytest.raises(ConfigError, match="--route chat"):
        made(dataset=file).conversation("p", 0)
