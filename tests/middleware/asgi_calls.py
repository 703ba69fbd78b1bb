"""Applications that answer by a script, and a client that calls applications without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from guard_middleware.messages import App, Message, Receive, Scope, Send

JSON = "application/json"
EVENTS = "text/event-stream"


@dataclass
class Backend:
    """An application that answers every request with the same chunks, and keeps what it got.

    `breaks` raises after the last chunk in place of ending the reply.
    """

    chunks: Iterable[bytes]
    content_type: str = JSON
    status: int = 200
    headers: tuple[tuple[bytes, bytes], ...] = ()
    breaks: bool = False
    bodies: list[bytes] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)
    cancelled: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        self.scopes.append(scope)
        self.bodies.append(await body_of(receive))
        headers = [(b"content-type", self.content_type.encode()), *self.headers]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        try:
            for chunk in self.chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.breaks:
            raise ConnectionResetError("the backend broke off")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @property
    def asked(self) -> Any:
        """The last request's JSON."""
        return json.loads(self.bodies[-1])


@dataclass
class Reply:
    """What a client got; `ended` when the reply came to its proper end."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)
    ended: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of the server-sent events, `[DONE]` left out."""
        assert self.body.endswith(b"\n\n")
        data = [line[6:] for line in self.body.splitlines() if line.startswith(b"data: ")]
        return [json.loads(one) for one in data if one != b"[DONE]"]

    def text(self, choice: int = 0, key: str = "content") -> str:
        """What a client of OpenAI's chat makes of the events."""
        return "".join(
            one["delta"].get(key) or ""
            for event in self.events
            for one in event.get("choices", ())
            if one["index"] == choice
        )


async def call(
    app: App,
    path: str,
    body: object,
    *,
    method: str = "POST",
    headers: Iterable[tuple[bytes, bytes]] = (),
    leaves: asyncio.Event | None = None,
) -> Reply:
    """One request; `body` is JSON unless it is bytes. The client leaves when `leaves` is set.

    Like the servers, it says so too once the reply has ended, to whoever still listens.
    """
    leaves = leaves or asyncio.Event()
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = Reply()
    requests = [{"type": "http.request", "body": raw, "more_body": False}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await leaves.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            assert not reply.status, "a response began twice"
            reply.status = message["status"]
            reply.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            assert reply.status and not reply.ended, "a body out of place"
            reply.chunks.append(message.get("body", b""))
            reply.ended = not message.get("more_body", False)
            if reply.ended:
                leaves.set()

    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"test"), (b"content-type", b"application/json"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "extensions": {"http.response.pathsend": {}},
    }
    await app(scope, receive, send)
    return reply


async def body_of(receive: Receive) -> bytes:
    """A request's whole body."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self.over = asyncio.Event()

    async def serve(self, sockets: Any = None) -> None:
        await self._serve(sockets)  # without taking the process's signals

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.over.wait()  # in place of a look every 100 ms

    async def shutdown(self, sockets: Any = None) -> None:
        if self.server_state.connections or self.server_state.tasks:
            await super().shutdown(sockets)
            return
        for server in self.servers:  # and nothing to give 100 ms to
            server.close()
        await self.lifespan.shutdown()


@asynccontextmanager
async def listening(app: App, lifespan: str = "on") -> AsyncIterator[str]:
    """Serve an application on a free port; yields http://host:port."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        lifespan=lifespan,  # type: ignore[arg-type]
        log_config=None,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=2,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve())
    try:
        await server.listening.wait()
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.over.set()
        await task


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


def sse(*values: object, done: bool = True, end: str = "\n\n") -> bytes:
    """Server-sent events."""
    text = "".join(f"data: {json.dumps(value, ensure_ascii=False)}{end}" for value in values)
    return (text + (f"data: [DONE]{end}" if done else "")).encode()


def each(values: Iterable[object]) -> list[bytes]:
    """Server-sent events, a chunk for each."""
    return [*(sse(value, done=False) for value in values), sse()]
