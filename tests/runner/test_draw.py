"""The draw and its filters against plain numpy, and against statistics."""

import numpy as np
import pytest
import torch

from nybble.runner.draw import MAX_SELECTED, draw, keep_likeliest, keep_min_p
from nybble.runner.random_numbers import uniforms


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def likeliest_kept(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """One row, the textbook way: sort, cut at k, renormalize, add until p is reached."""
    order = np.argsort(-logits)[:top_k]
    probabilities = softmax(logits[order].astype(np.float64))
    kept, total = [], 0.0
    for token_id, probability in zip(order, probabilities, strict=True):
        if total >= top_p:
            break
        kept.append(int(token_id))
        total += probability
    return set(kept)


def finite_ids(row: torch.Tensor) -> set[int]:
    return set(row.isfinite().nonzero()[:, 0].tolist())


@pytest.mark.parametrize("vocab_size", [5, 256, 1500])
def test_top_k_and_top_p_keep_what_the_textbook_keeps(vocab_size: int) -> None:
    generator = np.random.default_rng(vocab_size)
    logits = generator.normal(size=(12, vocab_size)).astype(np.float32) * 3
    top_k = np.array([1, 2, 3, 5, 5, 4, vocab_size, vocab_size, vocab_size, 2, 3, 5])
    top_p = np.array([1, 1, 1, 1, 0.5, 0.9, 0.3, 0.99, 1, 1e-6, 0.7, 0.2], dtype=np.float32)
    for num_sorted in (int(top_k.max()), vocab_size):
        kept = keep_likeliest(torch.tensor(logits), torch.tensor(top_k), torch.tensor(top_p), num_sorted)
        for row in range(len(logits)):
            assert finite_ids(kept[row]) == likeliest_kept(logits[row], top_k[row], float(top_p[row])), row


def test_a_row_without_filters_keeps_everything_beside_filtered_rows() -> None:
    logits = torch.randn(2, MAX_SELECTED + 100)
    top_k = torch.tensor([4, logits.shape[1]])
    kept = keep_likeliest(logits.clone(), top_k, torch.ones(2), num_sorted=4)
    assert torch.equal(kept[1], logits[1])
    assert len(finite_ids(kept[0])) == 4


def test_equal_logits_at_the_threshold_all_stay() -> None:
    kept = keep_likeliest(torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]]), torch.tensor([2]), torch.ones(1), num_sorted=2)
    assert finite_ids(kept[0]) == {0, 1, 2, 3}


@pytest.mark.parametrize("min_p", [0.0, 0.01, 0.3, 1.0])
def test_min_p(min_p: float) -> None:
    logits = np.random.default_rng(1).normal(size=200).astype(np.float32) * 2
    probabilities = softmax(logits.astype(np.float64))
    kept = keep_min_p(torch.tensor(logits)[None], torch.tensor([min_p]))
    assert finite_ids(kept[0]) == set(np.flatnonzero(probabilities >= min_p * probabilities.max()).tolist())


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 40 tokens: 99.99 % of fair samplers stay below 84."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 1.5
    num_draws = 40_000
    numbers = uniforms(np.full(num_draws, 7, dtype=np.uint64), np.arange(num_draws))
    ids = draw(logits.expand(num_draws, -1), torch.from_numpy(numbers))
    expected = softmax(logits.double().numpy()) * num_draws
    observed = np.bincount(ids.numpy(), minlength=40)
    assert ((observed - expected) ** 2 / expected).sum() < 84


def test_draw_inverts_the_cumulative_distribution_in_id_order() -> None:
    logits = torch.log(torch.tensor([[0.25, 0.25, 0.0, 0.5]]))
    numbers = torch.tensor([0.0, 0.2499, 0.2501, 0.4999, 0.5001, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits.expand(6, -1), numbers).tolist() == [0, 0, 1, 1, 3, 3]


@pytest.mark.parametrize("position", [0, 255, 256, 700, 999])
def test_only_possible_tokens_are_drawn_wherever_they_are(position: int) -> None:
    logits = torch.full((4, 1000), -torch.inf)
    logits[:, position] = -3.0
    numbers = torch.tensor([0.0, 0.3, 0.999999, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, numbers).tolist() == [position] * 4


def test_zero_probability_is_never_drawn() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2000, 700, generator=generator)
    logits.masked_fill_(torch.rand(logits.shape, generator=generator) < 0.9, -torch.inf)
    logits[:, 0] = 0.0
    ids = draw(logits, torch.rand(2000, generator=generator, dtype=torch.float64))
    assert logits.gather(1, ids[:, None]).isfinite().all()


def test_a_row_of_nan_yields_an_id_in_range_and_leaves_its_neighbours_alone() -> None:
    logits = torch.randn(3, 300)
    numbers = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    alone = draw(logits, numbers)
    logits[1] = torch.nan
    ids = draw(logits, numbers)
    assert ids[[0, 2]].tolist() == alone[[0, 2]].tolist()
    assert 0 <= int(ids[1]) < 300


def test_uniforms_depend_on_seed_and_counter_alone_and_look_uniform() -> None:
    seeds, counters = np.meshgrid(np.arange(64, dtype=np.uint64), np.arange(512))
    numbers = uniforms(seeds, counters)
    assert numbers[100, 9] == uniforms(np.array([9], dtype=np.uint64), np.array([100]))[0]
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(np.unique(numbers)) == numbers.size
    observed = np.histogram(numbers, bins=50, range=(0, 1))[0]
    expected = numbers.size / 50
    assert ((observed - expected) ** 2 / expected).sum() < 98  # 49 degrees of freedom: 99.99 %
    assert abs(np.corrcoef(numbers[:, 0], numbers[:, 1])[0, 1]) < 0.2  # neighbouring seeds
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.02  # neighbouring counters
