"""`Engine`: the loop: requests in, one step at a time, deltas out.

Owns: open requests, the step in flight, aborts, counters; turns a failure into requests finished with an error. Does
not know: torch, HTTP, how many devices there are.

While the runner computes step n, the host finishes step n−1 and plans step n+1: `step` submits a batch and then applies
the one before it. With a runner that is not asynchronous it applies the same batch at once.

Not thread-safe: one thread calls everything.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache

from nybble.core.batch import BAD_LOGITS, NO_TOKEN, PendingStep, Runner
from nybble.core.config import ResolvedConfig
from nybble.core.errors import EngineDeadError, RequestError
from nybble.core.log import logger
from nybble.core.outputs import FinishReason, SequenceDelta
from nybble.core.request import Request
from nybble.core.sampling import SamplingParams
from nybble.core.stats import EngineStats
from nybble.engine.bad_words import encode_bad_words
from nybble.engine.block_pool import salted_root
from nybble.engine.completion import Completion
from nybble.engine.constraint import GrammarSource, PendingGrammars
from nybble.engine.scheduler import Scheduler, Step
from nybble.engine.sequence import Sequence
from nybble.engine.validation import RequestLimits
from nybble.text.tokenizer import Tokenizer

MAX_FAILURES_IN_A_ROW = 3
"""After this many failed steps without a good one between them the runner is taken for broken."""

FAILED_ROWS = {
    BAD_LOGITS: "the model's logits were not finite (NaN or infinity)",
    NO_TOKEN: "the sampling parameters leave no token to generate: allowed_token_ids, bad_words, structured_outputs "
    "and min_tokens (which holds back end-of-sequence and stop ids) exclude all; loosen one of them",
}


class Engine:
    """Serves many requests on one runner.

    Args:
        runner: executes the batches; the engine closes it.
        tokenizer: None serves token ids only.
        eos_token_ids: end a completion unless `ignore_eos`.
        vocab_size: token ids of the model are below it.
        grammars: compiles the forms that requests ask for; the engine closes it. None: no request may ask.
        clock: seconds, for `Timing`; the clock of `Request.arrival_time`.
    """

    def __init__(
        self,
        runner: Runner,
        config: ResolvedConfig,
        *,
        tokenizer: Tokenizer | None,
        eos_token_ids: Iterable[int],
        vocab_size: int,
        grammars: GrammarSource | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._config = config
        self._tokenizer = tokenizer
        # A config.json may name ids that no row of logits has: they are never sampled, and could be of any size.
        self._eos_token_ids = frozenset(token_id for token_id in eos_token_ids if token_id < vocab_size)
        self._clock = clock
        # Prompts that come together bring the same words.
        self._encode_bad_words = lru_cache(maxsize=64)(self._encoded)
        self._limits = RequestLimits(
            vocab_size=vocab_size,
            max_model_len=config.max_model_len,
            num_blocks=runner.num_blocks,
            block_size=runner.block_size,
        )
        self._scheduler = Scheduler(config, runner.num_blocks, runner.block_size)
        self._random = random.Random(config.seed)
        self._requests: dict[str, dict[int, Sequence]] = {}  # until their last delta was handed out
        self._completions: dict[Sequence, Completion] = {}  # of unfinished sequences
        self._grammars = PendingGrammars(grammars)
        self._in_flight: deque[tuple[Step, PendingStep]] = deque()
        self._deltas: list[SequenceDelta] = []
        self._num_arrivals = 0
        self._num_failures_in_a_row = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._why_dead: str | None = None

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything left to do or to tell."""
        return bool(self._requests or self._in_flight)

    @property
    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + self._grammars.num_sequences,
            num_kv_blocks_used=scheduler.pool.num_used,
            num_kv_blocks=scheduler.pool.num_blocks,
            num_steps=scheduler.num_steps,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_prefix_query_tokens=scheduler.num_prefix_query_tokens,
            num_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
        )

    def add(self, request: Request) -> None:
        """Queue a request; its deltas come out of the following steps.

        Raises:
            RequestError: it can never be served by this model with this KV cache.
            EngineDeadError: the engine has stopped. After any error nothing was queued.
        """
        self._check_alive()
        sequences = self._sequences_of(request)
        completions = [Completion(sequence, self._eos_token_ids, self._tokenizer) for sequence in sequences]
        # All that can raise is done: a request is queued whole or not at all.
        self._requests[request.request_id] = {sequence.index: sequence for sequence in sequences}
        self._num_prompt_tokens += len(request.prompt_token_ids)
        for sequence, completion in zip(sequences, completions, strict=True):
            self._completions[sequence] = completion
        if request.params.structured_outputs is None:
            self._schedule(sequences)
        else:
            self._grammars.ask(sequences)

    def abort(self, request_id: str, reason: FinishReason = "abort") -> None:
        """End a request wherever it is; the next step's deltas say so. Ids that are not open are ignored.

        Args:
            reason: "stop" where its reader has all that it wanted.
        """
        # What is no string cannot be open, and looking it up may raise, which AsyncLLM's thread would not survive.
        sequences = self._requests.get(request_id, {}) if isinstance(request_id, str) else {}
        for sequence in sequences.values():
            if not sequence.is_finished:
                self._end(sequence, reason)

    def reset_prefix_cache(self) -> None:
        """No request that comes later finds a prefix of before."""
        self._scheduler.pool.forget_all()

    def step(self) -> list[SequenceDelta]:
        """Submit a step, apply the one before it (or this one), and return what the completions gained.

        Raises:
            EngineDeadError: the engine has stopped. The requests it had were told before.
        """
        self._check_alive()
        self._take_grammars()
        step = self._scheduler.schedule()
        if step is None and not self._in_flight and not self._deltas:
            self._grammars.wait()
        assert step or self._in_flight or self._grammars.num_sequences or not self._completions, (
            f"nothing can run: {self.stats}"
        )
        may_stay_in_flight = step is not None and self._submit(step)
        while len(self._in_flight) > may_stay_in_flight:
            self._apply_oldest()
        return self._take_deltas()

    def close(self) -> None:
        """Stop for good and release the device. Open requests are dropped: abort them and step once before, to hear."""
        if self._why_dead is None:
            self._why_dead = "it was closed"
        self._requests.clear()
        self._completions.clear()
        self._in_flight.clear()
        self._grammars.close()
        self._runner.close()

    def _check_alive(self) -> None:
        if self._why_dead is not None:
            raise EngineDeadError(f"the engine has stopped: {self._why_dead}")

    def _sequences_of(self, request: Request) -> list[Sequence]:
        """Check a request and make its `n` sequences."""
        params = request.params
        self._grammars.check(params.structured_outputs)
        if request.request_id in self._requests:
            raise RequestError(f"request_id {request.request_id!r} is in use", parameter="request_id")
        max_length = self._limits.check(request)
        end_token_ids = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            end_token_ids |= self._eos_token_ids
        bad_word_ids = self._bad_word_ids(params)
        shares_all = self._config.enable_prefix_caching
        num_shareable_tokens = max_length if shares_all else len(request.prompt_token_ids) if params.n > 1 else 0
        prefix_root = salted_root(request.cache_salt) if shares_all else self._scheduler.pool.new_root()
        priority = request.priority if self._config.scheduling_policy == "priority" else 0
        sequences = []
        for index, seed in enumerate(self._seeds(params)):
            sequence = Sequence(
                request=request,
                index=index,
                rank=(priority, self._num_arrivals),
                max_length=max_length,
                seed=seed,
                end_token_ids=end_token_ids,
                bad_word_ids=bad_word_ids,
                prefix_root=prefix_root,
                num_shareable_tokens=num_shareable_tokens,
            )
            self._num_arrivals += 1
            sequences.append(sequence)
        return sequences

    def _bad_word_ids(self, params: SamplingParams) -> list[list[int]]:
        for name, value in (("stop", params.stop), ("bad_words", params.bad_words)):
            if value and self._tokenizer is None:
                raise RequestError(f"{name} needs a tokenizer, and this engine has none", parameter=name)
        if not params.bad_words or self._tokenizer is None:
            return []
        return self._encode_bad_words(tuple(params.bad_words))

    def _encoded(self, bad_words: tuple[str, ...]) -> list[list[int]]:
        assert self._tokenizer is not None
        words = encode_bad_words(self._tokenizer, bad_words)
        for word in words:
            self._limits.check_in_vocabulary("bad_words", word)
        return words

    def _seeds(self, params: SamplingParams) -> list[int]:
        """One for each completion: the first has the request's own, the others follow from it."""
        first = self._random.getrandbits(63) if params.seed is None else params.seed
        return [first] + [random.Random(f"{first}/{index}").getrandbits(63) for index in range(1, params.n)]

    def _schedule(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            self._scheduler.add(sequence)

    def _take_grammars(self) -> None:
        """Let the requests begin whose grammars are there, and refuse those that have none."""
        for sequences, error in self._grammars.take():
            if error is None:
                self._schedule(sequences)
                continue
            for sequence in sequences:
                self._refuse(sequence, error)

    def _submit(self, step: Step) -> bool:
        """Hand a step to the runner. Returns whether it may stay in flight while the next one is planned."""
        now = self._clock()
        for sequence in step.started:
            timing = self._completions[sequence].timing
            if timing.first_scheduled_time is None:
                timing.first_scheduled_time = now
        try:
            pending = self._runner.submit(step.batch)
        except BaseException as error:
            # An interrupt too: the runner may not have taken in what the batch brought, so nothing may build on it.
            self._fail(step, error)
            if not isinstance(error, Exception):
                raise
            return False
        self._in_flight.append((step, pending))
        return self._runner.is_async

    def _apply_oldest(self) -> None:
        step, pending = self._in_flight[0]
        try:
            result = pending.result()  # an interrupt leaves the step where it is
        except Exception as error:
            self._in_flight.popleft()
            self._fail(step, error)
            return
        self._in_flight.popleft()
        self._num_failures_in_a_row = 0
        now = self._clock()
        for sequence, token_id, logprobs in self._scheduler.apply(step, result):
            if token_id in FAILED_ROWS:
                self._end(sequence, "error", FAILED_ROWS[token_id])
                continue
            self._num_generated_tokens += 1
            if (why_not := _follow(sequence, token_id)) is not None:
                self._end(sequence, "error", why_not)
                continue
            try:
                is_complete = sequence.matcher is not None and sequence.matcher.is_finished
                delta = self._completions[sequence].take(token_id, logprobs, now, is_complete=is_complete)
            except Exception as error:
                logger.exception("%s: its text could not be made", sequence.request.request_id)
                self._end(sequence, "error", f"the text could not be made: {_describe(error)}")
                continue
            self._deltas.append(delta)
            if delta.finish_reason is not None:
                del self._completions[sequence]
                self._scheduler.finish(sequence, delta.finish_reason)

    def _fail(self, step: Step, error: BaseException) -> None:
        """End the sequences of a step that raised; after several such steps in a row, end everything."""
        logger.error("step %d failed", step.batch.step_id, exc_info=error)
        later = [other for other, _ in self._in_flight if other.batch.step_id > step.batch.step_id]
        for sequence in self._scheduler.fail(step, later):
            self._end(sequence, "error", f"the step failed: {_describe(error)}")
        self._num_failures_in_a_row += isinstance(error, Exception)
        if self._num_failures_in_a_row < MAX_FAILURES_IN_A_ROW:
            return
        self._why_dead = f"{self._num_failures_in_a_row} steps in a row failed, the last with {_describe(error)}"
        for sequence in list(self._completions):
            self._end(sequence, "error", f"the engine has stopped: {self._why_dead}")
        self._in_flight.clear()

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """End a sequence for a reason that is not its own."""
        self._deltas.append(self._completions.pop(sequence).end(reason, self._clock(), error))
        if self._grammars.drop(sequence):  # it is in no queue yet
            sequence.finish_reason = reason
        else:
            self._scheduler.finish(sequence, reason)

    def _refuse(self, sequence: Sequence, error: RequestError) -> None:
        """End a sequence that was not scheduled yet."""
        delta = self._completions.pop(sequence).end("error", self._clock(), str(error))
        delta.refused_parameter = error.parameter
        self._deltas.append(delta)
        sequence.finish_reason = "error"

    def _take_deltas(self) -> list[SequenceDelta]:
        deltas, self._deltas = self._deltas, []
        for delta in deltas:
            if delta.finish_reason is not None:
                sequences = self._requests[delta.request_id]
                del sequences[delta.index]
                if not sequences:
                    del self._requests[delta.request_id]
        return deltas


def _follow(sequence: Sequence, token_id: int) -> str | None:
    """Let a sequence's grammar go on by a token. Returns why it cannot."""
    if sequence.matcher is None:
        return None
    try:
        sequence.matcher.accept(token_id)
    except ValueError as error:
        return str(error)
    except Exception as error:
        logger.exception("%s: its grammar failed", sequence.request.request_id)
        return f"its grammar failed: {_describe(error)}"
    return None


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
