"""What the tests of real clients share: backends that speak a protocol, and a guard before them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from guard_middleware.proxy import Proxy
from tests.middleware.asgi_calls import Backend, listening
from tests.middleware.formats.speech import Said, Speech
from tests.middleware.wrapped import Wrapped

NO = "No."

every_way = pytest.mark.parametrize("way", ["middleware", "sidecar"])


def spoken(speech: Speech, streamed: bool = False, **texts: str) -> Backend:
    """A backend that says a text on each of some channels."""
    said = {Said(0, channel): text for channel, text in texts.items()}
    if not streamed:
        return Backend([speech.whole(said)])
    pieces = [
        (one, text[at : at + 8]) for one, text in said.items() for at in range(0, len(text), 8)
    ]
    return Backend(speech.events(pieces), speech.stream_type)


@asynccontextmanager
async def in_front(way: str, backend: Backend) -> AsyncIterator[str]:
    """The address of a middleware around a backend, or of a sidecar's proxy before its server."""
    if way == "middleware":
        async with listening(Wrapped(backend, refusal=NO)) as address:
            yield address
        return
    async with listening(backend) as upstream:
        proxy = Proxy(upstream)
        app = Wrapped(proxy, refusal=NO, guarded=("/",))
        async with listening(app, lifespan="off") as address:
            yield address
        await proxy.close()
