"""Decode speed on a CPU: nybble with a synthetic AWQ model against transformers with the same weights in bf16.

    python -m benchmarks.cpu_decode --model qwen2.5-1.5b-awq

Both continue the same prompt in one process, alternating; a round is one completion of each. transformers' weights are
the dequantized ones, so the two compute the same function up to bf16 rounding.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the nybble command does; read when torch is imported

import torch
from transformers import PreTrainedModel

from nybble import LLM, SamplingParams
from nybble.bench.synthetic import CONFIGS, synthetic_config
from nybble.models.checkpoint import TINY

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.checkpoints import Quantized, make_checkpoint

PROMPT = [(7919 * index) % 100_000 for index in range(32)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-1.5b-awq", choices=CONFIGS)
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--new", type=int, default=32, help="tokens a completion")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    fields = dict(synthetic_config(options.model))
    for name in ("architectures", "model_type", "quantization_config", "torch_dtype"):
        del fields[name]
    if options.layers:
        fields["num_hidden_layers"] = options.layers
    with tempfile.TemporaryDirectory() as directory:
        begin = time.perf_counter()
        quantized = Quantized(method="awq")
        reference = make_checkpoint(Path(directory), "qwen2", quantized=quantized, dtype=torch.bfloat16, **fields)
        reference = reference.to(torch.bfloat16)
        reference.set_attn_implementation("sdpa")
        shutil.copy(TINY / "tokenizer.json", directory)  # a model needs one; this run uses token ids only
        print(f"checkpoint and reference made in {time.perf_counter() - begin:.0f} s", flush=True)
        llm = LLM(directory, dtype="bfloat16", max_model_len=512, kv_cache_memory_bytes=64 << 20)
    print(*llm.report.lines(), sep="\n")
    ours, theirs = [], []
    for _ in range(options.rounds):
        ours.append(time_nybble(llm, options.new))
        theirs.append(time_transformers(reference, options.new))
    for name, seconds in (("nybble", ours), ("transformers bf16", theirs)):
        median = statistics.median(seconds)
        spread = f"{min(seconds) * 1e3:.1f} … {max(seconds) * 1e3:.1f}"
        print(f"{name}: {median * 1e3:.1f} ms a token ({spread}) = {1 / median:.1f} tokens/s")
    print(f"ratio {statistics.median(theirs) / statistics.median(ours):.2f}, {torch.get_num_threads()} threads")


def time_nybble(llm: LLM, num_new: int) -> float:
    """Seconds a token, prefill left out."""
    params = SamplingParams(temperature=0, max_tokens=num_new + 1, ignore_eos=True, detokenize=False)
    timing = llm.generate([PROMPT], params)[0].outputs[0].timing
    assert timing is not None
    assert timing.finished_time is not None
    assert timing.first_token_time is not None
    return (timing.finished_time - timing.first_token_time) / num_new


@torch.inference_mode()
def time_transformers(model: PreTrainedModel, num_new: int) -> float:
    """The same: its own greedy loop, without `generate`'s overhead."""
    result = model(torch.tensor([PROMPT]), use_cache=True)
    begin = time.perf_counter()
    for _ in range(num_new):
        token = result.logits[:, -1:].argmax(-1)
        result = model(token, past_key_values=result.past_key_values, use_cache=True)
    return (time.perf_counter() - begin) / num_new


if __name__ == "__main__":
    main()
