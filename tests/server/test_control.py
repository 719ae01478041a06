"""What an admin can do to everybody's requests."""

import asyncio

from support.fake_engine import FakeEngine
from support.server import in_process, make_app, run, tiny_tokenizer, until

ADMIN = {"Authorization": "Bearer root"}


def test_resetting_the_prefix_cache() -> None:
    async def main() -> None:
        engine = FakeEngine(tiny_tokenizer())
        async with in_process(make_app(engine, admin_keys=["root"])) as client:
            assert (await client.post("/reset_prefix_cache", headers=ADMIN)).status_code == 200
            assert engine.num_resets == 1
            engine.is_serving = False
            assert (await client.post("/reset_prefix_cache", headers=ADMIN)).status_code == 503

    run(main)


def test_aborting_requests() -> None:
    async def main() -> None:
        engine = FakeEngine(tiny_tokenizer())
        engine.first_gate = asyncio.Event()
        async with in_process(make_app(engine, admin_keys=["root"])) as client:
            bodies = [{"prompt": ["a", "b"], "request_id": "x-1"}, {"prompt": "a", "request_id": "x"}]
            tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for body in bodies]
            await until(lambda: engine.num_open == 3)

            async def abort(**body: object) -> tuple[int, object]:
                answer = await client.post("/abort_requests", json=body, headers=ADMIN)
                return answer.status_code, answer.json()

            for wrong in ({}, {"request_ids": []}, {"request_ids": ["x"], "abort_all": True}, {"request_ids": "x"}):
                assert (await abort(**wrong))[0] == 400
            assert await abort(request_ids=["nobody", "cmpl-x-1"]) == (200, {"num_aborted": 2})
            assert await abort(abort_all=True) == (200, {"num_aborted": 1})
            engine.first_gate.set()
            answers = [(await task).json()["choices"] for task in tasks]
            assert [[choice["finish_reason"] for choice in choices] for choices in answers] == [
                ["abort"] * 2,
                ["abort"],
            ]

    run(main)
