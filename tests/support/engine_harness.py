"""Drives an engine on the fake runner and checks the books after every step."""

from collections import Counter

from support.fake_runner import EOS, VOCAB_SIZE, FakeRunner, cells_of, next_token, small_config

from nybble.core.outputs import CompletionOutput, RequestOutput, SequenceDelta
from nybble.core.request import Request
from nybble.core.sampling import SamplingParams
from nybble.engine.engine import Engine
from nybble.engine.scheduler import Scheduler


def request(request_id: str, prompt: list[int], **params: object) -> Request:
    return Request(request_id=request_id, prompt_token_ids=prompt, params=SamplingParams(**params))  # type: ignore[arg-type]


class Harness:
    """An engine, its runner, and the outputs so far."""

    def __init__(self, num_blocks: int = 32, *, is_async: bool = False, faults: dict[int, str] | None = None, **config):
        self.config = small_config(**config)
        self.runner = FakeRunner(self.config, num_blocks, is_async=is_async, faults=faults)
        self.engine = Engine(
            self.runner, self.config, tokenizer=None, eos_token_ids=[EOS], vocab_size=VOCAB_SIZE, clock=lambda: 1.0
        )
        self.outputs: dict[str, RequestOutput] = {}
        self.num_ends: Counter[tuple[str, int]] = Counter()

    @property
    def scheduler(self) -> Scheduler:
        return self.engine._scheduler

    def add(self, request: Request) -> None:
        self.engine.add(request)
        self.outputs[request.request_id] = RequestOutput(
            request_id=request.request_id,
            prompt=None,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[CompletionOutput(index=i, token_ids=[]) for i in range(request.params.n)],
        )

    def step(self) -> list[SequenceDelta]:
        deltas = self.engine.step()
        for delta in deltas:
            key = (delta.request_id, delta.index)
            assert not self.num_ends[key], f"{key} goes on after its end"
            self.num_ends[key] += delta.finish_reason is not None
            self.outputs[delta.request_id].add(delta)
        check_books(self.scheduler)
        return deltas

    def run(self, max_steps: int = 1000) -> dict[str, RequestOutput]:
        for _ in range(max_steps):
            if not self.engine.has_work:
                check_idle(self.scheduler)
                return self.outputs
            self.step()
        raise AssertionError(f"not done after {max_steps} steps: {self.engine.stats}")

    def tokens(self, request_id: str, index: int = 0) -> list[int]:
        return self.outputs[request_id].outputs[index].token_ids

    def reason(self, request_id: str, index: int = 0) -> str | None:
        return self.outputs[request_id].outputs[index].finish_reason


def alone(request: Request, seed: int | None = None, eos: int = EOS, max_model_len: int = 64) -> list[int]:
    """The tokens that a request of one completion must get, by definition and without an engine."""
    params = request.params
    seed = params.seed if seed is None else seed
    assert seed is not None
    ends = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else {eos})
    tokens = list(request.prompt_token_ids)
    most = min(params.max_tokens or max_model_len, max_model_len - len(tokens))
    outputs: list[int] = []
    while len(outputs) < most and not (outputs and outputs[-1] in ends):
        masked = ends if len(outputs) < params.min_tokens else set()
        outputs.append(next_token(cells_of(tokens + outputs), seed, len(outputs), masked))
    return outputs


def check_books(scheduler: Scheduler) -> None:
    """Every block is held by exactly the sequences that say so, or free, once."""
    pool = scheduler.pool
    holders = Counter(block_id for sequence in scheduler.running for block_id in sequence.block_ids)
    assert [holders[i] for i in range(pool.num_blocks)] == pool._ref_counts
    free = pool._blank + list(pool._idle)
    assert sorted(free) == [i for i in range(pool.num_blocks) if not holders[i]]
    assert pool.num_used == len(holders)
    assert {block_id: key for key, block_id in pool._block_of.items()} == {
        i: key for i, key in enumerate(pool._key_of) if key is not None
    }
    assert all(pool._key_of[i] is not None for i in pool._idle)
    assert all(pool._key_of[i] is None for i in pool._blank)
    slots = [sequence.slot for sequence in scheduler.running] + scheduler._free_slots
    assert sorted(slots) == list(range(len(slots)))
    for queue in (scheduler.running, scheduler.waiting):
        assert [s.rank for s in queue] == sorted(s.rank for s in queue)
        assert all(not s.is_finished for s in queue)
    assert all(s.slot is None and not s.block_ids for s in scheduler.waiting)


def check_idle(scheduler: Scheduler) -> None:
    """Nothing is left behind when all requests have ended."""
    check_books(scheduler)
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    if not scheduler.pool.keeps_idle_blocks:
        assert not scheduler.pool._block_of
