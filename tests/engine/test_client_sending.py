"""What `EngineClient` puts on the socket, without a process at its other end."""

import asyncio
from contextlib import aclosing
from typing import Any

from nybble.core import messages
from nybble.core.config import EngineConfig
from nybble.core.request import Request
from nybble.core.sampling import SamplingParams
from nybble.engine.client import EngineClient
from nybble.engine.outbox import PROMPTS_A_MESSAGE, Outbox


class Socket:
    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, data: bytes) -> None:
        self.sent.append(messages.decode_to_engine(data))


def test_prompts_that_share_their_parameters_share_messages() -> None:
    async def main() -> None:
        client = EngineClient(EngineConfig(model="tiny"))
        socket = Socket()
        client._outbox = Outbox(socket.send)
        shared, other = SamplingParams(bad_words=["x"] * 100), SamplingParams(seed=1)
        num = 2 * PROMPTS_A_MESSAGE + 3
        requests = [
            Request(request_id=f"a-{i}", prompt_token_ids=[i, 1], prompt="text", params=shared, cache_salt="s")
            for i in range(num)
        ]
        requests.append(Request(request_id="b", prompt_token_ids=[7], params=other, priority=3))

        async def read(request: Request) -> None:
            async with aclosing(client.stream(request)) as stream:
                async for _ in stream:
                    pass

        tasks = [asyncio.create_task(read(request)) for request in requests]
        for _ in range(3):
            await asyncio.sleep(0)
        assert [len(message.prompts) for message in socket.sent] == [PROMPTS_A_MESSAGE, PROMPTS_A_MESSAGE, 3, 1]
        arrived = [request for message in socket.sent for request in message.requests()]
        for request, sent in zip(arrived, requests, strict=True):
            assert request.prompt is None
            assert request == messages.msgspec.structs.replace(sent, prompt=None)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(socket.sent) == 4 + len(requests)

    asyncio.run(main())


def test_an_abort_does_not_overtake_its_request() -> None:
    async def main() -> None:
        client = EngineClient(EngineConfig(model="tiny"))
        socket = Socket()
        client._outbox = Outbox(socket.send)
        task = asyncio.create_task(anext(client.stream(Request(request_id="a", prompt_token_ids=[1]))))
        await asyncio.sleep(0)
        client.abort("a")
        client.reset_prefix_cache()
        await asyncio.sleep(0)
        kinds = [type(message).__name__ for message in socket.sent]
        assert kinds == ["Submit", "Abort", "ResetPrefixCache"]
        task.cancel()

    asyncio.run(main())
