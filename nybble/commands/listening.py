"""Where the server listens, and what it reads for that: addresses, Unix sockets, certificates, files of keys."""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nybble.core.errors import ConfigError

BACKLOG = 2048
"""Connections that the kernel keeps until they are accepted."""


@contextmanager
def listen_at(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {host} --port {port}: {error}; choose another port, 0 takes a free one") from None
    with listener:
        # What it accepts inherits this. asyncio would set it, but not on sockets made like this one; without it the
        # kernel holds a small event back until the client acknowledges the one before, up to 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield listener


@contextmanager
def listen_on(path: Path) -> Iterator[socket.socket]:
    """A Unix socket that only this user can connect to, gone at the end."""
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        raise ConfigError(f"--uds {path}: {error}; if no server uses it any more, remove the file") from None
    finally:
        os.umask(before)
    try:
        with listener:
            yield listener
    finally:
        path.unlink(missing_ok=True)


def is_local(listener: socket.socket) -> bool:
    return listener.family == socket.AF_UNIX or ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def address_of(listener: socket.socket, *, has_tls: bool, root_path: str) -> str:
    """As users write it."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    scheme = "https" if has_tls else "http"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{root_path}"


def checked_root_path(given: str) -> str:
    path = given.rstrip("/")
    if path and not path.startswith("/"):
        raise ConfigError(f"--root-path must begin with /, got {given!r}")
    return path


def read_keys(path: Path | None, flag: str) -> list[str]:
    if path is None:
        return []
    try:
        keys = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path}: {error}") from None
    if not keys:
        raise ConfigError(f"{flag} {path} holds no key")  # an empty file must not mean an open server
    return keys


def checked_tls(certificate: Path | None, key: Path | None) -> dict[str, Path]:
    """Options for uvicorn; none without TLS.

    Raises:
        ConfigError: the files do not fit together, or are no certificate and key.
    """
    if certificate is None and key is None:
        return {}
    if certificate is None or key is None:
        raise ConfigError("--ssl-certfile and --ssl-keyfile go together; give both")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:  # SSLError is one
        raise ConfigError(f"--ssl-certfile {certificate} --ssl-keyfile {key}: {error}") from None
    return {"ssl_certfile": certificate, "ssl_keyfile": key}
