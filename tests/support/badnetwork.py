"""The way to a server, made worse while connections are open: slow, silent, broken off, closed.

A proxy of TCP on 127.0.0.1 before a real server, in a thread of the test's process. What happens to bytes on their way
is its mood, which a test changes at any time.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import trio

__all__ = ["BadNetwork", "Mood"]

PIECE = 65536  # bytes that are taken at once
FAREWELL = 10.0  # seconds that a client who was told the end may take to close


@dataclass(frozen=True, kw_only=True)
class Mood:
    """What happens to bytes on their way.

    Attributes:
        delay: seconds that each piece is held, in both directions.
        silent: connections are taken and stay open, but nothing passes before the mood is another one.
        refused: nobody listens, and connections that were open are reset.
        cut: bytes of answers, since the mood began, after which a connection ends; None: none does.
        reset: such an end is a reset; otherwise it looks as if all had been said.
        once: with the first such end all is well again.
    """

    delay: float = 0.0
    silent: bool = False
    refused: bool = False
    cut: int | None = None
    reset: bool = False
    once: bool = False


WELL = Mood()


class BadNetwork:
    """The way to a server on 127.0.0.1.

    Attributes:
        port: where clients find it.
        connections: how many were taken so far.
        ends: how many of them `cut` has ended.
    """

    def __init__(self, server: int) -> None:
        """`server`: its port."""
        self.server = server
        self.port = self.connections = self.ends = 0
        self.now = WELL
        self.changed = trio.Event()
        self._ways: set[_Way] = set()
        self._started = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._run,), name="bad-network")
        self._thread.start()
        self._started.wait()

    @contextmanager
    def mood(self, mood: Mood) -> Iterator[None]:
        """Let all be as `mood` says until the end of the block."""
        self._tell(mood)
        try:
            yield
        finally:
            self._tell(WELL)

    def __enter__(self) -> BadNetwork:
        return self

    def __exit__(self, *raised: object) -> None:
        trio.from_thread.run_sync(self._nursery.cancel_scope.cancel, trio_token=self._token)
        self._thread.join()

    def _tell(self, mood: Mood) -> None:
        trio.from_thread.run(self.become, mood, trio_token=self._token)

    async def become(self, mood: Mood) -> None:
        """Change the mood, in the proxy's own thread; it holds when this returns."""
        before, self.now = self.now, mood
        if mood.refused and not before.refused:
            self._listener.close()
            for way in self._ways:
                way.end(reset=True)
        elif before.refused and not mood.refused:
            await self._listen()
        self.changed.set()
        self.changed = trio.Event()

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self._nursery:
            await self._listen()
            self._started.set()
            await trio.sleep_forever()
        self._listener.close()

    async def _listen(self) -> None:
        self._listener = trio.socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await self._listener.bind(("127.0.0.1", self.port))
        self._listener.listen(64)
        self.port = self._listener.getsockname()[1]
        self._nursery.start_soon(self._accept, self._listener)

    async def _accept(self, listener: trio.socket.SocketType) -> None:
        while listener.fileno() >= 0:
            try:
                client, _ = await listener.accept()
            except (OSError, trio.ClosedResourceError):  # it was closed, or a client has gone before it was taken
                await trio.sleep(0.01)
                continue
            self.connections += 1
            self._nursery.start_soon(self._carry, client)

    async def _carry(self, client: trio.socket.SocketType) -> None:
        way = _Way(self, client)
        self._ways.add(way)
        try:
            await way.carry()
        finally:
            self._ways.remove(way)


class _Way:
    """One connection of a client, and the one to the server that belongs to it."""

    def __init__(self, network: BadNetwork, client: trio.socket.SocketType) -> None:
        self._network = network
        self._client = client
        self._scope = trio.CancelScope()
        self._farewell = False
        self._mood = WELL  # of which `_answered` bytes of answers have passed
        self._answered = 0

    def end(self, *, reset: bool) -> None:
        """End the connection; what is on its way in the proxy is lost."""
        if reset:  # closing it with this option sends one
            self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._farewell = not reset
        self._scope.cancel()

    async def carry(self) -> None:
        with self._client, suppress(OSError):
            with self._scope, trio.socket.socket() as server:
                await server.connect(("127.0.0.1", self._network.server))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump, self._client, server, False)
                    nursery.start_soon(self._pump, server, self._client, True)
            if self._farewell:
                await self._say_farewell()

    async def _say_farewell(self) -> None:
        """Send an end and not a reset, which closing a connection is whose last bytes nobody has taken."""
        self._client.shutdown(socket.SHUT_WR)
        with trio.move_on_after(FAREWELL):
            while await self._client.recv(PIECE):
                pass

    async def _pump(self, source: trio.socket.SocketType, sink: trio.socket.SocketType, answers: bool) -> None:
        try:
            while piece := await source.recv(PIECE):
                while self._network.now.silent:
                    await self._network.changed.wait()
                await trio.sleep(self._network.now.delay)
                await _send(sink, await self._cut(piece) if answers else piece)
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # one side broke off: so it is for the other
            self.end(reset=True)

    async def _cut(self, piece: bytes) -> bytes:
        """Return what passes of an answer, before the connection ends or goes on."""
        mood = self._network.now
        if mood is not self._mood:
            self._mood, self._answered = mood, 0
        if mood.cut is None:
            return piece
        self._answered += len(piece)
        if self._answered <= mood.cut:
            return piece
        self._network.ends += 1
        if mood.once:
            await self._network.become(WELL)
        await _send(self._client, piece[: len(piece) - (self._answered - mood.cut)])
        self.end(reset=mood.reset)
        return b""


async def _send(sink: trio.socket.SocketType, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[await sink.send(view) :]
