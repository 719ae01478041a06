"""Does every memory setting that is accepted survive the worst burst?

    python -m benchmarks.memory_matrix --model qwen2.5-32b-awq

One cell is a setting, a value and a batch size: twice `max_num_seqs` prompts of nearly the longest length arrive at
once, with random lengths, random aborts, penalties, truncation and log-probabilities. It passes if all requests end
without an error, no allocation failed or was retried, no block stays in use, and the memory reserved after warm-up did
not grow. A setting that is refused at start passes too: that is what refusals are for.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections import Counter

import torch

from nybble.bench.synthetic import CONFIGS, synthetic_directory
from nybble.build import build
from nybble.core.config import EngineConfig
from nybble.core.errors import MemoryBudgetError
from nybble.core.request import Request
from nybble.core.sampling import SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-32b-awq", choices=CONFIGS)
    parser.add_argument("--length", type=int, default=1024, help="max_model_len")
    parser.add_argument("--settings", default="gpu_memory_utilization,cache_max_entry_count")
    parser.add_argument("--values", default="0.8,0.85,0.9,0.95,0.99")
    parser.add_argument("--batches", default="1,2,4,6,8,16,32,64")
    options = parser.parse_args()
    with synthetic_directory(options.model) as model:
        verdicts = matrix(model, options)
    print(dict(verdicts))
    raise SystemExit(1 if verdicts["FAILED"] else 0)


def matrix(model: str, options: argparse.Namespace) -> Counter[str]:
    """How often each verdict was given."""
    verdicts: Counter[str] = Counter()
    for name in options.settings.split(","):
        for value in map(float, options.values.split(",")):
            for batch in map(int, options.batches.split(",")):
                begin = time.perf_counter()
                number = int(value) if name == "kv_cache_memory_bytes" else value
                verdict, detail = cell(model, batch, options.length, {name: number})
                verdicts[verdict] += 1
                seconds = time.perf_counter() - begin
                print(f"{name} = {value:g}, batch {batch}: {verdict}; {detail} ({seconds:.1f} s)", flush=True)
                gc.collect()
                torch.cuda.empty_cache()
    return verdicts


def cell(model: str, batch: int, length: int, memory: dict[str, float]) -> tuple[str, str]:
    """The verdict and what was seen."""
    try:
        built = build(
            EngineConfig(
                model=model,
                load_format="dummy",
                max_num_seqs=batch,
                max_model_len=length,
                **memory,  # type: ignore[arg-type]
            )
        )
    except MemoryBudgetError as error:
        return "refused", str(error)
    engine, draw = built.engine, random.Random(batch)
    before, least_free = torch.cuda.memory_stats(), torch.cuda.mem_get_info()[0]
    for index in range(2 * batch):
        num_new = draw.randrange(1, 24)
        params = SamplingParams(
            temperature=0.8,
            top_p=0.9,
            min_p=0.01,
            repetition_penalty=1.1,
            logit_bias={5: 1.0},
            seed=index,
            logprobs=20 if index % 3 == 2 else None,
            prompt_logprobs=20 if index % 5 == 4 else None,
            max_tokens=num_new,
            ignore_eos=True,
            detokenize=False,
        )
        prompt = [draw.randrange(1000, 150_000) for _ in range(length - num_new)]
        engine.add(Request(request_id=str(index), prompt_token_ids=prompt, params=params))
    ends: Counter[str] = Counter()
    while engine.has_work:
        ends.update(delta.error or delta.finish_reason for delta in engine.step() if delta.finish_reason)
        if draw.random() < 0.2:
            engine.abort(str(draw.randrange(2 * batch)))
        least_free = min(least_free, torch.cuda.mem_get_info()[0])
    after = torch.cuda.memory_stats()
    grew = after["reserved_bytes.all.current"] - before["reserved_bytes.all.current"]
    failures = sum(after[name] - before[name] for name in ("num_ooms", "num_alloc_retries"))
    stats = engine.stats
    passed = (
        set(ends) <= {"length", "abort"}
        and ends.total() == 2 * batch
        and not failures
        and grew <= 0
        and not stats.num_kv_blocks_used
    )
    engine.close()
    detail = (
        f"KV {built.report.num_kv_tokens:,} tokens, least free {least_free / 1e9:.2f} GB, "
        f"reserved grew {grew / 1e6:.0f} MB, {failures} failed allocations, {stats.num_preemptions} preemptions, "
        f"ends {dict(ends)}"
    )
    return ("ok" if passed else "FAILED"), detail


if __name__ == "__main__":
    main()
