"""A TCP proxy that breaks what goes through it, in each of the ways a network or the server behind it can."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Literal, Self, get_args

from shared.servers import LOOPBACK, free_port

Mode = Literal["pass", "refuse", "freeze", "reset", "lose_replies", "latency", "half_open"]
"""
pass          what comes in goes out
refuse        nobody listens: connecting fails at once, open connections are cut
freeze        connections open and nothing moves; it moves on when the mode ends
reset         connections open and are cut (RST) at the first byte
lose_replies  requests arrive and are carried out; the answer is thrown away and the connection cut
latency       each piece, each way, comes `latency_seconds` late
half_open     open connections fall silent for ever, without being closed; new ones work
"""
MODES: tuple[Mode, ...] = get_args(Mode)
PIECE_BYTES = 64 * 1024


class Proxy:
    """Listens on a port of the loopback and passes on to `upstream_port`; runs in a thread of its own."""

    def __init__(self, upstream_port: int, *, latency_seconds: float = 2.0) -> None:
        self.port = free_port()
        self._upstream_port = upstream_port
        self._latency_seconds = latency_seconds
        self._mode: Mode = "pass"
        self._is_closed = False
        self._links: set[_Link] = set()
        self._listener: asyncio.Server | None = None
        # Holds the port while nobody listens on it: the system refuses connections to it, and gives it to nobody else.
        self._placeholder: socket.socket | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{self.port}", daemon=True)

    @property
    def mode(self) -> Mode:
        return self._mode

    def set(self, mode: Mode) -> None:
        """Behaves so from now on."""
        self._run(self._set(mode))

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self) -> None:
        if self._placeholder is not None:
            self._placeholder.close()
            self._placeholder = None
        self._listener = await asyncio.start_server(
            self._serve, LOOPBACK, self.port, limit=PIECE_BYTES, reuse_address=True, backlog=512
        )

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _set(self, mode: Mode) -> None:
        self._mode = mode
        if mode == "refuse" and self._placeholder is None:
            self._stop_listening()
            self._placeholder = socket.socket()
            self._placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._placeholder.bind((LOOPBACK, self.port))
        elif mode != "refuse" and self._placeholder is not None:
            await self._listen()
        for link in list(self._links):
            if mode in ("refuse", "reset"):
                link.cut()
            elif mode == "half_open":
                link.is_silent = True
            link.changed.set()

    async def _close(self) -> None:
        self._is_closed = True
        self._stop_listening()
        if self._placeholder is not None:
            self._placeholder.close()
        # A connection accepted in this instant has a task and no link yet: its task has to begin before it can end.
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for link in list(self._links):
                link.cut()
            await asyncio.wait(others, timeout=0.05)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(writer)
        link.task = asyncio.current_task()
        self._links.add(link)
        try:
            if self._is_closed:
                return
            if self._mode == "reset":
                await reader.read(1)
                return
            await self._until_it_moves(link)
            up_reader, link.upstream = await asyncio.open_connection(LOOPBACK, self._upstream_port, limit=PIECE_BYTES)
            pumps = [
                asyncio.create_task(self._pump(link, reader, link.upstream, is_reply=False)),
                asyncio.create_task(self._pump(link, up_reader, writer, is_reply=True)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._links.discard(link)
            link.cut()

    async def _pump(
        self, link: _Link, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, is_reply: bool
    ) -> None:
        with suppress(OSError):
            while piece := await source.read(PIECE_BYTES):
                if self._mode == "latency":
                    await asyncio.sleep(self._latency_seconds)
                await self._until_it_moves(link)
                if is_reply and self._mode == "lose_replies":
                    return
                sink.write(piece)
                await sink.drain()
            # Let what is under way in the other direction come through before both ends are cut.
            await asyncio.sleep(0.05)

    async def _until_it_moves(self, link: _Link) -> None:
        while self._mode == "freeze" or link.is_silent:
            link.changed.clear()
            await link.changed.wait()


class _Link:
    """A client's connection and the one made for it to the server."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.upstream: asyncio.StreamWriter | None = None
        self.is_silent = False
        self.changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def cut(self) -> None:
        """Both ends get a reset."""
        for writer in (self.client, self.upstream):
            if writer is None:
                continue
            with suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()
