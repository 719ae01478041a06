"""`AsyncLLM`: concurrent streams, cancellation, and an engine that dies. On the embedded model."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest

from nybble import LLM, AsyncLLM, RequestOutput, SamplingParams
from nybble.core.errors import ConfigError, EngineDeadError, ModelError, RequestError

SETTINGS: dict[str, Any] = {"max_num_seqs": 8, "kv_cache_memory_bytes": 16 << 20}
QUESTIONS = ["Count from 3 to 30", "What is 12 + 30?", "Sort 31, 4, 15, 92, 6", "Who are you?"]
GREEDY = SamplingParams(temperature=0, max_tokens=128)
ENDLESS = SamplingParams(max_tokens=None, ignore_eos=True)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, timeout=60))


async def last(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    outputs = [output async for output in stream]
    return outputs[-1]


async def until_idle(llm: AsyncLLM) -> None:
    while llm.stats.num_running or llm.stats.num_waiting or llm.stats.num_kv_blocks_used:
        await asyncio.sleep(0.01)


def test_streams_at_once_give_what_each_gives_alone() -> None:
    with LLM("tiny", **SETTINGS) as offline:
        expected = [output.outputs[0].token_ids for output in offline.chat(QUESTIONS * 4, GREEDY)]

    async def main() -> None:
        async with AsyncLLM("tiny", **SETTINGS) as llm:
            outputs = await asyncio.gather(*(last(llm.chat(question, GREEDY)) for question in QUESTIONS * 4))
            assert [output.outputs[0].token_ids for output in outputs] == expected
            assert all(output.finished for output in outputs)
            assert llm.report.num_kv_tokens > 0
            assert llm.config.max_num_seqs == 8

    run(main())


def test_a_stream_grows_token_by_token() -> None:
    async def main() -> None:
        async with AsyncLLM("tiny", **SETTINGS) as llm:
            texts = [output.outputs[0].text async for output in llm.chat("Count from 3 to 30", GREEDY)]
            assert len(texts) > 10
            assert all(after.startswith(before) for before, after in pairwise(texts))
            both = await last(llm.generate("Sort 5, 3", SamplingParams(n=2, max_tokens=5, temperature=0)))
            assert len(both.outputs) == 2
            assert both.finished

    run(main())


def test_leaving_the_loop_and_cancelling_abort_the_request() -> None:
    async def main() -> None:
        async with AsyncLLM("tiny", **SETTINGS) as llm:
            stream = llm.generate("Count", ENDLESS)
            async for _ in stream:
                break
            await stream.aclose()
            await until_idle(llm)
            task = asyncio.create_task(last(llm.generate("Count", ENDLESS)))
            while not llm.stats.num_running:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until_idle(llm)
            assert (await last(llm.chat("What is 12 + 30?", GREEDY))).outputs[0].text == "12 + 30 = 42"

    run(main())


def test_abort_ends_a_stream_by_its_id() -> None:
    async def main() -> None:
        async with AsyncLLM("tiny", **SETTINGS) as llm:
            reason = None
            async for output in llm.generate("Count", ENDLESS, request_id="mine"):
                await llm.abort("mine")
                reason = output.outputs[0].finish_reason
            assert reason == "abort"

    run(main())


def test_a_refused_request_harms_no_other() -> None:
    async def main() -> None:
        async with AsyncLLM("tiny", **SETTINGS) as llm:
            good = asyncio.create_task(last(llm.chat("Count from 3 to 30", GREEDY, request_id="same")))
            while not llm.stats.num_running:
                await asyncio.sleep(0)
            with pytest.raises(RequestError, match="in use"):
                await last(llm.chat("Who are you?", GREEDY, request_id="same"))
            with pytest.raises(RequestError):
                await last(llm.generate([1] * 100_000, GREEDY))
            assert (await good).outputs[0].finish_reason == "stop"

    run(main())


def test_an_unforeseen_error_of_one_request_stays_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with AsyncLLM("tiny", **SETTINGS) as llm:
            good = asyncio.create_task(last(llm.chat("Count from 3 to 30", GREEDY)))
            while not llm.stats.num_running:
                await asyncio.sleep(0)
            engine = llm._ready().engine
            with monkeypatch.context() as patch:
                patch.setattr(engine, "add", lambda request: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    await last(llm.generate("Hello!"))
            assert (await good).outputs[0].finish_reason == "stop"

    run(main())


def test_a_slow_reader_gets_the_steps_it_missed_together() -> None:
    async def main() -> None:
        async with AsyncLLM("tiny", **SETTINGS) as llm:
            request = llm.requests.from_chat("Count from 3 to 30", GREEDY)
            sizes = []
            async for deltas in llm.stream(request):
                sizes.append(len(deltas))
                while llm.stats.num_generated_tokens < 50:
                    await asyncio.sleep(0.01)
            assert max(sizes) > 40

    run(main())


@asynccontextmanager
async def broken_engine() -> AsyncIterator[tuple[AsyncLLM, list[asyncio.Task[RequestOutput]]]]:
    """An engine with two requests running, whose next step raises what no engine should."""
    async with AsyncLLM("tiny", **SETTINGS) as llm:
        tasks = [asyncio.create_task(last(llm.generate("Count", ENDLESS))) for _ in range(2)]
        while llm.stats.num_running < 2:
            await asyncio.sleep(0.01)

        def step() -> None:
            raise RuntimeError("the sky fell")

        llm._ready().engine.step = step  # type: ignore[method-assign, assignment]
        yield llm, tasks


def test_the_death_of_the_engine_reaches_everyone() -> None:
    async def main() -> None:
        async with broken_engine() as (llm, tasks):
            for task in tasks:
                with pytest.raises(EngineDeadError, match="the sky fell"):
                    await task
            with pytest.raises(EngineDeadError, match="the sky fell"):
                await last(llm.generate("Hello!"))
            with pytest.raises(EngineDeadError, match="the sky fell"):
                await llm.abort("any")

    run(main())


def test_closing_aborts_what_is_open() -> None:
    async def main() -> None:
        llm = AsyncLLM("tiny", **SETTINGS)
        await llm.start()
        task = asyncio.create_task(last(llm.generate("Count", ENDLESS)))
        while not llm.stats.num_running:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(llm.close)
        assert (await task).outputs[0].finish_reason == "abort"
        llm.close()
        with pytest.raises(EngineDeadError, match="closed"):
            await last(llm.generate("Hello!"))

    run(main())


def test_giving_up_on_the_start_spoils_it_for_nobody() -> None:
    async def main() -> None:
        llm = AsyncLLM("tiny", **SETTINGS)
        impatient = asyncio.create_task(llm.start())
        await asyncio.sleep(0)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        assert (await last(llm.chat("What is 12 + 30?", GREEDY))).outputs[0].text == "12 + 30 = 42"
        llm.close()

    run(main())


def test_what_is_wrong_shows_at_the_start() -> None:
    with pytest.raises(ConfigError, match="max_model_length is not a setting"):
        AsyncLLM("tiny", max_model_length=3)

    async def main() -> None:
        llm = AsyncLLM("./no/such/directory")
        for _ in range(2):
            with pytest.raises(ModelError, match="no such directory"):
                await llm.start()
        with pytest.raises(EngineDeadError, match="not loaded"):
            _ = AsyncLLM("tiny").stats

    run(main())
