"""`nybble serve`: the OpenAI-compatible server. Starts the engine process, then HTTP; ends both in order."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nybble.commands.listening import (
    address_of,
    checked_root_path,
    checked_tls,
    is_local,
    listen_at,
    listen_on,
    read_keys,
)
from nybble.commands.options import ModelArgument, with_flags

if TYPE_CHECKING:
    from nybble.core.config import EngineConfig
    from nybble.server.settings import ServerSettings
    from nybble.server.tracing import Tracer

LAST_WORDS_SECONDS = 3.0
"""How long clients that were cut off may take to read why."""


@with_flags()
def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all, then use --api-key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    uds: Annotated[Path | None, typer.Option(help="Listen on this Unix socket instead.", show_default=False)] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Ask for this key; may be repeated.", show_default=False)
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with a key a line.", show_default=False)] = None,
    admin_key: Annotated[
        list[str] | None,
        typer.Option(help="Key for /reset_prefix_cache and /abort_requests; may be repeated.", show_default=False),
    ] = None,
    admin_key_file: Annotated[
        Path | None, typer.Option(help="File with an admin key a line.", show_default=False)
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Let pages of this origin (https://example.org, or * for any) use the API; may be repeated.",
            show_default=False,
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="The model's name in the API; default: MODEL as given.", show_default=False)
    ] = None,
    tool_call_parser: Annotated[
        Literal["hermes", "llama3_json", "qwen3_coder"] | None,
        typer.Option(help="How the model writes tool calls; default: as its chat template shows.", show_default=False),
    ] = None,
    root_path: Annotated[str, typer.Option(help="Path prefix that a proxy strips.", show_default=False)] = "",
    ssl_certfile: Annotated[Path | None, typer.Option(help="TLS certificate.", show_default=False)] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="TLS key.", show_default=False)] = None,
    log_format: Annotated[
        Literal["text", "json"] | None,
        typer.Option(help="How log lines look; default: NYBBLE_LOG_FORMAT, or text.", show_default=False),
    ] = None,
    otlp_traces_endpoint: Annotated[
        str | None,
        typer.Option(
            help="Send OpenTelemetry traces here (OTLP over HTTP); needs nybble[otel].",
            metavar="URL",
            show_default=False,
        ),
    ] = None,
    shutdown_timeout: Annotated[
        float, typer.Option(help="Seconds that running requests get to finish after SIGTERM or Ctrl-C.")
    ] = 30.0,
    *,
    engine: dict[str, Any],
    limits: dict[str, Any],
) -> None:
    """Serve a model to programs that speak OpenAI's API (completions, chat, models; also /metrics, /health and a page).

    SIGTERM or Ctrl-C stops taking requests, lets the running ones finish, and leaves; a second one leaves at once.
    """
    from nybble.core import log
    from nybble.core.config import EngineConfig
    from nybble.server.record import access_log
    from nybble.server.settings import Limits, ServerSettings
    from nybble.server.tracing import Tracer
    from nybble.server.turns import make_loop

    if log_format is not None:
        os.environ["NYBBLE_LOG_FORMAT"] = log_format  # for the engine's process too
    log.configure(in_thread=True)
    for name in ("uvicorn", "asyncio", "opentelemetry"):
        logging.getLogger(name).handlers[:] = log.logger.handlers
    access_log.setLevel(logging.INFO)
    settings = ServerSettings(
        api_keys=(*(api_key or ()), *read_keys(api_key_file, "--api-key-file")),
        admin_keys=(*(admin_key or ()), *read_keys(admin_key_file, "--admin-key-file")),
        allow_origins=tuple(allow_origin or ()),
        served_model_name=served_model_name,
        tool_call_parser=tool_call_parser,
        limits=Limits(**limits),
    )
    options = {**checked_tls(ssl_certfile, ssl_keyfile), "root_path": checked_root_path(root_path)}
    config = EngineConfig.from_settings(model=model, **engine)
    tracer = Tracer(otlp_traces_endpoint) if otlp_traces_endpoint else None
    # Before a large model is loaded, because the address may be taken.
    listening = listen_on(uds) if uds else listen_at(host, port)
    with listening as listener, asyncio.Runner(loop_factory=make_loop) as runner:
        code = runner.run(_serve(config, settings, listener, options, shutdown_timeout, tracer))
    if code:
        raise typer.Exit(code)


async def _serve(
    config: EngineConfig,
    settings: ServerSettings,
    listener: socket.socket,
    options: dict[str, Any],
    shutdown_timeout: float,
    tracer: Tracer | None,
) -> int:
    """Returns the exit code."""
    from nybble.core.log import logger
    from nybble.engine.client import EngineClient
    from nybble.server.app import create_app
    from nybble.server.collector import collect_when_quiet
    from nybble.server.http_server import make_server
    from nybble.server.metrics import Metrics
    from nybble.server.record import write_access_line
    from nybble.text.request_builder import RequestBuilder
    from nybble.text.tokenizer import Tokenizer

    begin = time.perf_counter()
    _say(f"Loading {config.model} …")
    stop = _Stop()
    client = EngineClient(config)
    try:
        starting = asyncio.create_task(client.start())
        await _first_of(starting, stop.wanted)
        if not starting.done():
            return 130
        ready = await starting
        tokenizer = Tokenizer.load(Path(ready.model_path))
        name = settings.served_model_name or ready.model
        metrics = Metrics(name, lambda: client.stats)
        client.on_step = metrics.stepped
        client.on_death = metrics.engine_died
        builder = RequestBuilder(tokenizer, ready.default_sampling)
        sinks = (write_access_line, tracer.record) if tracer else (write_access_line,)
        app = create_app(client, tokenizer, builder, settings, metrics, sinks)
        server = make_server(app, settings.limits, log_config=None, **options)
        address = address_of(listener, has_tls="ssl_certfile" in options, root_path=options["root_path"])
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if not server.started:
            return 1  # uvicorn has said why
        phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in ready.phase_seconds.items())
        _say(
            f"Serving {name} on {address}: {ready.num_kv_tokens:,} KV tokens, ready after "
            f"{time.perf_counter() - begin:.1f} s ({phases})"
        )
        if not settings.api_keys and not is_local(listener):
            logger.warning("whoever reaches this address may use the model: --api-key would ask them for a key")
        assert client.dead is not None
        collecting = asyncio.create_task(collect_when_quiet(lambda: client.num_open))
        await _first_of(serving, stop.wanted, client.dead)
        server.should_exit = True  # takes no more connections, and waits for the open ones
        await _first_of(serving, stop.urged, timeout=shutdown_timeout)
        # What is still running is told so. A second signal does not wait for a process that does not listen.
        await client.close(timeout=1.0 if stop.urged.done() else 10.0)
        await _first_of(serving, timeout=LAST_WORDS_SECONDS)
        server.force_exit = True
        await serving
        collecting.cancel()
        if client.dead.done():
            _say(f"error: {client.dead.result()}", logging.ERROR)
            return 1
        return 0
    finally:
        await client.close()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)


class _Stop:
    """SIGTERM and Ctrl-C as futures: `wanted` by the first signal, `urged` by the second."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.wanted: asyncio.Future[None] = loop.create_future()
        self.urged: asyncio.Future[None] = loop.create_future()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        future = self.urged if self.wanted.done() else self.wanted
        if not future.done():
            future.set_result(None)


async def _first_of(*futures: asyncio.Future[Any], timeout: float | None = None) -> None:
    await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


def _say(line: str, level: int = logging.INFO) -> None:
    """To whoever started the server; in a log of JSON it is a record like others."""
    from nybble.core import env
    from nybble.core.log import logger

    if env.log_format() == "json":
        notices = logger.getChild("serve")
        notices.setLevel(logging.INFO)
        notices.log(level, line)
        return
    with suppress(OSError):  # a full disk is no reason not to serve
        print(line, file=sys.stderr, flush=True)
