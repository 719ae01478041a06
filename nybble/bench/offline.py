"""`OfflineBench`: nybble itself, in this process: a fixed batch (latency) or many requests at once (throughput)."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.bench.prompt_text import IdWriter, TokenWriter
from nybble.bench.synthetic import synthetic_directory
from nybble.bench.workload import Workload, WorkloadSettings
from nybble.core import machine
from nybble.core.errors import MeasurementError
from nybble.core.sampling import SamplingParams

if TYPE_CHECKING:
    from nybble.llm import LLM


@contextmanager
def opened_model(model: str | None, synthetic: str | None, engine: dict[str, Any]) -> Iterator[LLM]:
    """The engine, of a model or of random weights in a known shape."""
    from nybble.llm import LLM

    if synthetic is None:
        assert model is not None
        with LLM(model, **engine) as llm:
            yield llm
        return
    with synthetic_directory(synthetic) as path, LLM(path, **{"load_format": "dummy", **engine}) as llm:
        yield llm


class OfflineBench:
    """Runs on one engine."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        vocab_size = llm.checkpoint.hf.get("vocab_size") or 32_000
        path = Path(llm.checkpoint.path)
        self._writer = IdWriter(vocab_size) if llm.tokenizer is None else TokenWriter(path, as_ids=True)
        self._outputs: dict[int, list[list[int]]] = {}  # by batch size, of the first time

    def latency(self, batch: int, num_input: int, num_output: int) -> dict[str, Any]:
        """One repeat at a batch size: prefill and decode, told apart by runs of 1 and of `num_output` + 1 tokens.

        Prompts are the same in each repeat (no cache is in use), so their tokens must be too.
        """
        draw = random.Random(f"latency {batch}")
        prompts = [self._writer.write(draw, num_input) for _ in range(batch)]
        first_seconds, _ = self._timed(prompts, 1)
        whole_seconds, outputs = self._timed(prompts, num_output + 1)
        decode_seconds = whole_seconds - first_seconds
        return {
            "batch": batch,
            "input_len": num_input,
            "output_len": num_output,
            "prefill_seconds": first_seconds,
            "prefill_tok_s": batch * num_input / first_seconds,
            "decode_tok_s": batch * num_output / decode_seconds,
            "decode_step_ms": decode_seconds / num_output * 1e3,
            "latency_seconds": whole_seconds,
            "tokens_repeat": self._outputs.setdefault(batch, outputs) == outputs,
            **_memory(),
            "gpus": machine.gpus(),  # with the clocks that it ran at
        }

    def forget(self, batch: int) -> None:
        """What was generated at this batch size so far is no measure for later repeats."""
        self._outputs.pop(batch, None)

    def throughput(self, workload: WorkloadSettings, num_prompts: int, part: str, progress: bool) -> dict[str, Any]:
        """One repeat of many requests at once, under the names of vLLM's benchmark."""
        conversations = Workload(workload, self._writer)
        turns = [conversations.conversation(part, index)[0] for index in range(num_prompts)]
        params = [_params(turn.num_output_tokens) for turn in turns]
        begin = time.perf_counter()
        outputs = self._llm.generate([turn.prompt for turn in turns], params, progress=progress)  # type: ignore[arg-type]
        seconds = time.perf_counter() - begin
        completions = [output.outputs[0] for output in outputs]
        failed = [completion.error for completion in completions if completion.finish_reason == "error"]
        num_input = sum(len(output.prompt_token_ids) for output in outputs)
        num_output = sum(len(completion.token_ids) for completion in completions)
        return {
            "elapsed_time": seconds,
            "num_requests": num_prompts,
            "failed": len(failed),
            "total_num_tokens": num_input + num_output,
            "total_input_tokens": num_input,
            "total_output_tokens": num_output,
            "requests_per_second": (num_prompts - len(failed)) / seconds,
            "tokens_per_second": (num_input + num_output) / seconds,
            "output_throughput": num_output / seconds,
            **_memory(),
            "gpus": machine.gpus(),
            **({"error": failed[0]} if failed else {}),
        }

    def _timed(self, prompts: Sequence[Any], num_output: int) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        outputs = self._llm.generate(prompts, _params(num_output), progress=False)
        seconds = time.perf_counter() - begin
        completions = [output.outputs[0] for output in outputs]
        for completion in completions:
            if completion.finish_reason == "error" or len(completion.token_ids) != num_output:
                raise MeasurementError(
                    f"a request of {num_output} tokens failed: {completion.error or 'it ended early'}"
                )
        return seconds, [completion.token_ids for completion in completions]


def _params(num_output: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True, detokenize=False)


def _memory() -> dict[str, float | None]:
    used = machine.gpu_memory_used_mib()
    return {
        "peak_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "gpu_memory_used_mib": used,
    }
