"""Images in the protocols that carry them: what the guard judged is what the backend gets."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from guard_middleware.guards import Conversation, RemoteGuard
from guard_middleware.messages import App
from guard_middleware.settings import Settings
from guard_middleware.sidecar import Places, Sidecar
from guard_middleware.verdict import Outcome
from guard_service.config import Settings as ServiceSettings
from guard_service.server import local_server
from tests.middleware.asgi_calls import Backend, listening
from tests.middleware.formats.openai_replies import reply
from tests.middleware.wrapped import Wrapped
from tests.service.images.drawing import BLUE, RED, drawn

SAFE, UNSAFE, BROKEN = drawn(BLUE), drawn(RED), drawn(BLUE)[:-1]
SAID = "A boat."


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64_of(data)}"


def chat(*images: bytes) -> Any:
    parts = [{"type": "image_url", "image_url": {"url": url(one)}} for one in images]
    content = [{"type": "text", "text": "Look"}, *parts]
    return {"model": "m", "messages": [{"role": "user", "content": content}]}


def responses(*images: bytes) -> Any:
    parts = [{"type": "input_image", "image_url": url(one)} for one in images]
    content = [{"type": "input_text", "text": "Look"}, *parts]
    return {"model": "m", "input": [{"role": "user", "content": content}]}


def ollama_chat(*images: bytes) -> Any:
    turn = {"role": "user", "content": "Look", "images": [base64_of(one) for one in images]}
    return {"model": "m", "messages": [turn], "stream": False}


def ollama_generate(*images: bytes) -> Any:
    encoded = [base64_of(one) for one in images]
    return {"model": "m", "prompt": "Look", "images": encoded, "stream": False}


def bedrock(*images: bytes) -> Any:
    blocks = [{"image": {"format": "png", "source": {"bytes": base64_of(one)}}} for one in images]
    return {"messages": [{"role": "user", "content": [{"text": "Look"}, *blocks]}]}


def tgi(*images: bytes) -> Any:
    return {"inputs": "Look " + "".join(f"![]({url(one)})" for one in images)}


def llama_stack(*images: bytes) -> Any:
    items = [{"type": "image", "image": {"data": base64_of(one)}} for one in images]
    content = [{"type": "text", "text": "Look"}, *items]
    return {"model_id": "m", "messages": [{"role": "user", "content": content}]}


SPOKEN = {"type": "output_text", "text": SAID, "annotations": []}
MESSAGE = {"type": "message", "id": "m", "role": "assistant", "content": [SPOKEN]}
PROTOCOLS: dict[str, tuple[str, Callable[..., Any], Any]] = {
    "openai chat": ("/v1/chat/completions", chat, reply(SAID)),
    "openai responses": (
        "/v1/responses",
        responses,
        {"id": "r", "object": "response", "status": "completed", "output": [MESSAGE]},
    ),
    "ollama chat": (
        "/api/chat",
        ollama_chat,
        {"model": "m", "message": {"role": "assistant", "content": SAID}, "done": True},
    ),
    "ollama generate": (
        "/api/generate",
        ollama_generate,
        {"model": "m", "response": SAID, "done": True},
    ),
    "bedrock": (
        "/model/m/converse",
        bedrock,
        {"output": {"message": {"role": "assistant", "content": [{"text": SAID}]}}},
    ),
    "tgi": ("/generate", tgi, {"generated_text": SAID}),
    "llama stack": (
        "/v1/inference/chat-completion",
        llama_stack,
        {"completion_message": {"role": "assistant", "content": SAID, "tool_calls": []}},
    ),
}


class Recording(RemoteGuard):
    """Keeps what the guard answered."""

    def __init__(self, target: str) -> None:
        super().__init__(Settings(guard=target))
        self.outcomes: list[Outcome] = []

    async def judge(self, conversations: Sequence[Conversation]) -> Sequence[Outcome]:
        outcomes = await super().judge(conversations)
        self.outcomes += outcomes
        return outcomes


@pytest.fixture(scope="module")
def seeing_guard() -> Iterator[str]:
    """The target of a guard that sees red."""
    with local_server(ServiceSettings(model="fake-vision")) as target:
        yield target


@asynccontextmanager
async def behind(app: App) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        listening(app, lifespan="auto") as address,
        httpx.AsyncClient(base_url=address, timeout=60, trust_env=False) as client,
    ):
        yield client


@asynccontextmanager
async def asgi(backend: Backend, guard: Recording) -> AsyncIterator[httpx.AsyncClient]:
    async with behind(Wrapped(backend, guard)) as client:
        yield client


@asynccontextmanager
async def sidecar(backend: Backend, guard: Recording) -> AsyncIterator[httpx.AsyncClient]:
    async with listening(backend) as upstream:
        made = Sidecar(Places(upstream), Settings(guarded=("/",)), guard)
        async with behind(made.middleware) as client:
            yield client


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("way", [asgi, sidecar])
async def test_the_guard_sees_the_image_that_the_backend_gets(
    seeing_guard: str, way: Any, protocol: str
) -> None:
    path, asking, said = PROTOCOLS[protocol]
    backend = Backend([json.dumps(said).encode()])
    guard = Recording(seeing_guard)
    async with way(backend, guard) as client:
        passed = await client.post(path, json=asking(SAFE))
        assert passed.status_code == 200 and SAID in passed.text, passed.text
        assert backend.asked == asking(SAFE)
        assert digests(guard.outcomes[0]) == [hashlib.sha256(SAFE).hexdigest()]
        for images in ((UNSAFE,), (SAFE, UNSAFE), (UNSAFE, SAFE), (BROKEN,), (SAFE, BROKEN)):
            stopped = await client.post(path, json=asking(*images))
            assert stopped.status_code == 200 and SAID not in stopped.text
        assert len(backend.bodies) == 1


def digests(outcome: Outcome) -> list[str]:
    """Of the images that a verdict is about."""
    assert outcome.judged
    found = [part.image_digest for part in outcome.coverage.parts if part.kind == "image"]
    return [one.removeprefix("sha256:") for one in found]


async def test_an_image_of_the_past_that_is_not_allowed_is_left_out_of_what_is_forwarded(
    seeing_guard: str,
) -> None:
    turns = [*chat(UNSAFE)["messages"], {"role": "assistant", "content": "Red."}]
    newest = {"role": "user", "content": "And now?"}
    backend = Backend([json.dumps(reply(SAID)).encode()])
    async with asgi(backend, Recording(seeing_guard)) as client:
        got = await client.post(
            "/v1/chat/completions", json={"model": "m", "messages": [*turns, newest]}
        )
    assert got.json() == reply(SAID)
    assert backend.asked == {"model": "m", "messages": [newest]}


async def test_images_before_a_guard_that_sees_none_are_refused(fake_guard: str) -> None:
    backend = Backend([json.dumps(reply(SAID)).encode()])
    async with asgi(backend, Recording(fake_guard)) as client:
        got = await client.post("/v1/chat/completions", json=chat(SAFE))
    assert got.json()["choices"][0]["finish_reason"] == "content_filter"
    assert not backend.bodies
