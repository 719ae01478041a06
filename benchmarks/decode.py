"""Prefill and decode speed of a synthetic model, and whether its tokens repeat.

    python -m benchmarks.decode --size 32b --batches 1,16,64

Each batch runs twice from fresh prompts (no prefix hits). A step's time is the host's time from step to step, the
median of the pure-decode steps; prefill is the time until every sequence has its first token.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from benchmarks.synthetic import SIZES, directory
from nybble.build import build
from nybble.core.config import EngineConfig
from nybble.core.request import Request
from nybble.core.sampling import SamplingParams
from nybble.engine.engine import Engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="32b", choices=SIZES)
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--prompt", type=int, default=512, help="tokens a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens a completion")
    parser.add_argument("--random", action="store_true", help="temperature 0.8, top_p 0.95 instead of greedy")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--kernels", default="", help="operation=implementation,…")
    options = parser.parse_args()
    batches = [int(batch) for batch in options.batches.split(",")]
    built = build(
        EngineConfig(
            model=directory(options.size),
            load_format="dummy",
            max_num_seqs=max(batches),
            max_model_len=options.prompt + options.new,
            enforce_eager=options.eager,
            kernels=dict(pair.split("=") for pair in options.kernels.split(",") if pair),
        )
    )
    print(*built.report.lines(), sep="\n", flush=True)
    random_sampling = {"temperature": 0.8, "top_p": 0.95, "seed": 7} if options.random else {"temperature": 0}
    params = SamplingParams(max_tokens=options.new, ignore_eos=True, detokenize=False, **random_sampling)
    for batch in batches:
        first, second = (run(built.engine, batch, options.prompt, params, salt) for salt in ("first", "second"))
        print(f"batch {batch:3d}: the second run's tokens are {'the same' if first == second else 'DIFFERENT'}")
    built.engine.close()


def run(engine: Engine, batch: int, prompt_length: int, params: SamplingParams, salt: str) -> list[list[int]]:
    """Generate once, print the speed, return the tokens. The salt keeps a run from hitting another's prefixes."""
    draw = random.Random(batch)
    outputs: dict[str, list[int]] = {}
    for index in range(batch):
        prompt = [draw.randrange(1000, 100_000) for _ in range(prompt_length)]
        engine.add(Request(request_id=str(index), prompt_token_ids=prompt, params=params, cache_salt=salt))
        outputs[str(index)] = []
    begin = time.perf_counter()
    prefilled = None
    seconds = []
    while engine.has_work:
        step_begin = time.perf_counter()
        for delta in engine.step():
            assert delta.error is None, delta.error
            outputs[delta.request_id] += delta.token_ids
        seconds.append(time.perf_counter() - step_begin)
        if prefilled is None and all(outputs.values()):
            prefilled = time.perf_counter() - begin
    assert prefilled is not None
    assert params.max_tokens is not None
    steps = sorted(seconds[-(params.max_tokens - 8) :])
    median = statistics.median(steps)
    low, high = steps[len(steps) // 10], steps[-len(steps) // 10]
    print(
        f"batch {batch:3d}: prefill {prefilled:.3f} s = {batch * prompt_length / prefilled:,.0f} tokens/s; decode step "
        f"{median * 1e3:.2f} ms (p10 {low * 1e3:.2f}, p90 {high * 1e3:.2f}) = {batch / median:,.0f} tokens/s",
        flush=True,
    )
    return list(outputs.values())


if __name__ == "__main__":
    main()
