"""One direction of a screened exchange, in each of the ways in which Envoy sends bodies.

A side is read by whoever judges (`next`) and written by whoever was allowed to (`begin`, `write`,
`finish`); between them stands nothing but the verdicts. What Envoy sends comes in by `take_*`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from guard_api.ext_proc.v3 import processing_pb2 as pb
from guard_middleware.ext_proc.modes import BUFFERED, DUPLEX, Mode
from guard_middleware.ext_proc.wire import Misled, Words, mutation, without_all
from guard_middleware.messages import Header

Read = Callable[[], Awaitable[pb.ProcessingRequest | None]]
Write = Callable[[pb.ProcessingResponse], Awaitable[None]]
Early = Callable[[Sequence[Header]], Sequence[Header]]

MOST_CHUNKS = 16  # that wait to be read; more stay with Envoy, which holds the sender back
CHUNK_BYTES = 64 * 1024  # what Envoy recommends at most


class Side:
    """The part that all ways share. `early` makes headers that are answered before what they will
    be is known."""

    def __init__(self, direction: str, write: Write, early: Early) -> None:
        self.headers: list[Header] = []
        self.bodiless = False
        self.arrived = asyncio.Event()
        self.told = False  # the headers are answered
        self.done = False  # all that will ever go on has gone
        self._direction = direction
        self._words = Words(direction)
        self._write = write
        self._early = early
        self._inbox: asyncio.Queue[tuple[bytes, bool] | None] = asyncio.Queue(MOST_CHUNKS)
        self._ended = asyncio.Event()  # all of the body has come
        self._trailers: pb.HttpTrailers | None = None
        self._cut = False

    @property
    def settled(self) -> bool:
        """Whether headers have gone on for good."""
        return self.told

    # What comes from Envoy.

    def take_headers(self, headers: list[Header], bodiless: bool) -> None:
        """The headers have come."""
        self.headers, self.bodiless = headers, bodiless
        if bodiless:
            self._ended.set()
        self.arrived.set()

    async def take_body(self, chunk: pb.HttpBody) -> None:
        """A chunk of the body has come."""
        self._heed(chunk.end_of_stream)
        if not self.done:
            await self._inbox.put((chunk.body, chunk.end_of_stream))

    async def take_trailers(self, trailers: pb.HttpTrailers) -> None:
        """The trailers have come: the body has ended without saying so."""
        self._heed_trailers(trailers)
        if not self.done:
            await self._inbox.put((b"", True))

    def cut(self) -> None:
        """Nothing more will come."""
        self._cut = True
        self._ended.set()
        if not self._inbox.full():
            self._inbox.put_nowait(None)

    def abandon(self) -> None:
        """Nobody reads any more, and nothing is written."""
        self.done = True
        while not self._inbox.empty():
            self._inbox.get_nowait()

    def _heed(self, last: bool) -> None:
        if not self.arrived.is_set():
            way = self._direction
            raise Misled(f"the {way}'s body came before its headers: set {way}_header_mode SEND")
        if self._ended.is_set():
            raise Misled("more of a body came behind its end")
        if last:
            self._ended.set()

    def _heed_trailers(self, trailers: pb.HttpTrailers) -> None:
        if not self.arrived.is_set() or self.bodiless or self._trailers is not None:
            raise Misled("trailers came out of order")
        self._trailers = trailers
        self._ended.set()

    # What is read.

    async def next(self) -> tuple[bytes, bool]:
        """The next chunk, and whether it is the last one. Raises EOFError when none will come."""
        if self.bodiless:
            return b"", True
        if self._cut and self._inbox.empty():
            raise EOFError
        if not self.told:
            await self._tell_early()
        if (chunk := await self._inbox.get()) is None:
            raise EOFError
        return chunk

    async def _tell_early(self) -> None:
        """Answer the headers, so that the body comes."""

    # What is written.

    async def begin(self, headers: Sequence[Header]) -> None:
        """These headers go on."""
        raise NotImplementedError

    async def write(self, data: bytes) -> None:
        """These bytes go on behind those before."""
        raise NotImplementedError

    async def finish(self, data: bytes) -> None:
        """Nothing more goes on behind these last bytes, whatever still comes."""
        raise NotImplementedError


class Buffered(Side):
    """BUFFERED: Envoy holds headers and body until the one message with the whole body is
    answered."""

    def __init__(self, direction: str, write: Write, early: Early) -> None:
        super().__init__(direction, write, early)
        self._changed = pb.HeaderMutation()
        self._body = bytearray()
        self._whole = False

    @property
    def settled(self) -> bool:
        """Envoy holds them until the body is answered."""
        return self.done

    async def take_body(self, chunk: pb.HttpBody) -> None:
        """All of the body has come: only trailers may be behind it."""
        if self._whole:
            raise Misled("there are two bodies where one was to come whole")
        self._whole = True
        await super().take_body(pb.HttpBody(body=chunk.body, end_of_stream=True))

    async def take_trailers(self, trailers: pb.HttpTrailers) -> None:
        """Trailers come when the body is answered, or without one."""
        if not self._whole:
            self._heed_trailers(trailers)
            raise Misled("trailers came without a body")
        await self._write(self._words.trailers(without_all(trailers)))

    async def _tell_early(self) -> None:
        self.told = True
        await self._write(self._words.headers())

    async def begin(self, headers: Sequence[Header]) -> None:
        """With the body, or at once where there is none."""
        self._changed = mutation(self.headers, headers, length=not self.bodiless)

    async def write(self, data: bytes) -> None:
        """When it is whole."""
        self._body += data

    async def finish(self, data: bytes) -> None:
        """Answer what is open."""
        await self.write(data)
        if not self.bodiless and not self._whole:
            raise Misled("a body that was to come whole has not come")
        self.abandon()
        if self.bodiless:
            await self._write(self._words.headers(self._changed))
        else:
            await self._write(self._words.body(bytes(self._body), self._changed))


class Streamed(Side):
    """STREAMED: for each chunk that came one goes on, at once with what may go by then; the last
    one takes all that is left. Headers go on before the body is seen."""

    def __init__(self, direction: str, write: Write, early: Early) -> None:
        super().__init__(direction, write, early)
        self._ready = bytearray()
        self._open = False  # the last chunk waits for its answer

    async def take_body(self, chunk: pb.HttpBody) -> None:
        """Answered at once, but the last one with the end of what goes on."""
        await super().take_body(chunk)
        if self.done or not chunk.end_of_stream:
            await self._give()
        else:
            self._open = True

    async def take_trailers(self, trailers: pb.HttpTrailers) -> None:
        """There is no chunk left that could take what was held back."""
        self._heed_trailers(trailers)
        if not self.done or self._ready:
            raise Misled(
                "a body that ends in trailers cannot be held back in STREAMED mode: "
                "set FULL_DUPLEX_STREAMED"
            )
        await self._write(self._words.trailers(without_all(trailers)))

    async def _tell_early(self) -> None:
        self.told = True
        await self._write(self._words.headers(mutation(self.headers, self._early(self.headers))))

    async def begin(self, headers: Sequence[Header]) -> None:
        """They went already, unless nothing comes behind them."""
        if not self.told:
            self.told = True
            await self._write(self._words.headers(mutation(self.headers, headers)))

    async def write(self, data: bytes) -> None:
        """With the next chunk that comes."""
        self._ready += data

    async def finish(self, data: bytes) -> None:
        """With the last chunk that came, or the next that comes; those behind that are empty."""
        await self.write(data)
        self.abandon()
        if self._open:
            await self._give()

    async def _give(self) -> None:
        data, self._ready = bytes(self._ready), bytearray()
        await self._write(self._words.body(data))


class Duplex(Side):
    """FULL_DUPLEX_STREAMED: what comes and what goes on are two streams of their own."""

    async def begin(self, headers: Sequence[Header]) -> None:
        """At once."""
        self.told = True
        await self._write(self._words.headers(mutation(self.headers, headers)))

    async def write(self, data: bytes) -> None:
        """At once."""
        for at in range(0, len(data), CHUNK_BYTES):
            await self._write(self._words.chunk(data[at : at + CHUNK_BYTES], end=False))

    async def finish(self, data: bytes) -> None:
        """At once, without the trailers that came."""
        self.abandon()
        if self._trailers is not None:
            await self.write(data)
            await self._write(self._words.trailers(without_all(self._trailers)))
        elif not self.bodiless:
            rest = (len(data) - 1) // CHUNK_BYTES * CHUNK_BYTES if data else 0
            await self.write(data[:rest])
            await self._write(self._words.chunk(data[rest:], end=True))


def side(mode: Mode | None, direction: str, write: Write, early: Early) -> Side:
    """The side for a mode that `Modes.demand` lets pass."""
    if mode == BUFFERED:
        return Buffered(direction, write, early)
    if mode == DUPLEX:
        return Duplex(direction, write, early)
    return Streamed(direction, write, early)
