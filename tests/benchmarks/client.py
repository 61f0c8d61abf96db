"""The customer of the benchmarks: raw sockets and the standard library, so that it costs little beside the service.

    python -m tests.benchmarks.client '{"port": 8000, "key": "enl_...", "connections": 8, "seconds": 5, ...}'

Each connection sends its next request when the last is answered. Prints one JSON document: each request's seconds, and
the processor's seconds that this process itself took.
"""

from __future__ import annotations

import json
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any


def request_of(asked: dict[str, Any], picture: bytes, number: int) -> bytes:
    """A POST of the picture where there is one, else a GET of one of `paths`, in turns."""
    head = f"Host: 127.0.0.1\r\nAuthorization: Bearer {asked['key']}\r\n"
    if not picture:
        path = asked["paths"][number % len(asked["paths"])]
        return f"GET {path} HTTP/1.1\r\n{head}\r\n".encode()
    # Another boundary each time, as every client does: servers keep the patterns of those they have seen.
    boundary = secrets.token_hex(16)
    part = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="picture.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    ).encode()
    body = part + picture + f"\r\n--{boundary}--\r\n".encode()
    return (
        f"POST {asked['paths'][0]} HTTP/1.1\r\n{head}Content-Type: multipart/form-data; boundary={boundary}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def answer_to(connection: socket.socket, request: bytes) -> tuple[int, bytes]:
    """(status, body). Raises ConnectionError where the server hangs up."""
    connection.sendall(request)
    heard = b""
    while b"\r\n\r\n" not in heard:
        heard += _more(connection)
    head, _, body = heard.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
    while len(body) < length:
        body += _more(connection)
    return int(head[9:12]), body


def _more(connection: socket.socket) -> bytes:
    chunk = connection.recv(65536)
    if not chunk:
        raise ConnectionError("The server has hung up.")
    return chunk


def load(asked: dict[str, Any]) -> dict[str, Any]:
    """Keeps `connections` busy for `seconds` and tells what came of it."""
    picture = Path(asked["picture"]).read_bytes() if asked.get("picture") else b""
    seconds: list[float] = []
    wrong: dict[str, int] = {}
    began = time.perf_counter()
    ends_at = began + asked["seconds"]

    def talk(first: int) -> None:
        with socket.create_connection(("127.0.0.1", asked["port"]), timeout=60) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            number = first
            # Twice at least: of a machine too busy for that in time there still are figures.
            while (sent_at := time.perf_counter()) < ends_at or number < first + 2:
                status, body = answer_to(connection, request_of(asked, picture, number))
                seconds.append(time.perf_counter() - sent_at)
                if status != asked["status"]:
                    said = f"{status} {body[:200].decode(errors='replace')}"
                    wrong[said] = wrong.get(said, 0) + 1
                number += 1

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(asked["connections"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    return {"seconds": seconds, "took": took, "cpu_seconds": time.process_time(), "wrong": wrong}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(load(json.loads(sys.argv[1]))))
