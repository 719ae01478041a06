"""/tokenize, /detokenize, /v1/models, /version, /openapi.json, /metrics."""

from typing import Any

from support.fake_engine import FakeEngine
from support.server import in_process, make_app, run, tiny_tokenizer

import nybble
from nybble.server.app import create_app
from nybble.server.record import RequestRecord
from nybble.server.settings import ServerSettings
from nybble.text.request_builder import RequestBuilder


def test_tokenize_and_back() -> None:
    async def main() -> None:
        async with in_process(make_app()) as client:
            text = "naïve 😀 12<|im_end|>"
            body = (await client.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
            assert body["tokens"] == tiny_tokenizer().encode(text)
            assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
            assert body["max_model_len"] == 512
            back = await client.post("/detokenize", json={"tokens": body["tokens"]})
            assert back.json() == {"prompt": text}
            assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}
            messages = [{"role": "user", "content": "hi"}]
            chat = (await client.post("/tokenize", json={"messages": messages})).json()
            written = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
            assert chat["tokens"] == tiny_tokenizer().encode(written)

    run(main)


def test_models_and_version() -> None:
    async def main() -> None:
        async with in_process(make_app(served_model_name="org/name")) as client:
            (model,) = (await client.get("/v1/models")).json()["data"]
            assert model["id"] == "org/name"
            assert model["root"] == "fake"
            assert (await client.get("/v1/models/org/name")).json() == model
            assert (await client.get("/version")).json() == {"version": nybble.__version__}

    run(main)


def test_openapi_describes_the_bodies() -> None:
    async def main() -> None:
        async with in_process(make_app()) as client:
            described = (await client.get("/openapi.json")).json()
            schemas = described["components"]["schemas"]
            for path, name in (
                ("/v1/completions", "CompletionRequest"),
                ("/v1/chat/completions", "ChatCompletionRequest"),
                ("/tokenize", "TokenizeRequest"),
                ("/detokenize", "DetokenizeRequest"),
            ):
                content = described["paths"][path]["post"]["requestBody"]["content"]
                assert content["application/json"]["schema"] == {"$ref": f"#/components/schemas/{name}"}
                assert name in schemas
            assert "StreamOptions" in schemas
            assert schemas["ChatCompletionRequest"]["properties"]["messages"]["minItems"] == 1

    run(main)


def test_metrics_are_told_of_admitted_requests() -> None:
    class Metrics:
        def __init__(self) -> None:
            self.sizes: list[int] = []
            self.statuses: list[int] = []

        def render(self) -> bytes:
            return b"nybble:x 1\n"

        def answered(self, record: RequestRecord) -> None:
            self.statuses.append(record.status)

        def submitted(self, num_prompt_tokens: int) -> None:
            self.sizes.append(num_prompt_tokens)

    async def main() -> None:
        metrics: Any = Metrics()
        engine = FakeEngine(tiny_tokenizer())
        builder = RequestBuilder(tiny_tokenizer(), {})
        app = create_app(engine, tiny_tokenizer(), builder, ServerSettings(), metrics)
        async with in_process(app) as client:
            await client.post("/v1/completions", json={"prompt": [[1, 2], [3]], "max_tokens": 1})
            await client.post("/v1/completions", json={"prompt": [], "max_tokens": 1})
            assert metrics.sizes == [2, 1]
            assert metrics.statuses == [200, 400]
            response = await client.get("/metrics")
            assert response.content == b"nybble:x 1\n"
            assert response.headers["content-type"].startswith("text/plain; version=0.0.4")

    run(main)
