"""The runner's step on a CPU: tokens equal those of the same model computed densely, whatever the batch looks like."""

import pytest
import torch
from support.paged_model import PagedModel
from support.runner_driver import GREEDY, Driver, small_config

from nybble.core.batch import BAD_LOGITS, DEVICE_TOKEN
from nybble.core.sampling import SamplingParams
from nybble.runner.graphs import StepGraphs, StepSize
from nybble.runner.measure import run_worst
from nybble.runner.model_runner import ModelRunner

PROMPTS = [[3, 5, 7, 11, 13, 17, 19, 23, 29, 31], [2], [40, 41, 42, 43, 44, 45, 46, 47]]


@pytest.fixture(scope="module")
def model() -> PagedModel:
    return PagedModel()


@pytest.fixture
def driver(model: PagedModel) -> Driver:
    return Driver(ModelRunner(model, small_config(), num_blocks=64))


def test_greedy_in_a_batch_equals_the_dense_model(model: PagedModel, driver: Driver) -> None:
    for slot, prompt in zip((5, 0, 2), PROMPTS, strict=True):
        driver.add(slot, prompt)
    assert driver.generate(5, 0, 2, num_tokens=20) == [model.greedy(prompt, 20) for prompt in PROMPTS]


def test_chunked_prefill_mixed_with_decode(model: PagedModel, driver: Driver) -> None:
    driver.add(1, PROMPTS[1])
    driver.add(3, PROMPTS[0])
    driver.prefill(1)
    for chunk in (3, 1, 4, 2):
        driver.step({3: chunk, 1: 1})
    for _ in range(5):
        driver.step({1: 1, 3: 1})
    assert driver.sequences[3].output == model.greedy(PROMPTS[0], 6)
    assert driver.sequences[1].output == model.greedy(PROMPTS[1], 10)


class PlainGraphs(StepGraphs):
    """Runs the step that a graph would replay: what CUDA graphs compute, on a CPU."""

    def __init__(self, runner: ModelRunner, sizes: list[StepSize]) -> None:
        runner._make_graph_results(sizes)
        runner._graphs = self
        self.sizes, self._graphs, self._step = sizes, dict.fromkeys(sizes), runner._staged_step
        self.replayed: list[StepSize] = []

    def replay(self, size: StepSize) -> None:
        self.replayed.append(size)
        self._step(size)


def test_padded_steps_give_the_dense_models_tokens(model: PagedModel) -> None:
    """Prompts, chunks of them beside decoding rows, and decode, each in a step larger than it needs."""
    runner = ModelRunner(model, small_config(), num_blocks=64)
    decode, mixed = StepSize(4, 4, is_decode=True), StepSize(12, 4)
    graphs = PlainGraphs(runner, [decode, mixed])
    driver = Driver(runner)
    driver.add(1, PROMPTS[1])
    driver.add(3, PROMPTS[0])
    driver.prefill(1)
    for chunk in (3, 1, 4, 2):
        driver.step({3: chunk, 1: 1})
    for _ in range(5):
        driver.step({1: 1, 3: 1})
    assert driver.sequences[3].output == model.greedy(PROMPTS[0], 6)
    assert driver.sequences[1].output == model.greedy(PROMPTS[1], 10)
    # A row that starts, or waits for more of its prompt, is no decode row, though it brings one token.
    assert graphs.replayed == [mixed] * 5 + [decode] * 5


def test_padded_steps_take_ids_that_are_still_on_the_device(model: PagedModel) -> None:
    runner = ModelRunner(model, small_config(), num_blocks=64, is_async=True)
    graphs = PlainGraphs(runner, [StepSize(16, 8)])
    driver = Driver(runner)
    driver.add(1, PROMPTS[2])
    driver.add(3, PROMPTS[0], SamplingParams(temperature=1.0, logprobs=1), seed=4)
    first, second = (driver.batch(new) for new in ({1: 8}, {3: 10, 1: 1}))
    assert second.rows[1].token_ids == [DEVICE_TOKEN]
    pending = [runner.submit(batch) for batch in (first, second)]
    for batch, result in zip((first, second), pending, strict=True):
        driver.apply(batch, result)
    assert graphs.replayed == [StepSize(16, 8)] * 2
    assert driver.sequences[1].output == model.greedy(PROMPTS[2], 2)
    assert len(driver.logprobs[3]) == 1
    alone = Driver(ModelRunner(model, small_config(), num_blocks=64))
    alone.add(0, PROMPTS[0], SamplingParams(temperature=1.0, logprobs=1), seed=4)
    alone.prefill(0)
    assert driver.sequences[3].output == alone.sequences[0].output


