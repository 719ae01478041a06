"""Where a server listens, and whether others can reach it."""

import socket
from pathlib import Path

import pytest

from nybble.commands.listening import address_of, checked_root_path, is_local, listen_at, listen_on


def test_addresses_as_users_write_them() -> None:
    with listen_at("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert address_of(listener, has_tls=False, root_path="") == f"http://127.0.0.1:{port}"
        assert address_of(listener, has_tls=True, root_path="/llm") == f"https://127.0.0.1:{port}/llm"
        assert is_local(listener)
    with listen_at("0.0.0.0", 0) as listener:
        assert not is_local(listener)


def test_ipv6() -> None:
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 on this machine")
    with listen_at("::1", 0) as listener:
        assert address_of(listener, has_tls=False, root_path="").startswith("http://[::1]:")
        assert is_local(listener)


def test_a_unix_socket(tmp_path: Path) -> None:
    with listen_on(tmp_path / "socket") as listener:
        assert is_local(listener)
        assert address_of(listener, has_tls=False, root_path="") == f"unix:{tmp_path}/socket"
    assert not (tmp_path / "socket").exists()


def test_root_paths() -> None:
    assert [checked_root_path(path) for path in ("", "/", "/a/b/", "/a")] == ["", "", "/a/b", "/a"]
