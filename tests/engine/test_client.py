"""`EngineClient` with a real engine process on the embedded model: serving, refusals, a process that dies or hangs."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nybble import LLM, SamplingParams
from nybble.core.config import EngineConfig
from nybble.core.errors import ConfigError, EngineDeadError, MemoryBudgetError, ModelError, RequestError
from nybble.core.request import Request
from nybble.engine.client import EngineClient

pytestmark = pytest.mark.slow

CONFIG = EngineConfig(model="tiny", max_num_seqs=8, kv_cache_memory_bytes=16 << 20)
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
PROMPTS = [[5 + index, 6, 7] for index in range(6)]


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, timeout=90))


@asynccontextmanager
async def started(**options: Any) -> AsyncIterator[EngineClient]:
    client = EngineClient(CONFIG, backoff_seconds=0.05, **options)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def generate(client: EngineClient, request_id: str, prompt: list[int], params: SamplingParams) -> list[int]:
    request = Request(request_id=request_id, prompt_token_ids=prompt, params=params)
    return [t for deltas in [d async for d in client.stream(request)] for delta in deltas for t in delta.token_ids]


def send_signal(client: EngineClient, number: int) -> int:
    """To the engine process; returns its id."""
    assert client.process_id is not None
    os.kill(client.process_id, number)
    return client.process_id


def is_running(process_id: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process_id}/status").read_text()
    except FileNotFoundError:
        return False


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_what_its_reader_has_enough_of_counts_as_stopped() -> None:
    async def main() -> None:
        async with started() as client:
            reasons = []
            client.on_step = lambda step: reasons.extend(d.finish_reason for d in step.deltas if d.finish_reason)
            for is_enough in (True, False):
                stream = client.stream(Request(request_id="r", prompt_token_ids=[5, 6, 7], params=ENDLESS))
                await anext(stream)
                if is_enough:
                    client.finish("r")
                await stream.aclose()
                await until(lambda: client.stats.num_running == 0)
            client.finish("r")
            assert reasons == ["stop", "abort"]
            assert client.num_open == 0

    run(main())


def test_it_gives_what_an_engine_in_this_process_gives() -> None:
    with LLM("tiny", kv_cache_memory_bytes=16 << 20) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]

    async def main() -> None:
        async with started() as client:
            assert client.ready is not None
            assert client.ready.num_kv_tokens > 0
            tasks = [generate(client, str(i), prompt, GREEDY) for i, prompt in enumerate(PROMPTS)]
            assert await asyncio.gather(*tasks) == expected
            assert client.stats.num_generated_tokens == 40 * len(PROMPTS)
            assert client.num_open == 0
            process_id = client.process_id
            assert process_id is not None
        assert not client.is_serving
        assert not is_running(process_id)

    run(main())


def test_refusals_and_left_streams_harm_no_other() -> None:
    async def main() -> None:
        async with started() as client:
            good = asyncio.create_task(generate(client, "good", PROMPTS[0], GREEDY))
            with pytest.raises(RequestError, match="99999 tokens"):
                await generate(client, "long", [5] * 99_999, GREEDY)
            stream = client.stream(Request(request_id="left", prompt_token_ids=[5], params=ENDLESS))
            await anext(stream)
            with pytest.raises(RequestError, match="in use"):
                await generate(client, "left", PROMPTS[1], GREEDY)
            await stream.aclose()
            assert len(await good) == 40
            await until(lambda: client.stats.num_running == client.stats.num_kv_blocks_used == 0)

    run(main())


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGUSR1])
def test_a_killed_process_fails_its_requests_and_is_replaced(signal_number: int) -> None:
    async def main() -> None:
        async with started() as client:
            tasks = [asyncio.create_task(generate(client, str(i), [5], ENDLESS)) for i in range(3)]
            await until(lambda: client.stats.num_running == 3)
            send_signal(client, signal_number)
            for task in tasks:
                with pytest.raises(EngineDeadError, match="died"):
                    await task
            assert client.num_open == 0
            with pytest.raises(EngineDeadError, match="no engine is serving"):
                await generate(client, "early", [5], GREEDY)
            await until(lambda: client.is_serving)
            assert len(await generate(client, "again", [5], GREEDY)) == 40
            assert client.num_deaths == 1

    run(main())


def test_a_process_that_hangs_is_replaced() -> None:
    async def main() -> None:
        async with started(stall_seconds=1.0) as client:
            process_id = send_signal(client, signal.SIGSTOP)
            await until(lambda: not client.is_serving)
            await until(lambda: client.is_serving)
            assert not is_running(process_id)
            assert len(await generate(client, "again", [5], GREEDY)) == 40

    run(main())


def test_deaths_in_a_row_end_the_client() -> None:
    async def main() -> None:
        async with started(max_restarts=1) as client:
            assert client.dead is not None
            for _ in range(2):
                await until(lambda: client.is_serving)
                send_signal(client, signal.SIGKILL)
                await until(lambda: not client.is_serving)
            assert "2 times in a row" in await client.dead

    run(main())


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"model": "./nowhere"}, ModelError),
        ({"max_model_len": 1 << 30}, ConfigError),
        ({"max_model_len": 2048, "kv_cache_memory_bytes": 4096}, MemoryBudgetError),
    ],
)
def test_what_is_wrong_at_the_start_keeps_its_kind(settings: dict[str, Any], kind: type[Exception]) -> None:
    async def main() -> None:
        client = EngineClient(EngineConfig(**{"model": "tiny", **settings}))
        with pytest.raises(kind):
            await client.start()
        await client.close()

    run(main())


def test_a_process_that_dies_at_its_start_says_so() -> None:
    async def main() -> None:
        client = EngineClient(CONFIG, command=(sys.executable, "-c", "raise SystemExit(7)"))
        with pytest.raises(EngineDeadError, match="exit status 7"):
            await client.start()
        await client.close()

    run(main())


def test_a_socket_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("a" * 120)  # an ipc address has 107 characters at most
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))

    async def main() -> None:
        client = EngineClient(CONFIG)
        with pytest.raises(EngineDeadError, match="at its start: ZMQError"):
            await client.start()
        await client.close()
        assert not list(folder.iterdir())

    run(main())


def test_closing_ends_open_requests() -> None:
    async def main() -> None:
        async with started() as client:
            task = asyncio.create_task(generate(client, "open", [5], ENDLESS))
            await until(lambda: client.stats.num_running == 1)
            await client.close()
            with pytest.raises(EngineDeadError, match="stopped"):
                await task

    run(main())


def test_the_engine_process_leaves_with_its_parent() -> None:
    program = """
import asyncio
from nybble.core.config import EngineConfig
from nybble.engine.client import EngineClient

async def main():
    client = EngineClient(EngineConfig(model="tiny", kv_cache_memory_bytes=16 << 20))
    await client.start()
    print(client.process_id, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child)
        os.kill(parent.pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < end, "the engine process outlives its parent"
        time.sleep(0.05)


def test_this_side_imports_no_torch() -> None:
    code = "import sys, nybble.engine.client; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