def test_a_step_without_a_graph_that_holds_it_runs_as_it_is(model: PagedModel) -> None:
    runner = ModelRunner(model, small_config(), num_blocks=64)
    graphs = PlainGraphs(runner, [StepSize(8, 2)])
    driver = Driver(runner)
    for slot, prompt in enumerate(PROMPTS):
        driver.add(slot, prompt)
    driver.prefill(0)  # 10 tokens
    driver.prefill(2)  # 8
    driver.prefill(1)  # 1
    assert graphs.replayed == [StepSize(8, 2)] * 2
    assert [driver.sequences[slot].output for slot in range(3)] == [model.greedy(prompt, 1) for prompt in PROMPTS]


def test_ids_stay_on_the_device_between_overlapped_steps(model: PagedModel) -> None:
    driver = Driver(ModelRunner(model, small_config(), num_blocks=64, is_async=True))
    assert driver.runner.is_async
    params = SamplingParams(temperature=1.0, repetition_penalty=1.3)
    for slot, prompt in enumerate(PROMPTS):
        driver.add(slot, prompt, GREEDY if slot < 2 else params, seed=4)
    overlapped = driver.generate_overlapped(0, 1, 2, num_tokens=12)
    assert overlapped[:2] == [model.greedy(prompt, 12) for prompt in PROMPTS[:2]]
    for slot, prompt in enumerate(PROMPTS):
        driver.add(slot, prompt, GREEDY if slot < 2 else params, seed=4)
    assert driver.generate(0, 1, 2, num_tokens=12) == overlapped


def test_a_device_token_can_follow_known_ids_in_one_row(model: PagedModel, driver: Driver) -> None:
    """After a preemption with a step in flight, say: output known to the host, then the one still on the device."""
    driver.add(0, PROMPTS[0])
    first = driver.batch({0: 10})
    pending = driver.runner.submit(first)
    second = driver.batch({0: 1})
    second.rows[0].start, second.rows[0].token_ids = 7, [*PROMPTS[0][7:], -1]
    pending_second = driver.runner.submit(second)
    driver.apply(first, pending)
    driver.apply(second, pending_second)
    assert driver.sequences[0].output == model.greedy(PROMPTS[0], 2)


def test_a_partial_prefill_does_not_disturb_the_slots_last_id(model: PagedModel, driver: Driver) -> None:
    driver.add(0, PROMPTS[0])
    driver.add(1, PROMPTS[1])
    driver.prefill(1)
    driver.step({0: 4})  # samples nothing
    assert driver.sequences[0].output == []
    driver.step({0: 6, 1: 1})
    assert driver.sequences[0].output == model.greedy(PROMPTS[0], 1)


def test_restart_recomputes_prompt_and_output(model: PagedModel, driver: Driver) -> None:
    params = SamplingParams(temperature=0.8, frequency_penalty=0.7, repetition_penalty=1.2)
    driver.add(0, PROMPTS[0], params, seed=11)
    expected = list(driver.generate(0, num_tokens=15)[0])
    driver.add(0, PROMPTS[0], params, seed=11)
    driver.generate(0, num_tokens=6)
    driver.restart(0)
    driver.prefill(0)
    for _ in range(8):
        driver.step({0: 1})
    assert driver.sequences[0].output == expected


def test_a_reused_slot_remembers_nothing(driver: Driver) -> None:
    heavy = SamplingParams(
        temperature=0.0,
        repetition_penalty=50.0,
        logit_bias={5: 100.0},
        allowed_token_ids=[5, 6],
        min_tokens=3,
        max_tokens=50,
        logprobs=3,
    )
    driver.add(1, PROMPTS[0])
    clean = list(driver.generate(1, num_tokens=8)[0])
    driver.add(1, PROMPTS[2], heavy, end_token_ids=(6,), bad_word_ids=([5, 5], [6]))
    driver.generate(1, num_tokens=4)
    driver.add(1, PROMPTS[0])
    assert driver.generate(1, num_tokens=8)[0] == clean
    assert driver.logprobs[1] == [None] * 8


