"""The sampler against a distribution computed in plain Python, one parameter at a time and all together."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from support.runner_driver import small_config

from nybble.core.batch import BAD_LOGITS, NO_TOKEN, SequenceStart
from nybble.core.sampling import SamplingParams
from nybble.runner.sampler import plan_arrays, sample
from nybble.runner.sampling_state import SamplingState

VOCAB = 24
PROMPT, OUTPUT = [3, 3, 7, 9], [5, 6, 5, 11]
END_IDS = [0, 2]
NUM_DRAWS = 3000


def distribution(
    logits: list[float], params: SamplingParams, output: list[int], bad_words: list[list[int]]
) -> dict[int, float]:
    """Token id → probability, in the order masks, penalties, temperature, min_p, top_k, top_p. Written for one row."""
    x = dict(enumerate(logits))
    if params.allowed_token_ids is not None:
        x = {t: value for t, value in x.items() if t in params.allowed_token_ids}
    for *prefix, last in bad_words:
        if prefix == (output[-len(prefix) :] if prefix else []):
            x.pop(last, None)
    if len(output) < params.min_tokens:
        for token_id in END_IDS:
            x.pop(token_id, None)
    for token_id in x:
        x[token_id] += (params.logit_bias or {}).get(token_id, 0.0)
        if token_id in PROMPT or token_id in output:
            x[token_id] *= 1 / params.repetition_penalty if x[token_id] > 0 else params.repetition_penalty
        x[token_id] -= params.frequency_penalty * output.count(token_id)
        x[token_id] -= params.presence_penalty * (token_id in output)
    if params.temperature == 0:
        return {max(x, key=lambda t: x[t]): 1.0}
    x = {t: value / params.temperature for t, value in x.items()}
    x = {t: value for t, value in x.items() if math.exp(value - max(x.values())) >= params.min_p}
    ranked = sorted(x, key=lambda t: -x[t])[: params.top_k if params.top_k > 0 else None]
    kept: dict[int, float] = {}
    total = sum(math.exp(x[t]) for t in ranked)
    for token_id in ranked:
        if sum(kept.values()) >= params.top_p * total:
            break
        kept[token_id] = math.exp(x[token_id])
    return {t: weight / sum(kept.values()) for t, weight in kept.items()}


def draw_many(
    logits: torch.Tensor, params: SamplingParams, output: list[int], bad_words: list[list[int]], num_draws: int
) -> list[int]:
    """The same row for many seeds, as one batch."""
    config = small_config(max_num_seqs=num_draws, max_num_batched_tokens=num_draws, vocab_size=VOCAB)
    state = SamplingState(config, VOCAB, torch.device("cpu"))
    for slot in range(num_draws):
        start = SequenceStart(
            slot=slot,
            params=params,
            prompt_token_ids=PROMPT,
            output_token_ids=output,
            seed=slot,
            end_token_ids=END_IDS,
            bad_word_ids=bad_words,
        )
        state.start(start)
    return run(state, logits.expand(num_draws, -1), np.arange(num_draws), np.full(num_draws, len(output)))


def run(state: SamplingState, logits: torch.Tensor, slots: np.ndarray, counters: np.ndarray) -> list[int]:
    plan = state.plan(slots, counters)
    before = logits.clone()
    ids = sample(logits, plan, {name: torch.from_numpy(a) for name, a in plan_arrays(plan).items()}, state)
    assert torch.equal(logits, before) or before.isnan().any(), "log-probabilities need the raw logits afterwards"
    return ids.tolist()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "top_p": {"top_p": 0.7},
    "top_k": {"top_k": 4},
    "top_k and top_p": {"top_k": 6, "top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "min_p, then top_p of what is left": {"min_p": 0.1, "top_p": 0.6},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -1.0},
    "repetition": {"repetition_penalty": 1.8},
    "repetition that encourages": {"repetition_penalty": 0.5},
    "bias": {"logit_bias": {4: 3.0, 5: -100.0, 23: 1.5}},
    "allowed": {"allowed_token_ids": [1, 5, 17, 23]},
    "min_tokens not reached": {"min_tokens": 5, "max_tokens": 9},
    "min_tokens reached": {"min_tokens": 4, "max_tokens": 9},
    "bad words": {"bad_words": ["x"]},
    "all": {
        "temperature": 0.8,
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.02,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.3,
        "logit_bias": {1: 2.0, 9: 1.0},
        "allowed_token_ids": list(range(1, 22)),
        "min_tokens": 6,
        "max_tokens": 9,
        "bad_words": ["x"],
    },
}
BAD_WORDS = [[8], [11, 12], [5, 11, 13], [6, 14], [3, 5, 6, 5, 11, 15]]


@pytest.mark.parametrize("name", CASES)
def test_frequencies_follow_the_distribution(name: str) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 1.5
    params = SamplingParams(**CASES[name])
    bad_words = BAD_WORDS if params.bad_words else []
    expected = distribution(logits.tolist(), params, OUTPUT, bad_words)
    counts = Counter(draw_many(logits, params, OUTPUT, bad_words, NUM_DRAWS))
    assert set(counts) <= set(expected), "a token of probability zero was drawn"
    likely = {t: p * NUM_DRAWS for t, p in expected.items() if p * NUM_DRAWS >= 5}
    rare = NUM_DRAWS - sum(likely.values())
    statistic = sum((counts[t] - e) ** 2 / e for t, e in likely.items())
    assert statistic < 55, "23 degrees of freedom at most: 99.98 %"
    assert sum(counts[t] for t in expected if t not in likely) <= rare + 5 * math.sqrt(rare + 1)


@pytest.mark.parametrize("name", CASES)
def test_greedy_takes_the_likeliest_of_what_is_left(name: str) -> None:
    params = SamplingParams(**{**CASES[name], "temperature": 0.0})
    for seed in range(20):
        logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
        bad_words = BAD_WORDS if params.bad_words else []
        expected = distribution(logits.tolist(), params, OUTPUT, bad_words)
        assert draw_many(logits, params, OUTPUT, bad_words, 1) == list(expected)


@pytest.fixture
def mixed() -> tuple[SamplingState, torch.Tensor]:
    """One slot for each case and one plain greedy one, all with different logits."""
    state = SamplingState(small_config(max_num_seqs=32, vocab_size=VOCAB), VOCAB, torch.device("cpu"))
    for slot, settings in enumerate([*CASES.values(), {"temperature": 0.0}]):
        params = SamplingParams(**settings)
        start = SequenceStart(
            slot=slot,
            params=params,
            prompt_token_ids=PROMPT,
            output_token_ids=OUTPUT,
            seed=99,
            end_token_ids=END_IDS,
            bad_word_ids=BAD_WORDS if params.bad_words else [],
        )
        state.start(start)
    return state, torch.randn(len(CASES) + 1, VOCAB, generator=torch.Generator().manual_seed(8))


def test_a_seeded_row_is_the_same_alone_and_in_any_batch(mixed: tuple[SamplingState, torch.Tensor]) -> None:
    state, logits = mixed
    num_rows = len(logits)
    for counter in range(len(OUTPUT), 30):
        counters = np.full(num_rows, counter)
        together = run(state, logits, np.arange(num_rows), counters)
        alone = [run(state, logits[s : s + 1], np.array([s]), counters[:1])[0] for s in range(num_rows)]
        order = np.random.default_rng(counter).permutation(num_rows)
        shuffled = run(state, logits[torch.from_numpy(order)], order, counters)
        assert together == alone
        assert [together[row] for row in order] == shuffled


def test_rows_with_nan_or_infinities_fail_alone(mixed: tuple[SamplingState, torch.Tensor]) -> None:
    state, logits = mixed
    slots, counters = np.arange(len(logits)), np.full(len(logits), 4)
    clean = run(state, logits, slots, counters)
    for row, value in ((2, torch.nan), (5, torch.inf), (7, -torch.inf), (len(logits) - 1, torch.nan)):
        broken = logits.clone()
        broken[row, 3] = value
        expected = [BAD_LOGITS if r == row else token_id for r, token_id in enumerate(clean)]
        assert run(state, broken, slots, counters) == expected


def test_masks_that_leave_no_token_fail_the_row() -> None:
    params = SamplingParams(allowed_token_ids=[5, 6])
    assert draw_many(torch.zeros(VOCAB), params, [], [[5], [6]], 2) == [NO_TOKEN] * 2
    held_back = SamplingParams(allowed_token_ids=END_IDS, min_tokens=2, temperature=0.0)
    assert draw_many(torch.zeros(VOCAB), held_back, [], [], 1) == [NO_TOKEN]
    bad = torch.zeros(VOCAB)
    bad[9] = -torch.inf
    assert draw_many(bad, params, [], [[5], [6]], 2) == [BAD_LOGITS] * 2, "the model's fault comes first"


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e4},
        {"temperature": 1e-5},
        {"repetition_penalty": 1e3, "temperature": 1e-5},
        {"repetition_penalty": 1e-3, "temperature": 1e-5},
        {"min_p": 1e-300, "top_p": 1e-300},
    ],
)
def test_masks_hold_at_the_ends_of_every_range(extreme: dict[str, float]) -> None:
    params = SamplingParams(**extreme, allowed_token_ids=[10, 11, 12])  # type: ignore[arg-type]
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 30
    assert set(draw_many(logits, params, [10, 12], [], 50)) <= {10, 11, 12}


def test_ids_that_only_the_tokenizer_knows_are_ignored() -> None:
    params = SamplingParams(
        temperature=0.0, min_tokens=2, logit_bias={VOCAB: 100.0, 4: 50.0}, allowed_token_ids=[4, VOCAB + 9]
    )
    state = SamplingState(small_config(vocab_size=VOCAB), VOCAB, torch.device("cpu"))
    start = SequenceStart(
        slot=0, params=params, prompt_token_ids=[1], end_token_ids=[VOCAB, 5], bad_word_ids=[[VOCAB + 1], [VOCAB, 4]]
    )
    state.start(start)
    assert run(state, torch.zeros(1, VOCAB), np.array([0]), np.array([0])) == [4]


def test_a_batch_asks_for_no_more_work_than_its_rows_do(mixed: tuple[SamplingState, torch.Tensor]) -> None:
    state, logits = mixed
    greedy = len(logits) - 1
    assert state.plan(np.array([greedy]), np.array([4])).is_argmax
    plain = state.plan(np.array([0, greedy]), np.array([4, 4]))
    work = (plain.has_penalties, plain.has_allowed, plain.has_min_p, plain.num_sorted, plain.bias, plain.banned)
    assert not plain.is_argmax
    assert work == (False, False, False, 0, None, None)
    assert plain.bad_words is None
    assert state.plan(np.arange(len(logits)), np.full(len(logits), 4)).num_sorted == VOCAB
    assert state.plan(np.array([list(CASES).index("top_k")]), np.array([4])).num_sorted == 4


def test_a_reused_slot_forgets_its_allowed_tokens_beside_a_row_that_has_some() -> None:
    state = SamplingState(small_config(vocab_size=VOCAB), VOCAB, torch.device("cpu"))
    for slot, allowed in ((0, [5]), (1, [6]), (0, None)):
        params = SamplingParams(temperature=0.0, allowed_token_ids=allowed)
        state.start(SequenceStart(slot=slot, params=params, prompt_token_ids=[1]))
    logits = torch.zeros(2, VOCAB)
    logits[:, 9] = 1.0
    assert run(state, logits, np.array([0, 1]), np.array([0, 0])) == [9, 6]


def test_a_batch_that_stays_the_same_is_put_together_once() -> None:
    """No Python for each row in a steady step, whatever lists the rows bring; a new sequence counts at once."""
    state = SamplingState(small_config(vocab_size=VOCAB), VOCAB, torch.device("cpu"))

    def start(slot: int, bias: dict[int, float]) -> None:
        own = SamplingParams(logit_bias=bias, min_tokens=6, max_tokens=50)
        state.start(
            SequenceStart(slot=slot, params=own, prompt_token_ids=[1], end_token_ids=[0, 2], bad_word_ids=[[4, 5]])
        )

    start(0, {3: 1.0})
    start(1, {7: -1.0})
    slots = np.array([1, 0])
    first, second = (state.plan(slots, np.array([count, count])) for count in (5, 6))
    assert first.bias is second.bias
    assert first.bad_words is second.bad_words
    assert first.bias is not None
    assert [array.tolist() for array in first.bias] == [[0, 1], [7, 3], [-1.0, 1.0]]
    assert first.banned is not None
    assert [array.tolist() for array in first.banned] == [[0, 0, 1, 1], [0, 2, 0, 2]]
    assert second.banned is None, "both have reached min_tokens"
    uneven = state.plan(slots, np.array([6, 5])).banned
    assert uneven is not None
    assert [array.tolist() for array in uneven] == [[1, 1], [0, 2]]
    start(1, {8: 2.0})
    third = state.plan(slots, np.array([0, 0])).bias
    assert third is not None
    assert third[1].tolist() == [8, 3]


def test_masks_of_single_rows() -> None:
    """Token v is bit v % 32 of a row's mask; rows without a mask, and raw logits, are left alone."""
    num_rows = 60
    config = small_config(max_num_seqs=num_rows, max_num_batched_tokens=num_rows, vocab_size=40)
    state = SamplingState(config, 40, torch.device("cpu"))
    for slot in range(num_rows):
        temperature = 0.0 if slot % 2 else 1.0
        params = SamplingParams(temperature=temperature, allowed_token_ids=[3, 39] if slot % 5 == 0 else None)
        state.start(SequenceStart(slot=slot, params=params, prompt_token_ids=[1], seed=slot))
    allowed = {row: [3, 17, 33 + row % 6] for row in range(num_rows) if row % 3 == 0}
    allowed[9] = []
    masks = [None if row not in allowed else mask_of(allowed[row]) for row in range(num_rows)]
    logits = torch.randn(num_rows, 40, generator=torch.Generator().manual_seed(0))
    before = logits.clone()

    def draw(masks: list[bytes | None]) -> list[int]:
        plan = state.plan(np.arange(num_rows), np.zeros(num_rows, dtype=np.int64), masks)
        device = {name: torch.from_numpy(array) for name, array in plan_arrays(plan).items()}
        return sample(logits, plan, device, state).tolist()

    free, bound = draw([None] * num_rows), draw(masks)
    assert torch.equal(logits, before)
    for row, token_id in enumerate(bound):
        if row == 9:
            assert token_id == NO_TOKEN
        elif row in allowed:
            most = set(allowed[row]) & {3, 39} if row % 5 == 0 else set(allowed[row])
            assert token_id in most
        else:
            assert token_id == free[row]


def mask_of(token_ids: list[int]) -> bytes:
    return sum(1 << token_id for token_id in token_ids).to_bytes(8, "little")
