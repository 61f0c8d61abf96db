"""The proxy does what its modes say: a fault that did not happen would prove nothing."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from tests.chaos.proxy import Proxy


class Echo(socketserver.ThreadingTCPServer):
    """Says back what it hears, and remembers it."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.heard = b""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            try:
                while piece := self.request.recv(4096):
                    self.server.heard += piece  # type: ignore[attr-defined]
                    self.request.sendall(piece)
            except OSError:
                pass


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.server_address[1], latency_seconds=0.2) as made:
        yield made


def connected(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def said_back(client: socket.socket, words: bytes) -> bytes:
    client.sendall(words)
    return client.recv(4096)


def test_it_passes_on_both_ways(proxy: Proxy) -> None:
    with connected(proxy) as client:
        assert said_back(client, b"hello") == b"hello"


def test_refused_means_that_nobody_listens_and_open_connections_are_cut(proxy: Proxy) -> None:
    with connected(proxy) as client:
        assert said_back(client, b"hello") == b"hello"
        proxy.set("refuse")
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    with pytest.raises(ConnectionRefusedError):
        connected(proxy)
    proxy.set("pass")
    with connected(proxy) as client:
        assert said_back(client, b"again") == b"again"


def test_frozen_means_silence_until_it_thaws(proxy: Proxy, echo: Echo) -> None:
    with connected(proxy) as client:
        assert said_back(client, b"a") == b"a"
        proxy.set("freeze")
        client.sendall(b"b")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert echo.heard == b"a"
        client.settimeout(5)
        proxy.set("pass")
        assert client.recv(1) == b"b"


def test_reset_cuts_a_connection_at_its_first_byte(proxy: Proxy) -> None:
    proxy.set("reset")
    with connected(proxy) as client, pytest.raises(ConnectionResetError):
        said_back(client, b"hello")


def test_a_lost_reply_is_one_to_a_request_that_arrived(proxy: Proxy, echo: Echo) -> None:
    proxy.set("lose_replies")
    with connected(proxy) as client:
        with pytest.raises(ConnectionResetError):
            said_back(client, b"LPUSH")
        assert echo.heard == b"LPUSH"


def test_latency_delays_each_way(proxy: Proxy) -> None:
    proxy.set("latency")
    with connected(proxy) as client:
        began = time.monotonic()
        assert said_back(client, b"hello") == b"hello"
        assert time.monotonic() - began >= 0.4


def test_half_open_silences_old_connections_for_ever_and_lets_new_ones_work(proxy: Proxy) -> None:
    with connected(proxy) as old:
        assert said_back(old, b"hello") == b"hello"
        proxy.set("half_open")
        with connected(proxy) as new:
            assert said_back(new, b"new") == b"new"
        proxy.set("pass")
        old.settimeout(0.2)
        with pytest.raises(TimeoutError):
            said_back(old, b"old")
