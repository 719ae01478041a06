"""`nybble demo`: the embedded model answers a few prompts, and says how fast. What `make demo` runs."""

from __future__ import annotations

import sys
import time

from nybble.commands.imports import import_llm

DEMO_PROMPTS = (
    "Who are you?",
    "What is 12 + 30?",
    "Sort 31, 4, 15, 92, 6",
    "Count from 3 to 30",
    "How many minutes are in 3 hours?",
)


def demo() -> None:
    """Answer a few prompts with the embedded model."""
    print("Loading `tiny`, the 4-bit model inside the package …", flush=True)
    begin = time.perf_counter()
    from nybble.commands.answers import TextWriter
    from nybble.commands.generate import summary
    from nybble.core.outputs import RequestOutput

    with import_llm()("tiny", kv_cache_memory_bytes=64 << 20) as llm:
        print(f"Ready after {time.perf_counter() - begin:.1f} s.\n")
        begin = time.perf_counter()
        outputs = []
        for prompt in DEMO_PROMPTS:
            print(f"> {prompt}")
            request = llm.requests.from_chat(prompt, llm.requests.default_params(max_tokens=128, temperature=0))
            outputs.append(RequestOutput.begin(request))
            writer = TextWriter(sys.stdout, show_prompts=False)
            for deltas in llm.run([request]):
                for delta in deltas:
                    outputs[-1].add(delta)
                writer.advance(outputs[-1:])
        report = llm.report
        print(f"\n{summary(outputs, time.perf_counter() - begin)}")
        print(
            f"KV memory {report.kv_bytes / 2**20:.0f} MiB: {report.num_kv_tokens:,} tokens in {report.num_kv_blocks:,} "
            f"blocks; weights {report.weights_bytes / 2**20:.1f} MiB; device {llm.config.device}, {llm.config.dtype}"
        )
    print('\nNext: `nybble chat tiny`, or `nybble generate MODEL "your prompt"`; `nybble --help` shows the rest.')
