"""No address that a customer names leads to a private one; what answers slowly, largely or wrongly is cut off."""

from __future__ import annotations

import functools
import io
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from shared.errors import BlockedUrl, BodyTooLarge, FetchFailed, UploadRejected
from shared.outgoing import GuardedClient
from tests.conftest import Receiver, Reply, closed_port

# CANARY stands for the port of a listener that must never be reached.
PRIVATE_HOSTS = [
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "127.255.255.254",
    "0x7f.1",
    "0x7f000001",
    "0x7f.0x0.0x0.0x1",
    "2130706433",
    "017700000001",
    "0177.0.0.1",
    "0",
    "0.0.0.0",
    "localhost",
    "LOCALHOST",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::ffff:0:127.0.0.1]",
    "[::127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b:1::127.0.0.1]",
    "[2002:7f00:1::]",
    "[2001:0:4136:e378:8000:63bf:80ff:fffe]",
    "[fe80::1]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[fec0::1]",
    "[ff02::1]",
    "169.254.169.254",
    "[::ffff:169.254.169.254]",
    "[64:ff9b::169.254.169.254]",
    "[2002:a9fe:a9fe::]",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "100.64.0.1",
    "198.18.0.1",
    "192.0.2.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    # Digits and dots that Unicode holds to be the same as those of ASCII.
    "\u2460\u2461\u2466.\u24ea.\u24ea.\u2460",
    "127\u30020\u30020\u30021",
]
MALFORMED = [
    "http://user:pass@127.0.0.1:CANARY/",
    "http://user@93.184.216.34:CANARY/",
    "http://93.184.216.34@127.0.0.1:CANARY/",
    "http://93.184.216.34\\@127.0.0.1:CANARY/",
    "http://127.0.0.1:CANARY\\@93.184.216.34/",
    "http://127.0.0.1:CANARY#@93.184.216.34/",
    "http://127.0.0.1:CANARY?@93.184.216.34/",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "gopher://127.0.0.1:CANARY/_GET",
    "ftp://127.0.0.1:CANARY/x",
    "data:image/png;base64,AAAA",
    "javascript:alert(1)",
    "//127.0.0.1:CANARY/",
    "127.0.0.1:CANARY",
    "http:127.0.0.1:CANARY",
    "http:///127.0.0.1:CANARY/",
    "http://",
    "http://:CANARY/",
    "http://127.0.0.1:0/",
    "http://127.0.0.1:99999/",
    "http://127.0.0.1:-1/",
    "http://[::1/",
    "http://[::1]x/",
    "http://[fe80::1%25lo]:CANARY/",
    "http://\t127.0.0.1:CANARY/",
    "http://127.0.0.1\n:CANARY/",
    " http://127.0.0.1:CANARY/",
    "",
    "\x00",
    "http://",
    "?",
]


@functools.cache
def client_for(*allowed: str) -> GuardedClient:
    """One client for all tests that allow the same: making one reads every certificate authority there is."""
    return GuardedClient(allowed)


def fetch(client: GuardedClient, url: str, *, limit_bytes: int = 1000, timeout_seconds: float = 10) -> bytes:
    file = io.BytesIO()
    client.fetch(url, file, limit_bytes=limit_bytes, timeout_seconds=timeout_seconds)
    return file.getvalue()


def _listener() -> socket.socket:
    """On a port below those that the system gives away: of these, another test's client may still try one that its
    server had."""
    is_dual = socket.has_dualstack_ipv6()
    while True:
        with suppress(OSError):
            return socket.create_server(
                ("::" if is_dual else "0.0.0.0", random.randrange(20_000, 30_000)),
                family=socket.AF_INET6 if is_dual else socket.AF_INET,
                dualstack_ipv6=is_dual,
            )