def test_prompt_logprobs_in_chunks_and_slices(model: PagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.runner.sampler._SLICE_ELEMENTS", 3 * 61)
    driver = Driver(ModelRunner(model, small_config(), num_blocks=64))
    prompt = PROMPTS[0]
    driver.add(0, prompt, SamplingParams(temperature=0.0, prompt_logprobs=2))
    driver.add(1, PROMPTS[1])
    driver.step({1: 1, 0: 7})
    driver.step({0: 3, 1: 1})
    found = driver.prompt_logprobs[0]
    expected = model.dense_logits(prompt).log_softmax(-1)
    assert len(found) == len(prompt) - 1
    for position, logprobs in enumerate(found):
        token_id = prompt[position + 1]
        assert next(iter(logprobs)) == token_id
        assert logprobs[token_id].logprob == pytest.approx(float(expected[position, token_id]), abs=1e-4)
        assert {*expected[position].topk(2).indices.tolist(), token_id} == set(logprobs)
    assert driver.sequences[0].output == model.greedy(prompt, 1)
    assert driver.prompt_logprobs[1] == []


def test_logprobs_are_of_the_unmodified_distribution(model: PagedModel, driver: Driver) -> None:
    params = SamplingParams(temperature=0.0, logprobs=3, logit_bias={9: 100.0})
    driver.add(0, PROMPTS[0], params)
    driver.add(1, PROMPTS[1])
    assert driver.generate(0, 1, num_tokens=2)[0] == [9, 9]
    expected = model.dense_logits(PROMPTS[0])[-1].log_softmax(-1)
    assert driver.logprobs[0][0][9].logprob == pytest.approx(float(expected[9]), abs=1e-4)
    assert set(driver.logprobs[0][0]) == {9, *expected.topk(3).indices.tolist()}
    assert driver.logprobs[1] == [None, None]


class PoisonedModel(PagedModel):
    """Gives NaN or infinite logits after certain tokens."""

    def forward(self, token_ids: torch.Tensor, ctx) -> torch.Tensor:
        self.seen = token_ids
        return super().forward(token_ids, ctx)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().logits(hidden)
        last = self.seen[-len(logits) :] if len(self.seen) == len(logits) else self.seen[:0]
        for token_id, value in ((50, torch.nan), (51, torch.inf), (52, -torch.inf)):
            logits[: len(last)][last == token_id, 3] = value
        return logits


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.0, top_p=0.9, min_p=0.1, top_k=5)])
def test_bad_logits_end_only_their_own_row(params: SamplingParams) -> None:
    model = PoisonedModel()
    driver = Driver(ModelRunner(model, small_config(), num_blocks=64))
    for slot, prompt in enumerate([[50], [51], [52], [2]]):
        driver.add(slot, prompt, params)
    driver.prefill(0, 1, 2, 3)
    outputs = [driver.sequences[slot].output for slot in range(4)]
    assert outputs[:3] == [[BAD_LOGITS]] * 3
    alone = Driver(ModelRunner(model, small_config(), num_blocks=64))
    alone.add(3, [2], params)
    assert alone.generate(3, num_tokens=1) == [outputs[3]]
    # A step was already submitted that takes the failed row's id from the device: it must stay in the vocabulary.
    driver.runner.submit(driver.batch(dict.fromkeys(range(4), 1))).result()


def test_the_worst_steps_run_in_block_0_of_a_cache_of_one_block(model: PagedModel) -> None:
    config = small_config(max_num_batched_tokens=40)
    run_worst(ModelRunner(model, config, num_blocks=1), config)


def test_a_step_with_too_many_blocks_for_a_sequence_is_a_broken_invariant(driver: Driver) -> None:
    driver.add(0, PROMPTS[0])
    batch = driver.batch({0: 10})
    batch.rows[0].new_block_ids = list(range(9))  # max_model_len 64 needs 8
    with pytest.raises(AssertionError, match="max_model_len"):
        driver.runner.submit(batch)
