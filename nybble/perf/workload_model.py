"""What a load comes to on an engine, by the roofline: throughput, time to first token, time per output token.

The engine mixes prompts into decode steps, so prompts and tokens share its time. With C sequences at once, each of S
input and L output tokens, t(C) a decode step and p the time of one prompt:

    a request lives  W = L·t(C) + C·p      (while it decodes, the other C − 1 and itself have their prompts taken in)
    throughput = C·L / W        requests a second = C / W (Little 1961)        TPOT = (L·t(C) + (C − 1)·p) / L
    TTFT = t(C) / 2 + p         a step in flight is half done on average; no queue before the engine

Expected of nybble: in decode its kernels read and compute one after the other rather than at once, and launches come on
top. So reckoned from an H100's data sheet, Qwen2.5-32B's steps of 1 to 128 sequences come within 6 % of those measured
(bench/results). Prefill: see PREFILL_SHARE and SCRATCH_FROM.

On a CPU, which is told by the measured rate of nybble's own 4-bit product, that product bounds the arithmetic, weights
come in at a part of the read rate, and each layer and each step cost Python and threads a fixed time. Set by decode
steps of 1 to 16 sequences on two cores of an EPYC: Qwen2.5-0.5B's and 1.5B's come within 20 % of those measured, those
of `tiny`, which are mostly Python and threads, within a factor of CPU_FACTOR. --measure says how far off it is.
"""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass

from nybble.perf.roofline import Roofline
from nybble.perf.step_cost import Work

LAUNCH_SECONDS = 3e-6
LAUNCHES_A_LAYER = 8
"""What a launch takes in a chain of them, however little it does, and how many nybble needs."""
PREFILL_SHARE = 0.87
"""Of the floor's rate that prefill reaches, dequantization apart."""
CPU_READ_SHARE = 0.6
CPU_MATH_SHARE = 0.8
"""Of the rates of reading and of the 4-bit product that steps reach."""
CPU_LAYER_SECONDS = 150e-6
CPU_STEP_SECONDS = 300e-6
CPU_FACTOR = 1.7
"""By which steps may be off: those of a small model, where the fixed times are most of it."""
SCRATCH_FROM = 256
"""Steps of more tokens write each layer's 4-bit weights as 16-bit ones first. (On Hopper those of more than 512 do; one
prompt of 512 takes an H100 66 to 68 ms in slices, where this says 70.)"""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What users ask. One of `concurrency` and `request_rate` (requests a second) is given.

    Args:
        ttft_ms, tpot_ms: objectives; None: none.
    """

    input_len: int
    output_len: int
    concurrency: int | None = None
    request_rate: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None

    @property
    def tokens(self) -> int:
        """Of one request at its end."""
        return self.input_len + self.output_len


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of a number of sequences at once; `is_expected`: of nybble, else the floor's."""

    num_seqs: int
    step_seconds: float
    prompt_seconds: float
    output_len: int
    is_expected: bool

    @property
    def life_seconds(self) -> float:
        return self.output_len * self.step_seconds + self.num_seqs * self.prompt_seconds

    @property
    def output_tok_s(self) -> float:
        return self.num_seqs * self.output_len / self.life_seconds

    @property
    def requests_per_second(self) -> float:
        return self.num_seqs / self.life_seconds

    @property
    def tpot_ms(self) -> float:
        return (self.step_seconds + (self.num_seqs - 1) * self.prompt_seconds / self.output_len) * 1e3

    @property
    def ttft_ms(self) -> float:
        return (self.step_seconds / 2 + self.prompt_seconds) * 1e3

    def keeps(self, load: Load) -> bool:
        """Whether the objectives hold."""
        return (load.tpot_ms is None or self.tpot_ms <= load.tpot_ms) and (
            load.ttft_ms is None or self.ttft_ms <= load.ttft_ms
        )


def outcome(roofline: Roofline, load: Load, num_seqs: int, *, is_expected: bool = True) -> Outcome:
    """Sequences are half way through their output on average."""
    context_len = load.input_len + (load.output_len + 1) // 2
    decode = Work.decode(num_seqs, context_len)
    if is_expected:
        step, prompt = expected_decode_seconds(roofline, decode), expected_prefill_seconds(roofline, load.input_len)
    else:
        step, prompt = roofline.seconds(decode), roofline.seconds(Work.prefill(load.input_len))
    return Outcome(
        num_seqs=num_seqs,
        step_seconds=step,
        prompt_seconds=prompt,
        output_len=load.output_len,
        is_expected=is_expected,
    )


def expected_decode_seconds(roofline: Roofline, work: Work) -> float:
    """Of a decode step."""
    if roofline.machine.int4_flops_per_second is not None:
        return _cpu_seconds(roofline, work)
    floors = roofline.floors(work)
    return _launch_seconds(roofline) + sum(f.memory_seconds + f.math_seconds + f.link_seconds for f in floors)


def _launch_seconds(roofline: Roofline) -> float:
    return LAUNCH_SECONDS * LAUNCHES_A_LAYER * roofline.shape.config.num_layers


def _cpu_seconds(roofline: Roofline, work: Work) -> float:
    """Of a step on a CPU."""
    machine, shape = roofline.machine, roofline.shape
    rate = machine.int4_flops_per_second if shape.num_quantized_weights else machine.flops_per_second
    assert rate is not None
    parts = [floor.part for floor in roofline.floors(work)]
    reading = sum(part.num_bytes for part in parts) / (CPU_READ_SHARE * machine.read_bytes_per_second)
    computing = sum(part.flops for part in parts) / (CPU_MATH_SHARE * rate)
    return CPU_STEP_SECONDS + CPU_LAYER_SECONDS * shape.config.num_layers + reading + computing


def expected_prefill_seconds(roofline: Roofline, num_tokens: int) -> float:
    """Of one step that takes in so many tokens of a prompt."""
    if roofline.machine.int4_flops_per_second is not None:
        return _cpu_seconds(roofline, Work.prefill(num_tokens))
    seconds = roofline.seconds(Work.prefill(num_tokens)) / PREFILL_SHARE + _launch_seconds(roofline)
    if num_tokens > SCRATCH_FROM:
        written = roofline.shape.num_quantized_layer_weights * roofline.dtype.itemsize
        seconds += written / roofline.machine.read_bytes_per_second
    return seconds


def most_seqs(roofline: Roofline, load: Load, limit: int) -> int:
    """The most sequences at once, up to `limit`, that keep the objectives; 0: not even one does."""
    low, high = 0, limit + 1  # keeps, does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if outcome(roofline, load, middle).keeps(load) else (low, middle)
    return low


def seqs_for_rate(roofline: Roofline, load: Load, limit: int) -> int | None:
    """The fewest sequences at once that serve `request_rate`; None: it takes more than `limit`."""
    assert load.request_rate is not None
    rate = load.request_rate  # what is served grows with the sequences: steps take less than in proportion longer
    found = bisect(range(1, limit + 1), False, key=lambda n: outcome(roofline, load, n).requests_per_second >= rate)
    return found + 1 if found < limit else None