@pytest.fixture
def canary() -> Iterator[tuple[int, Callable[[], int]]]:
    """A port that listens on every address of this machine, and how often somebody connected to it."""
    hits: list[Any] = []
    with _listener() as listener:
        port = listener.getsockname()[1]
        stopping = threading.Event()

        def listen() -> None:
            while True:
                connection, peer = listener.accept()
                # Counted before it is closed: the client's answer is the close.
                with connection:
                    if stopping.is_set():
                        return
                    hits.append(peer)

        thread = threading.Thread(target=listen, name="canary")
        thread.start()
        yield port, lambda: len(hits)
        stopping.set()
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        thread.join(10)


def test_the_canary_sings_when_it_is_reached(canary: tuple[int, Callable[[], int]]) -> None:
    """The control: without the guard's rule the same client reaches the same listener."""
    port, hits = canary
    with pytest.raises(FetchFailed):
        fetch(client_for("127.0.0.0/8"), f"http://127.0.0.1:{port}/")
    assert hits() == 1


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_no_way_of_writing_a_private_address_leads_there(host: str, canary: tuple[int, Callable[[], int]]) -> None:
    port, hits = canary
    client = client_for()
    for scheme in ("http", "https"):
        url = f"{scheme}://{host}:{port}/picture.png"
        with pytest.raises(BlockedUrl):
            client.check(url)
        with pytest.raises(BlockedUrl):
            fetch(client, url)
        with pytest.raises(BlockedUrl):
            client.post(url, b"{}", {}, timeout_seconds=5)
    assert hits() == 0


@pytest.mark.parametrize("url", MALFORMED)
def test_no_odd_url_leads_anywhere(url: str, canary: tuple[int, Callable[[], int]]) -> None:
    port, hits = canary
    client, url = client_for(), url.replace("CANARY", str(port))
    with pytest.raises((BlockedUrl, FetchFailed)):
        client.check(url)
    with pytest.raises((BlockedUrl, FetchFailed)):
        fetch(client, url)
    with pytest.raises((BlockedUrl, FetchFailed)):
        client.post(url, b"{}", {}, timeout_seconds=5)
    assert hits() == 0


@pytest.mark.parametrize(
    "host", ["93.184.216.34", "8.8.8.8", "[2606:4700:4700::1111]", "[64:ff9b::8.8.8.8]", "[::ffff:8.8.8.8]"]
)
def test_public_addresses_pass(host: str) -> None:
    client_for().check(f"https://{host}/picture.png")


def test_a_name_that_cannot_be_is_no_crash() -> None:
    for host in ("a\x00b", "x" * 300, "a..b", "\u00fc" * 80):
        with pytest.raises(UploadRejected):
            client_for().check(f"http://{host}/")


