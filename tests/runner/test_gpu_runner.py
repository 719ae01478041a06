"""The runner on CUDA: graphs, padding, overlap, and memory that holds what was accepted.

Everything is compared with the same model on the same device computed densely, or with an eager runner.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.paged_model import PagedModel
from support.runner_driver import GREEDY, Driver, small_config

from nybble.core.batch import BAD_LOGITS
from nybble.core.config import MemorySetting, ResolvedConfig
from nybble.core.errors import MemoryBudgetError
from nybble.core.sampling import SamplingParams
from nybble.runner import measure
from nybble.runner.graphs import StepSize, decode_sizes, step_sizes
from nybble.runner.measure import measure_gpu, plan_memory, release_gpu, run_worst, warm_up
from nybble.runner.model_runner import ModelRunner

PROMPTS = [[(7 * row + 3 * column) % 61 for column in range(1 + 3 * row % 17)] for row in range(11)]


def test_graph_sizes() -> None:
    assert decode_sizes(1) == [1]
    assert decode_sizes(6) == [1, 2, 3, 4, 5, 6]
    assert decode_sizes(13) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13]
    assert decode_sizes(256)[-3:] == [224, 240, 256]
    assert decode_sizes(1000) == decode_sizes(256)
    assert len(decode_sizes(256)) == 8 + 4 + 4 + 12 + 8


def test_graphs_of_prompts_hold_no_more_than_a_step_may() -> None:
    prompts = [size for size in step_sizes(20, 100) if not size.is_decode]
    assert prompts == [
        StepSize(*size) for size in ((16, 8), (16, 16), (32, 8), (32, 20), (64, 8), (64, 20), (96, 8), (96, 20))
    ]
    assert [size for size in step_sizes(20, 100) if size.is_decode] == [StepSize(n, n, True) for n in decode_sizes(20)]
    assert max(size.num_tokens for size in step_sizes(8, 8192)) == 512
    assert max(size.num_tokens for size in step_sizes(8, 8192, longest=64)) == 64


@pytest.fixture(scope="module")
def model() -> PagedModel:
    return PagedModel(device="cuda")


@pytest.fixture(scope="module")
def graphed(model: PagedModel) -> Iterator[ModelRunner]:
    runner = make_runner(model)
    runner.capture_graphs()
    yield runner
    runner.close()


def make_runner(model: PagedModel, **settings: bool) -> ModelRunner:
    return ModelRunner(model, gpu_config(max_num_seqs=11, **settings), num_blocks=256)


def gpu_config(**settings: object) -> ResolvedConfig:
    return small_config(device="cuda", **{"max_num_batched_tokens": 128, **settings})


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 9, 10, 11])
def test_graphs_give_the_dense_models_tokens_at_exact_and_padded_sizes(
    model: PagedModel, graphed: ModelRunner, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed = []
    replay = graphed._graphs.replay
    monkeypatch.setattr(graphed._graphs, "replay", lambda size: (replayed.append(size), replay(size)))
    driver = Driver(graphed)
    for slot, prompt in enumerate(PROMPTS[:num_rows]):
        driver.add(slot, prompt)
    outputs = driver.generate(*range(num_rows), num_tokens=6)
    assert outputs == [model.greedy(prompt, 6) for prompt in PROMPTS[:num_rows]]
    decode = next(size for size in graphed.graph_sizes if size.is_decode and size.num_rows >= num_rows)
    assert replayed[-5:] == [decode] * 5
    assert not any(size.is_decode for size in replayed[:-5])


@pytest.mark.gpu
def test_prompts_beside_decoding_rows_in_graphs_give_the_dense_models_tokens(
    model: PagedModel, graphed: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed = []
    replay = graphed._graphs.replay
    monkeypatch.setattr(graphed._graphs, "replay", lambda size: (replayed.append(size), replay(size)))
    driver = Driver(graphed)
    for slot in (1, 5, 4):
        driver.add(slot, PROMPTS[slot])
    driver.prefill(1)
    for chunk in (3, 1, 4, len(PROMPTS[5]) - 8):
        driver.step({5: chunk, 1: 1})
    driver.step({4: len(PROMPTS[4]), 5: 1, 1: 1})
    assert [size.is_decode for size in replayed] == [False] * 6
    assert driver.sequences[1].output == model.greedy(PROMPTS[1], 6)
    assert driver.sequences[5].output == model.greedy(PROMPTS[5], 2)
    assert driver.sequences[4].output == model.greedy(PROMPTS[4], 1)


@pytest.mark.gpu
def test_padding_rows_write_no_key_and_no_value(graphed: ModelRunner) -> None:
    driver = Driver(graphed)
    for slot in range(9):  # replayed at size 10
        driver.add(slot, PROMPTS[slot])
    driver.prefill(*range(9))
    before = graphed.kv_cache._storage.clone()
    batch = driver.batch(dict.fromkeys(range(9), 1))
    driver.apply(batch, graphed.submit(batch))
    changed = (graphed.kv_cache._storage != before).any(-1)[0, 0, :, 0].sum()  # cells of layer 0's keys, head 0
    assert int(changed) <= 9


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [False, True])
def test_overlapped_steps_read_their_inputs_from_the_device(model: PagedModel, eager: bool) -> None:
    """Twice as many steps as there could be buffers, each submitted before the one before it was read."""
    runner = make_runner(model, enforce_eager=eager)
    runner.capture_graphs()
    driver = Driver(runner)
    mixed = {2: SamplingParams(temperature=0.9, top_p=0.9, repetition_penalty=1.2, logprobs=2)}
    for round_ in range(2):
        for slot, prompt in enumerate(PROMPTS[:5]):
            driver.add(slot, prompt, mixed.get(slot, GREEDY), seed=3)
        generate = driver.generate_overlapped if round_ == 0 else driver.generate
        outputs = generate(*range(5), num_tokens=12)
        if round_ == 0:
            overlapped = [list(output) for output in outputs]
    assert outputs == overlapped
    for slot in (0, 1, 3, 4):
        assert overlapped[slot] == model.greedy(PROMPTS[slot], 12)
    assert len(driver.logprobs[2]) == 12
    runner.close()


@pytest.mark.gpu
def test_submit_returns_before_the_step_is_done(model: PagedModel, graphed: ModelRunner) -> None:
    driver = Driver(graphed)
    driver.add(0, PROMPTS[1])
    driver.prefill(0)
    with torch.cuda.stream(graphed._cuda_stream):
        torch.cuda._sleep(200_000_000)  # clock cycles: 0.1 s
    batch = driver.batch({0: 1})
    pending = graphed.submit(batch)
    assert not pending.done.query()
    driver.apply(batch, pending)
    assert driver.sequences[0].output == model.greedy(PROMPTS[1], 2)


@pytest.mark.gpu
def test_random_sampling_equals_the_eager_runner(model: PagedModel, graphed: ModelRunner) -> None:
    params = [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.2, top_p=0.8, min_p=0.02),
        SamplingParams(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.2, allowed_token_ids=list(range(40))),
        GREEDY,
    ]
    eager = make_runner(model, enforce_eager=True)
    outputs = []
    for runner in (graphed, eager):
        driver = Driver(runner)
        for slot, chosen in enumerate(params):
            driver.add(slot, PROMPTS[slot], chosen, seed=slot, bad_word_ids=([1, 2], [3]))
        outputs.append(driver.generate(*range(5), num_tokens=10))
    assert outputs[0] == outputs[1]
    eager.close()


class PoisonedHead(PagedModel):
    """NaN where the hidden state belongs to a row that reads token 50 (its embedding is marked)."""

    def __init__(self) -> None:
        super().__init__(device="cuda")
        self.embedding[50] = 1e4

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        poisoned = hidden.abs().amax(-1, keepdim=True) > 5e3
        return super().logits(hidden).masked_fill(poisoned, torch.nan)


@pytest.mark.gpu
def test_bad_logits_in_a_graph_end_only_their_own_row() -> None:
    model = PoisonedHead()
    runner = make_runner(model)
    runner.capture_graphs()
    driver = Driver(runner)
    driver.add(0, PROMPTS[0])
    driver.add(1, PROMPTS[1])
    driver.prefill(0, 1)
    driver.sequences[0].output[-1] = 50
    batch = driver.batch({0: 1, 1: 1})
    batch.rows[0].token_ids = [50]
    driver.apply(batch, runner.submit(batch))
    assert driver.sequences[0].output[-1] == BAD_LOGITS
    assert driver.sequences[1].output == model.greedy(PROMPTS[1], 2)
    runner.close()


# Memory: a vocabulary and batch that make the workspace (logits, sampler) matter beside a cache of a few hundred MB.


@pytest.fixture(scope="module")
def wide_model() -> PagedModel:
    return PagedModel(vocab_size=100_000, device="cuda")


def wide_config(name: str, value: float, **settings: object) -> ResolvedConfig:
    config = gpu_config(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=256, vocab_size=100_000, **settings)
    return replace(config, memory=MemorySetting(name, value))  # type: ignore[arg-type]


@pytest.mark.gpu
def test_the_workspace_covers_what_a_warm_runner_takes(wide_model: PagedModel) -> None:
    config = wide_config("kv_cache_memory_bytes", 64 << 20)
    facts, budget = plan_memory(wide_model, config)
    assert facts.workspace_bytes > 64 * 100_000 * 4, "at least one batch of logits"
    release_gpu()
    free = torch.cuda.mem_get_info()[0]
    runner = ModelRunner(wide_model, config, num_blocks=budget.num_blocks)
    warm_up(runner, config)
    for _ in range(3):
        run_worst(runner, config)
    torch.cuda.synchronize()
    taken = free - torch.cuda.mem_get_info()[0] - budget.kv_bytes
    assert taken <= facts.workspace_bytes + facts.margin_bytes
    runner.close()


@pytest.mark.gpu
def test_measuring_leaves_nothing_behind(wide_model: PagedModel) -> None:
    config = wide_config("kv_cache_memory_bytes", 64 << 20)
    measure_gpu(wide_model, config)  # loads kernels and libraries, which stay
    release_gpu()
    before = torch.cuda.memory_reserved()
    first = measure_gpu(wide_model, config)
    assert torch.cuda.memory_reserved() - before <= 64 << 20
    second = measure_gpu(wide_model, config)
    assert abs(first.workspace_bytes - second.workspace_bytes) <= measure.MARGIN_BYTES


@pytest.mark.gpu
def test_memory_taken_by_others_is_refused_with_what_would_fit(wide_model: PagedModel) -> None:
    """Another tensor plays the other process: most of the device is gone, so 0.3 of the whole cannot be had."""
    release_gpu()
    free, total = torch.cuda.mem_get_info()
    hog = torch.empty(int(free - 0.4 * total), dtype=torch.uint8, device="cuda")
    try:
        with pytest.raises(MemoryBudgetError, match="gpu_memory_utilization from"):
            plan_memory(wide_model, wide_config("gpu_memory_utilization", 0.3))
        with pytest.raises(MemoryBudgetError, match="cache_max_entry_count from"):
            plan_memory(wide_model, wide_config("cache_max_entry_count", 0.999))
    finally:
        del hog
        release_gpu()


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0.3, 0.6])
def test_an_accepted_share_survives_bursts_of_every_size(wide_model: PagedModel, count: float) -> None:
    """All but ~4 GB of the device is taken: a few hundred megabytes miscounted would end in an allocation failure."""
    release_gpu()
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - 4 * 10**9, dtype=torch.uint8, device="cuda")
    runner = None
    try:
        config = wide_config("cache_max_entry_count", count)
        _, budget = plan_memory(wide_model, config)
        runner = ModelRunner(wide_model, config, num_blocks=budget.num_blocks)
        warm_up(runner, config)
        everything = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1, logprobs=20)
        for num_rows in (64, 1, 33, 64, 7, 50):
            driver = Driver(runner)
            for slot in range(num_rows):
                driver.add(slot, [1] * (512 // num_rows if num_rows > 2 else 250), everything if slot % 2 else GREEDY)
            driver.generate_overlapped(*range(num_rows), num_tokens=4)
        run_worst(runner, config)
    finally:
        if runner is not None:
            runner.close()
        del hog, runner
        release_gpu()
