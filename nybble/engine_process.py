"""The engine process: `python -m nybble.engine_process ADDRESS` builds an engine and serves one API process.

The configuration comes as JSON on the first line of standard input; its end later means that the API process is gone,
and this one leaves too. Owns: the loop between the socket and the engine. Does not know: HTTP, who asks.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import msgspec
import zmq

from nybble.core import log, messages
from nybble.core.config import EngineConfig
from nybble.core.errors import EngineDeadError, NybbleError, RequestError
from nybble.core.log import logger

HEARTBEAT_MS = 250
"""Between signs of life while there is nothing to compute."""

REQUESTS_BETWEEN_STEPS = 64
"""About how many are taken in at once: a burst of them must not keep the running ones waiting."""


def main() -> None:
    # Ctrl-C reaches the whole terminal, systemd's SIGTERM all of a service; the API process decides. What is started
    # from here, compiling processes too, inherits that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))  # blocked while this module was loaded
    log.configure(in_thread=True)
    config = EngineConfig(**msgspec.json.decode(sys.stdin.readline()))
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.SNDHWM, 0)  # a slow reader must not stop the engine
    socket.setsockopt(zmq.LINGER, 2000)
    socket.connect(sys.argv[1])
    try:
        _serve(config, socket)
    except NybbleError as error:
        _send(socket, messages.StartFailed(type(error).__name__, str(error)))
        raise SystemExit(2) from None
    except Exception as error:
        logger.exception("the engine process stopped")
        _send(socket, messages.Died(f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from None
    finally:
        socket.close()
        zmq.Context.instance().term()


def _serve(config: EngineConfig, socket: zmq.Socket[bytes]) -> None:
    from nybble.build import build

    built = build(config)
    engine = built.engine
    _send(
        socket,
        messages.Ready(
            model=config.model,
            model_path=str(built.checkpoint.path),
            max_model_len=built.config.max_model_len,
            vocab_size=built.checkpoint.facts().vocab_size,
            num_kv_tokens=built.report.num_kv_tokens,
            block_size=built.config.block_size,
            device=built.config.device,
            phase_seconds=built.report.phase_seconds,
            settings=dict(built.config.table()),
            default_sampling=built.checkpoint.default_sampling,
        ),
    )
    while True:
        wait_ms = 0 if engine.has_work else HEARTBEAT_MS
        num_taken = 0
        while num_taken < REQUESTS_BETWEEN_STEPS and socket.poll(wait_ms):
            message = messages.decode_to_engine(socket.recv())
            wait_ms = 0
            num_taken += 1
            if isinstance(message, messages.Submit):
                num_taken += len(message.prompts) - 1
                for request in message.requests():
                    try:
                        engine.add(request)
                    except RequestError as error:
                        _send(socket, messages.Refused(request.request_id, str(error), error.parameter))
            elif isinstance(message, messages.Abort):
                engine.abort(message.request_id, message.reason)
            elif isinstance(message, messages.ResetPrefixCache):
                engine.reset_prefix_cache()
            else:
                engine.close()
                return
        begin = time.perf_counter()
        try:
            deltas = engine.step() if engine.has_work else []
        except EngineDeadError as error:  # its requests were told by the deltas before
            _send(socket, messages.Died(str(error)))
            raise SystemExit(1) from None
        seconds = time.perf_counter() - begin if deltas else 0.0
        _send(socket, messages.Stepped(engine.stats, deltas, seconds))


def _send(socket: zmq.Socket[bytes], message: messages.FromEngine) -> None:
    socket.send(messages.encode(message))


def _leave_with_the_parent() -> None:
    while sys.stdin.read(1 << 16):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
