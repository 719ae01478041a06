"""`run_trial`: a load on an engine in this process, for a short while: what settings really bring on this machine."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from statistics import median, quantiles

from nybble.core.errors import MeasurementError
from nybble.core.request import Request
from nybble.core.sampling import SamplingParams
from nybble.llm import LLM
from nybble.perf.workload_model import Load


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Medians, and 90th percentiles, over the requests."""

    output_tok_s: float
    ttft_ms: float
    ttft_p90_ms: float
    tpot_ms: float
    tpot_p90_ms: float
    num_requests: int
    num_preemptions: int

    def keeps(self, load: Load) -> bool:
        """Whether nine in ten requests keep the objectives."""
        return (load.tpot_ms is None or self.tpot_p90_ms <= load.tpot_ms) and (
            load.ttft_ms is None or self.ttft_p90_ms <= load.ttft_ms
        )


@dataclass
class _Seen:
    arrival: float
    token_times: list[float] = field(default_factory=list)


def run_trial(llm: LLM, load: Load, num_requests: int, seed: str) -> Trial:
    """Serve random prompts of the load's lengths: `concurrency` at a time, or as they come at `request_rate` (Poisson).

    Raises:
        MeasurementError: a request failed.
    """
    engine, draw = llm.engine, random.Random(f"trial {seed}")
    waiting = [_request(llm, load, draw) for _ in range(num_requests)]
    begin = time.perf_counter()
    arrivals = _arrivals(load, num_requests, begin, draw)
    preemptions = engine.stats.num_preemptions
    seen: dict[str, _Seen] = {}
    num_open = 0
    while waiting or engine.has_work:
        now = time.perf_counter()
        while waiting and (arrivals[len(seen)] <= now if arrivals else num_open < (load.concurrency or 1)):
            request = waiting.pop()
            seen[request.request_id] = _Seen(arrivals[len(seen)] if arrivals else now)
            engine.add(request)
            num_open += 1
        if not engine.has_work:
            time.sleep(max(0.0, arrivals[len(seen)] - now))
            continue
        for delta in engine.step():
            if delta.finish_reason not in (None, "length"):
                raise MeasurementError(f"a request failed during the trial: {delta.error or delta.finish_reason}")
            seen[delta.request_id].token_times += [time.perf_counter()] * len(delta.token_ids)
            num_open -= delta.finish_reason is not None
    seconds = time.perf_counter() - begin
    return _summary(list(seen.values()), seconds, engine.stats.num_preemptions - preemptions)


def _arrivals(load: Load, num_requests: int, begin: float, draw: random.Random) -> list[float]:
    """Empty for a closed loop."""
    times, moment = [], begin
    for _ in range(num_requests if load.request_rate else 0):
        moment += draw.expovariate(load.request_rate or 1.0)
        times.append(moment)
    return times


def _request(llm: LLM, load: Load, draw: random.Random) -> Request:
    ids = [draw.randrange(llm.runner.vocab_size) for _ in range(load.input_len)]
    params = SamplingParams(max_tokens=load.output_len, temperature=0.0, ignore_eos=True, detokenize=False)
    return llm.requests.from_prompt(ids, params)


def _summary(seen: list[_Seen], seconds: float, num_preemptions: int) -> Trial:
    ttft = [(each.token_times[0] - each.arrival) * 1e3 for each in seen]
    tpot = [
        (each.token_times[-1] - each.token_times[0]) / (len(each.token_times) - 1) * 1e3
        for each in seen
        if len(each.token_times) > 1
    ]
    return Trial(
        output_tok_s=sum(len(each.token_times) for each in seen) / seconds,
        ttft_ms=median(ttft),
        ttft_p90_ms=_p90(ttft),
        tpot_ms=median(tpot) if tpot else 0.0,
        tpot_p90_ms=_p90(tpot) if tpot else 0.0,
        num_requests=len(seen),
        num_preemptions=num_preemptions,
    )


def _p90(values: list[float]) -> float:
    return quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]
