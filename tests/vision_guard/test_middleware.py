"""A guard that has learnt what is drawn, behind ASGI middleware and sidecar, in OpenAI's chat."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest
from PIL.Image import Image

from guard_middleware.guards import RemoteGuard
from guard_middleware.settings import Settings
from guard_middleware.sidecar import Places, Sidecar
from tests.middleware.asgi_calls import Backend, listening
from tests.middleware.formats.openai_replies import PATH, reply
from tests.middleware.wrapped import Wrapped
from tests.service.images.drawing import PLAIN, encoded
from tests.vision_guard.drawings import CIRCLE, KINDS, MAKING, REPLIES, SQUARE, TRIANGLE, code_of
from tests.vision_guard.examples import LOOK, MAKE, Examples

pytestmark = pytest.mark.slow
SAID = REPLIES[0]
Way = Callable[[Backend, str], AbstractAsyncContextManager[str]]


@asynccontextmanager
async def asgi(backend: Backend, target: str) -> AsyncIterator[str]:
    app = Wrapped(backend, RemoteGuard(Settings(guard=target)))
    async with listening(app, lifespan="auto") as address:
        yield address


@asynccontextmanager
async def sidecar(backend: Backend, target: str) -> AsyncIterator[str]:
    async with listening(backend) as upstream:
        made = Sidecar(Places(upstream), Settings(guard=target, guarded=("/",)))
        async with listening(made.middleware, lifespan="auto") as address:
            yield address


@pytest.fixture(params=[asgi, sidecar], ids=["asgi", "sidecar"])
async def front(
    request: pytest.FixtureRequest, target: str
) -> AsyncIterator[tuple[httpx.AsyncClient, Backend]]:
    """A client of the guarded backend, which always answers SAID, and the backend."""
    backend, way = Backend([json.dumps(reply(SAID)).encode()]), request.param
    async with (
        way(backend, target) as address,
        httpx.AsyncClient(base_url=address, timeout=60, trust_env=False) as client,
    ):
        yield client, backend


Front = tuple[httpx.AsyncClient, Backend]


def turn(said: str, *pictures: Image, kind: str = "PNG") -> dict[str, Any]:
    """A user's turn with pictures in it."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": said}]
    for picture in pictures:
        data = base64.b64encode(encoded(picture, kind)).decode()
        url = f"data:image/{kind.lower()};base64,{data}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": parts}


async def passes(client: httpx.AsyncClient, *turns: dict[str, Any]) -> bool:
    """Whether the client got what the backend said; else it got a refusal, as OpenAI words it."""
    got = await client.post(PATH, json={"model": "llama", "messages": list(turns)})
    assert got.status_code == 200, got.text
    (choice,) = got.json()["choices"]
    passed: bool = choice["message"]["content"] == SAID
    assert choice["finish_reason"] == ("stop" if passed else "content_filter")
    return passed


async def test_what_is_drawn_decides_what_reaches_the_backend(
    front: Front, examples: Examples
) -> None:
    client, backend = front
    for drawn in KINDS:
        for said in (LOOK, MAKE):
            allowed = not code_of(drawn, said in MAKING)
            for picture in examples.of(drawn, 2, seed=700):
                before = len(backend.bodies)
                asked = turn(said, picture)
                assert await passes(client, asked) == allowed, (drawn, said)
                assert len(backend.bodies) - before == allowed
                assert not allowed or backend.asked["messages"] == [asked]


@pytest.mark.parametrize("kind", PLAIN)
async def test_in_every_format(front: Front, examples: Examples, kind: str) -> None:
    client, _ = front
    (square,), (circle,) = examples.of(SQUARE, 1), examples.of(CIRCLE, 1)
    assert not await passes(client, turn(LOOK, square, kind=kind))
    assert await passes(client, turn(LOOK, circle, kind=kind))


async def test_one_of_several_images_is_enough(front: Front, examples: Examples) -> None:
    client, _ = front
    (square,), circles = examples.of(SQUARE, 1), examples.of(CIRCLE, 2)
    assert await passes(client, turn(LOOK, *circles))
    assert not await passes(client, turn(LOOK, circles[0], square, circles[1]))


async def test_a_later_question_makes_an_earlier_image_unsafe(
    front: Front, examples: Examples
) -> None:
    client, _ = front
    (triangle,), (circle,) = examples.of(TRIANGLE, 1), examples.of(CIRCLE, 1)
    answer = {"role": "assistant", "content": SAID}
    for picture, newest, allowed in (
        (triangle, LOOK, True),
        (triangle, MAKE, False),
        (circle, MAKE, True),
    ):
        turns = turn(LOOK, picture), answer, turn(newest)
        assert await passes(client, *turns) == allowed


async def test_requests_at_once_each_go_by_their_own_image(
    front: Front, examples: Examples
) -> None:
    client, _ = front
    pairs = zip(examples.of(SQUARE, 6, seed=800), examples.of(CIRCLE, 6, seed=800), strict=True)
    asked = [turn(LOOK, picture) for pair in pairs for picture in pair]
    found = await asyncio.gather(*(passes(client, one) for one in asked))
    assert found == [False, True] * 6