def answering(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Name look-ups of `rebind.example` get these answers in turn, the last for ever; returns the list of look-ups."""
    real, asked, left = socket.getaddrinfo, [], list(answers)

    def look_up(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host != "rebind.example":
            return real(host, port, *args, **kwargs)
        asked.append(host)
        addresses = left.pop(0) if len(left) > 1 else left[0]
        return [entry for address in addresses for entry in real(address, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


def test_a_name_whose_answer_changes_after_the_check_leads_to_the_checked_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Receiver("127.0.0.2") as allowed, Receiver("127.0.0.3") as forbidden:
        allowed.pages["/picture"] = Reply(200, body=b"picture")
        # The forbidden server listens on the same port as the allowed one, so that only the address tells them apart.
        asked = answering(monkeypatch, ["127.0.0.2"], ["127.0.0.3"])
        client = client_for("127.0.0.2/32")
        assert fetch(client, f"http://rebind.example:{allowed.port}/picture") == b"picture"
        assert asked == ["rebind.example"], "a second look-up could have another answer"
        assert allowed.requests[0].headers["Host"] == f"rebind.example:{allowed.port}"
        # Asked again, the name leads to where it may not.
        for port in (allowed.port, forbidden.port):
            with pytest.raises(BlockedUrl):
                fetch(client, f"http://rebind.example:{port}/picture")
        assert forbidden.requests == []


@pytest.mark.parametrize("addresses", [["127.0.0.2", "127.0.0.3"], ["127.0.0.3", "127.0.0.2"]])
def test_a_name_with_one_private_address_among_others_is_blocked(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    answering(monkeypatch, addresses)
    with pytest.raises(BlockedUrl, match="127.0.0.3"):
        client_for("127.0.0.2/32").check("http://rebind.example/")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int, receiver: Receiver) -> None:
    with Receiver("127.0.0.2") as secret:
        receiver.pages["/moved"] = Reply(status, {"Location": f"{secret.url}/picture"})
        client = client_for("127.0.0.1/32")
        with pytest.raises(FetchFailed) as refused:
            fetch(client, f"{receiver.url}/moved")
        assert refused.value.facts == {"status_received": status}
        assert client.post(f"{receiver.url}/moved", b"{}", {}, timeout_seconds=5).status == status
        assert secret.requests == []


def test_an_operator_can_allow_a_private_block(receiver: Receiver) -> None:
    receiver.pages["/picture"] = Reply(200, {"Content-Type": "image/png"}, b"picture")
    url = f"{receiver.url}/picture?size=1&x=%20#part"
    with pytest.raises(BlockedUrl, match="ENLARGER_ALLOW_PRIVATE_ADDRESSES"):
        client_for("10.0.0.0/8", "fd00::/8").check(url)
    receiver.pages["/picture?size=1&x=%20"] = receiver.pages["/picture"]
    client = client_for("10.0.0.0/8", "127.0.0.0/8")
    client.check(url)
    file = io.BytesIO()
    assert client.fetch(url, file, limit_bytes=7, timeout_seconds=5) == "image/png"
    assert file.getvalue() == b"picture"
    (request,) = receiver.requests
    assert (request.method, request.headers["Accept-Encoding"]) == ("GET", "identity")
    assert request.headers["Host"] == f"127.0.0.1:{receiver.port}"


def test_no_proxy_of_the_environment_is_used(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver, canary: tuple[int, Callable[[], int]]
) -> None:
    port, hits = canary
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    receiver.pages["/picture"] = Reply(200, body=b"picture")
    assert fetch(client_for("127.0.0.0/8"), f"{receiver.url}/picture") == b"picture"
    assert hits() == 0


def test_a_source_larger_than_the_limit_is_cut_off(receiver: Receiver) -> None:
    receiver.pages["/large"] = Reply(200, body=bytes(2_000_000))
    receiver.pages["/fits"] = Reply(200, body=bytes(1000))
    client = client_for("127.0.0.0/8")
    file = io.BytesIO()
    with pytest.raises(BodyTooLarge) as refused:
        client.fetch(f"{receiver.url}/large", file, limit_bytes=1000, timeout_seconds=10)
    assert refused.value.facts == {"limit_bytes": 1000}
    assert len(file.getvalue()) <= 1000, "what is over the limit is not written"
    assert fetch(client, f"{receiver.url}/fits") == bytes(1000)


@pytest.mark.parametrize("status", [201, 204, 400, 401, 404, 500, 503])
def test_a_source_that_answers_other_than_200_is_no_picture(status: int, receiver: Receiver) -> None:
    receiver.pages["/x"] = Reply(status)
    with pytest.raises(FetchFailed) as refused:
        fetch(client_for("127.0.0.0/8"), f"{receiver.url}/x")
    assert refused.value.facts == {"status_received": status}
    assert refused.value.retryable


def test_a_source_that_is_not_there_is_a_failed_fetch() -> None:
    with pytest.raises(FetchFailed, match="did not answer"):
        fetch(client_for("127.0.0.0/8"), f"http://127.0.0.1:{closed_port()}/x")


@contextmanager
def a_server_that(says: Callable[[socket.socket, threading.Event], None]) -> Iterator[str]:
    """The URL of a TCP server that reads a request and then does what `says` does, until the event is set."""
    ending = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    says(connection, ending)

        thread = threading.Thread(target=serve, name="odd-server")
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        ending.set()
        # Whoever was never called is let go.
        with suppress(OSError):
            socket.create_connection(listener.getsockname(), timeout=5).close()
        thread.join(10)
        assert not thread.is_alive()


def say_nothing(_: socket.socket, ending: threading.Event) -> None:
    ending.wait(20)


def _drip(connection: socket.socket, ending: threading.Event, start: bytes) -> None:
    connection.sendall(start)
    while not ending.wait(0.02):
        connection.sendall(b"x")


TRICKLES = {
    "a head that never ends": b"HTTP/1.1 200 OK\r\nX-Long: ",
    "a body with a length": b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n",
    "a body without a length": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n",
}


@pytest.mark.parametrize("start", TRICKLES.values(), ids=TRICKLES)
def test_a_source_that_trickles_is_cut_off_in_time(start: bytes) -> None:
    """Each byte comes well within the timeout of a read; only the whole takes too long."""
    with a_server_that(lambda connection, ending: _drip(connection, ending, start)) as url:
        began = time.monotonic()
        with pytest.raises(FetchFailed, match="took longer than 0.5 s"):
            fetch(client_for("127.0.0.0/8"), url, limit_bytes=10_000, timeout_seconds=0.5)
        assert time.monotonic() - began < 5


def test_a_source_that_says_nothing_is_cut_off_in_time() -> None:
    with a_server_that(say_nothing) as url:
        began = time.monotonic()
        with pytest.raises(FetchFailed):
            fetch(client_for("127.0.0.0/8"), url, timeout_seconds=0.3)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"HTTP/1.1 999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nBad Header\r\n\r\n",
        b"",
    ],
)
def test_an_answer_that_is_not_http_is_a_failed_fetch(answer: bytes) -> None:
    with (
        a_server_that(lambda connection, _: connection.sendall(answer)) as url,
        pytest.raises(FetchFailed),
    ):
        fetch(client_for("127.0.0.0/8"), url)


def test_a_webhook_is_sent_as_it_is(receiver: Receiver) -> None:
    client = client_for("127.0.0.0/8")
    answer = client.post(
        f"{receiver.url}/hook",
        b'{"a": 1}',
        {"webhook-id": "msg_1", "Content-Type": "application/json"},
        timeout_seconds=5,
    )
    assert answer.status == 204
    assert answer.retry_after_seconds is None
    assert 0 < answer.seconds < 5
    (request,) = receiver.requests
    assert (request.method, request.path, request.body) == ("POST", "/hook", b'{"a": 1}')
    assert request.headers["webhook-id"] == "msg_1"
    assert request.headers["User-Agent"] == "Enlarger"


@pytest.mark.parametrize(
    ("said", "understood"),
    [("120", 120.0), ("0", 0.0), ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("-5", None), ("1e9", None), ("", None)],
)
def test_retry_after_is_understood_as_seconds(receiver: Receiver, said: str, understood: float | None) -> None:
    receiver.replies.append(Reply(503, {"Retry-After": said}))
    answer = client_for("127.0.0.0/8").post(receiver.url, b"", {}, timeout_seconds=5)
    assert (answer.status, answer.retry_after_seconds) == (503, understood)


def test_the_body_of_a_receivers_answer_is_not_waited_for() -> None:
    start = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"
    with a_server_that(lambda connection, ending: _drip(connection, ending, start)) as url:
        began = time.monotonic()
        assert client_for("127.0.0.0/8").post(url, b"{}", {}, timeout_seconds=10).status == 200
        assert time.monotonic() - began < 5


def test_a_receiver_that_says_nothing_is_given_up() -> None:
    with a_server_that(say_nothing) as url, pytest.raises(FetchFailed):
        client_for("127.0.0.0/8").post(url, b"{}", {}, timeout_seconds=0.3)


def test_many_calls_leave_no_thread_behind(receiver: Receiver) -> None:
    client = client_for("127.0.0.0/8")
    for _ in range(20):
        client.post(receiver.url, b"{}", {}, timeout_seconds=60)
    left = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    for thread in left:
        thread.join(5)
    assert not any(thread.is_alive() for thread in left), "a timer waits for a call that has ended"
