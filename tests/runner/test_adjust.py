"""Masks, biases and penalties against one-row Python loops."""

import numpy as np
import pytest
import torch

from nybble.runner import adjust
from nybble.runner.sampling_state import BadWords

VOCAB = 70


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(5))


def test_penalties(logits: torch.Tensor) -> None:
    histories = [([1, 2, 2, 3], [3, 3, 9]), ([5], []), ([7, 7], [8, 8, 8, 8, 7])]
    repetition, frequency, presence = [1.5, 2.0, 0.5], [0.3, 0.4, -0.2], [0.25, 1.0, 0.0]
    expected = logits.clone()
    for row, (prompt, output) in enumerate(histories):
        for token_id in set(prompt + output):
            value = float(expected[row, token_id])
            expected[row, token_id] = value / repetition[row] if value > 0 else value * repetition[row]
        for token_id in set(output):
            expected[row, token_id] -= frequency[row] * output.count(token_id) + presence[row]

    tokens = torch.full((3, 9), 11, dtype=torch.int32)  # what lies past a history must not count
    for row, (prompt, output) in enumerate(histories):
        tokens[row, : len(prompt + output)] = torch.tensor(prompt + output)
    adjust.penalize(
        logits,
        tokens,
        torch.tensor([len(prompt) for prompt, _ in histories]),
        torch.tensor([len(prompt + output) for prompt, output in histories]),
        repetition=torch.tensor(repetition),
        frequency=torch.tensor(frequency),
        presence=torch.tensor(presence),
    )
    torch.testing.assert_close(logits, expected)


def test_neutral_penalties_change_no_bit(logits: torch.Tensor) -> None:
    before = logits.clone()
    ones, zeros = torch.ones(3), torch.zeros(3)
    lengths = torch.tensor([2, 0, 4])
    tokens = torch.randint(0, VOCAB, (3, 6), dtype=torch.int32)
    adjust.penalize(logits, tokens, lengths // 2, lengths, repetition=ones, frequency=zeros, presence=zeros)
    assert torch.equal(logits, before)


def test_allow_only(logits: torch.Tensor) -> None:
    allowed = [{0, 31, 32, 69}, set(range(VOCAB)), {33}]
    masks = np.zeros((3, 3), dtype=np.uint32)
    for row, ids in enumerate(allowed):
        for token_id in ids:
            masks[row, token_id // 32] |= np.uint32(1 << (token_id % 32))
    before = logits.clone()
    adjust.allow_only(logits, torch.from_numpy(masks.view(np.int32)))
    for row, ids in enumerate(allowed):
        for token_id in range(VOCAB):
            expected = before[row, token_id] if token_id in ids else -torch.inf
            assert logits[row, token_id] == expected, (row, token_id)


def test_bias_and_ban_in_small_pieces(logits: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adjust, "_PIECE", 2)
    before = logits.clone()
    rows, ids, values = np.array([0, 0, 2, 2, 2]), np.array([4, 5, 4, 0, 69]), np.float32([1, -2, 100, -100, 3])
    adjust.add_bias(logits, rows, ids, values)
    adjust.ban(logits, np.array([1, 0, 1]), np.array([7, 4, 7]))
    for row, token_id, value in zip(rows, ids, values, strict=True):
        before[row, token_id] += float(value)
    before[1, 7] = before[0, 4] = -torch.inf
    assert torch.equal(logits, before)


@pytest.mark.parametrize("piece", [2**16, 2])
def test_bad_words_are_matched_against_the_output(
    logits: torch.Tensor, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(adjust, "_PIECE", piece)
    histories = {4: ([1, 2], [5, 6]), 0: ([5], []), 2: ([9, 8], [8])}  # by slot: prompt, output
    words = {4: [[3], [6, 10], [5, 6, 11], [2, 5, 6, 12], [7, 10]], 0: [[5, 20], [21]], 2: [[8, 22], [8, 8, 23]]}
    history = torch.zeros(6, 16, dtype=torch.int32)
    banned = set()
    flat = []
    for row, (slot, (prompt, output)) in enumerate(histories.items()):
        history[slot, : len(prompt + output)] = torch.tensor(prompt + output)
        for word in words[slot]:
            flat.append((row, [-1] * (4 - len(word)) + word[:-1], word[-1]))
            prefix = word[:-1]
            if prefix == output[len(output) - len(prefix) :] and len(prefix) <= len(output):
                banned.add((row, word[-1]))
    assert banned == {(0, 3), (0, 10), (0, 11), (1, 21), (2, 22)}  # prefixes that reach into the prompt do not count
    bad_words = BadWords(
        rows=np.array([row for row, _, _ in flat]),
        prefixes=np.array([prefix for _, prefix, _ in flat]),
        last_ids=np.array([last for _, _, last in flat]),
    )
    prompts = [len(prompt) for prompt, _ in histories.values()]
    lengths = [len(prompt + output) for prompt, output in histories.values()]
    adjust.ban_words(
        logits, bad_words, history, torch.tensor(list(histories)), torch.tensor(prompts), torch.tensor(lengths)
    )
    found = {(int(row), int(token_id)) for row, token_id in (logits == -torch.inf).nonzero()}
    assert found == banned
