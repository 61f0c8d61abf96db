"""The one HTTP client for addresses that customers name: source pictures and webhooks.

It resolves a name once, checks every address it got, and connects to the checked address itself, so that a second
answer of the name server (DNS rebinding) cannot lead anywhere else. It follows no redirect and uses no proxy.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import SplitResult, urlsplit

from shared.errors import BlockedUrl, BodyTooLarge, FetchFailed

if TYPE_CHECKING:
    import ssl

    import httpx

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# The addresses DNS64 makes of IPv4 ones, on a network without IPv4: they lead wherever the inner one does.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# 6to4 and Teredo carry an IPv4 address too. Nobody serves pictures there any more, so none is let through.
_TUNNELS = (ipaddress.IPv6Network("2002::/16"), ipaddress.IPv6Network("2001::/32"))


@functools.cache
def _tls() -> ssl.SSLContext:
    """What every client connects with: to read the certificates of this machine takes 20 ms."""
    # Here and below: httpx comes with the first address that somebody names, not with the start of every process.
    import httpx

    return httpx.create_ssl_context()


@dataclass(frozen=True)
class Answer:
    """What a webhook receiver said: status, Retry-After in seconds where it gave a number, seconds it took."""

    status: int
    retry_after_seconds: float | None
    seconds: float


class GuardedClient:
    """Connects to public addresses only, and to the private blocks an operator allows (`allow_private_addresses`)."""

    def __init__(self, allowed_private: Sequence[str] = ()) -> None:
        self._allowed: tuple[Network, ...] = tuple(ipaddress.ip_network(block) for block in allowed_private)

    def check(self, url: str) -> None:
        """Raises BlockedUrl where the address may not be reached as things are now, FetchFailed where it has none."""
        parts = _split(url)
        self._resolve(parts)

    def fetch(self, url: str, file: BinaryIO, *, limit_bytes: int, timeout_seconds: float) -> str:
        """Writes what `url` answers to GET into `file`; returns its content type.

        Raises BlockedUrl, FetchFailed (no answer, other than 200, too slow in all), BodyTooLarge.
        """
        total = 0
        with self._open("GET", url, timeout_seconds=timeout_seconds) as response:
            if response.status_code != 200:
                raise FetchFailed(f"The source answered {response.status_code}.", status_received=response.status_code)
            for chunk in response.iter_raw():
                total += len(chunk)
                if total > limit_bytes:
                    raise BodyTooLarge(f"The source is larger than {limit_bytes:,} bytes.", limit_bytes=limit_bytes)
                file.write(chunk)
            return str(response.headers.get("content-type", ""))

    def post(self, url: str, body: bytes, headers: dict[str, str], *, timeout_seconds: float) -> Answer:
        """Sends a webhook. Any status is an answer; redirects are not followed. Raises BlockedUrl, FetchFailed."""
        started = time.monotonic()
        with self._open("POST", url, body=body, headers=headers, timeout_seconds=timeout_seconds) as response:
            # The body says nothing we use, so it is not waited for.
            retry_after = response.headers.get("retry-after", "")
            return Answer(
                response.status_code,
                float(retry_after) if retry_after.isascii() and retry_after.isdigit() else None,
                time.monotonic() - started,
            )

    @contextmanager
    def _open(
        self,
        method: str,
        url: str,
        *,
        timeout_seconds: float,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Iterator[httpx.Response]:
        import httpx

        parts = _split(url)
        host = parts.hostname or ""
        address = self._resolve(parts)
        literal = f"[{address}]" if address.version == 6 else str(address)
        port = f":{parts.port}" if parts.port else ""
        target = parts._replace(netloc=literal + port, fragment="").geturl()
        sent_headers = {
            **(headers or {}),
            "Host": (f"[{host}]" if ":" in host else host) + port,
            "User-Agent": "Enlarger",
            # A compressed answer could unfold to any size; we count the bytes we write.
            "Accept-Encoding": "identity",
        }
        deadline = _Deadline(timeout_seconds)
        try:
            with (
                deadline,
                httpx.Client(verify=_tls(), trust_env=False, follow_redirects=False, timeout=timeout_seconds) as client,
                client.stream(
                    method,
                    target,
                    content=body,
                    headers=sent_headers,
                    extensions={"sni_hostname": host, "trace": deadline.watch},
                ) as response,
            ):
                yield response
        # InvalidURL stands outside httpx's tree of errors; UnicodeError is a host that no header can hold.
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            if deadline.has_passed:
                raise FetchFailed(f"{parts.scheme}://{host} took longer than {timeout_seconds:g} s.") from error
            raise FetchFailed(f"{parts.scheme}://{host} did not answer: {type(error).__name__}.") from error
        # A body without a length ends where the connection does, also where we have cut it.
        if deadline.has_passed:
            raise FetchFailed(f"{parts.scheme}://{host} took longer than {timeout_seconds:g} s.")

    def _resolve(self, parts: SplitResult) -> Address:
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # ValueError: a host with a NUL in it.
        except (OSError, ValueError) as error:
            raise FetchFailed(f"The name {host} has no address.") from error
        addresses = [ipaddress.ip_address(str(entry[4][0]).split("%")[0]) for entry in found]
        for address in addresses:
            if not self._may_connect(address):
                raise BlockedUrl(
                    f"{host} leads to {address}, an address Enlarger does not connect to. "
                    "An operator can allow it in ENLARGER_ALLOW_PRIVATE_ADDRESSES.",
                    host=host,
                )
        return addresses[0]

    def _may_connect(self, address: Address) -> bool:
        inner = _carried(address)
        if any(address in block or inner in block for block in self._allowed):
            return True
        return _is_public(inner)


class _Deadline:
    """Cuts a connection at one moment, however slowly the other side trickles: httpx's timeouts are for each read."""

    def __init__(self, seconds: float) -> None:
        self.has_passed = False
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def watch(self, event_name: str, info: dict[str, Any]) -> None:
        """httpx's `trace` extension: is told of the connection as soon as there is one."""
        if event_name == "connection.connect_tcp.complete":
            with self._lock:
                # A second handle: TLS takes the first one over.
                self._connection = info["return_value"].get_extra_info("socket").dup()
                if self.has_passed:
                    self._shut()

    def _cut(self) -> None:
        with self._lock:
            self.has_passed = True
            self._shut()

    def _shut(self) -> None:
        if self._connection is not None:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port_is_readable = parts.port is None or parts.port > 0
    except ValueError as error:
        raise BlockedUrl("The address is not a URL.") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_readable:
        raise BlockedUrl("The address must be an http or https URL with a host.")
    if parts.username is not None or parts.password is not None:
        raise BlockedUrl("The address must not carry a user name or password.")
    return parts


def _is_public(address: Address) -> bool:
    # `is_global` alone passes multicast, the old site-local block, and reserved addresses with an IPv4 one inside
    # (::127.0.0.1).
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not (isinstance(address, ipaddress.IPv6Address) and address.is_site_local)
        and not any(address in tunnel for tunnel in _TUNNELS)
    )


def _carried(address: Address) -> Address:
    """The IPv4 address that a connection to a mapped or NAT64 address ends at; otherwise the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address
