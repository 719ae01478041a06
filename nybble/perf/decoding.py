"""`decoding`: sequences of an engine that have their prompts behind them: what decode steps are measured on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

from nybble.core.errors import ConfigError, MeasurementError
from nybble.core.request import Request
from nybble.core.sampling import SamplingParams
from nybble.llm import LLM


class KVMemoryError(ConfigError):
    """A batch's keys and values do not fit in the engine's cache."""


def steps_ahead(batch: int, prompt_len: int, max_num_batched_tokens: int) -> int:
    """Most steps that the first of a batch runs before the last has its prompt behind it, and a few to spare."""
    room = max(1, max_num_batched_tokens - batch)  # for prompts, in a step where all others decode already
    return -(-batch * prompt_len // room) + 5


def random_request(llm: LLM, name: str, prompt_len: int, max_tokens: int) -> Request:
    """Of random ids, the same ones for the same name; greedy, and it does not end before `max_tokens`."""
    draw = random.Random(name)
    ids = [draw.randrange(llm.runner.vocab_size) for _ in range(prompt_len)]
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    return llm.requests.from_prompt(ids, params)


@contextmanager
def decoding(llm: LLM, batch: int, prompt_len: int, num_steps: int) -> Iterator[None]:
    """Inside, each step of the engine, which must have no other work, is one token of all `batch` sequences.

    Args:
        num_steps: that are to be run.

    Raises:
        ConfigError: max_model_len is too small for it.
        KVMemoryError: the KV cache is.
    """
    engine, config = llm.engine, llm.config
    max_tokens = num_steps + steps_ahead(batch, prompt_len, config.max_num_batched_tokens)
    if prompt_len + max_tokens > config.max_model_len:
        raise ConfigError(
            f"a batch of {batch} needs {prompt_len + max_tokens} tokens a sequence to be measured, but max_model_len "
            f"is {config.max_model_len}: lower --context-len"
        )
    requests = [random_request(llm, f"sequence {index}", prompt_len, max_tokens) for index in range(batch)]
    too_large = KVMemoryError(
        f"a batch of {batch} with {prompt_len + max_tokens} tokens each does not fit in the KV cache of "
        f"{llm.report.num_kv_tokens}: lower --batch-sizes or --context-len, or give more KV memory"
    )
    if batch * (prompt_len + num_steps) > llm.report.num_kv_tokens:  # else preemptions would take turns for long
        raise too_large
    num_preemptions = engine.stats.num_preemptions
    try:
        for request in requests:
            engine.add(request)
        waiting = {request.request_id for request in requests}
        while waiting:
            waiting -= {delta.request_id for delta in engine.step() if delta.token_ids}
        stats = engine.stats
        if stats.num_running < batch or stats.num_preemptions > num_preemptions:
            raise too_large
        yield
    finally:
        for request in requests:
            engine.abort(request.request_id)
        while engine.has_work:
            engine.step()


def run_steps(llm: LLM, count: int, batch: int) -> None:
    """So many steps, each of which must bring one token a sequence.

    Raises:
        MeasurementError: one ended, or did not run.
    """
    num_tokens = 0
    for _ in range(count):
        for delta in llm.engine.step():
            if delta.finish_reason is not None:
                raise MeasurementError(f"a sequence ended while it was measured: {delta.error or delta.finish_reason}")
            num_tokens += len(delta.token_ids)
    if num_tokens != count * batch:
        raise MeasurementError(f"{count} steps of {batch} sequences brought {num_tokens} tokens")
