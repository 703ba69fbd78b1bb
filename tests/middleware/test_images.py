"""Images in the protocols that carry them: what the guard judged is what the backend gets."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard_middleware import GuardClient, GuardError
from guard_middleware.guards import Conversation, RemoteGuard
from guard_middleware.messages import App
from guard_middleware.settings import Settings
from guard_middleware.sidecar import Places, Sidecar
from guard_middleware.verdict import Outcome, SeenImage
from guard_service.config import Settings as ServiceSettings
from guard_service.images.fetch import Fetcher
from guard_service.local import local_server
from tests.middleware.asgi_calls import EVENTS, Backend, call, each, listening
from tests.middleware.formats.openai_replies import chunks, reply
from tests.middleware.wrapped import BAD, Wrapped
from tests.service.images.drawing import BLUE, RED, drawn, encoded, image
from tests.service.images.network import HOST, Network, http

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


async def test_a_streamed_reply_to_an_image_is_judged_beside_it(seeing_guard: str) -> None:
    for said, passes in ("All is well. " * 20, True), ("All is well. " * 20 + BAD, False):
        backend = Backend(each(chunks(said)), EVENTS)
        app = Wrapped(backend, Recording(seeing_guard))
        got = await call(app, "/v1/chat/completions", {**chat(SAFE), "stream": True})
        assert (got.text() == said) is passes and BAD not in got.text()
        await app.close()


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


URL = f"http://{HOST}/a.png"
FETCHING = f"""
name: fetching
version: "1"
image_uris: {{hosts: [{HOST}], ports: [80], schemes: [http]}}
"""


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    made = Network(monkeypatch)
    monkeypatch.setattr(Fetcher, "_by_system", lambda self, host, port: made.resolve(host, port))
    return made


@pytest.fixture
def fetching_guard(network: Network, tmp_path: Path) -> Iterator[str]:
    """The target of a guard that sees red and may fetch from that network."""
    (tmp_path / "fetching.yaml").write_text(FETCHING)
    settings = ServiceSettings(model="fake-vision", policies=(tmp_path,), default_policy="fetching")
    with local_server(settings) as target:
        yield target


def chat_at(*urls: str) -> Any:
    body = chat()
    parts = [{"type": "image_url", "image_url": {"url": one}} for one in urls]
    body["messages"][0]["content"] += parts
    return body


def responses_at(*urls: str) -> Any:
    body = responses()
    body["input"][0]["content"] += [{"type": "input_image", "image_url": one} for one in urls]
    return body


def llama_stack_at(*urls: str) -> Any:
    body = llama_stack()
    items = [{"type": "image", "image": {"url": {"uri": one}}} for one in urls]
    body["messages"][0]["content"] += items
    return body


AT = {
    "openai chat": chat_at,
    "openai responses": responses_at,
    "llama stack": llama_stack_at,
}


async def test_an_image_given_by_address_is_refused_unless_asked_for(
    fetching_guard: str, network: Network
) -> None:
    for settings in ({}, {"image_urls": "refuse"}):
        backend = Backend([json.dumps(reply(SAID)).encode()])
        app = Wrapped(backend, Recording(fetching_guard), **settings)
        got = await call(app, "/v1/chat/completions", chat_at(URL))
        assert got.json["choices"][0]["finish_reason"] == "content_filter"
        assert not backend.bodies
        await app.close()
    assert not network.asked


@pytest.mark.parametrize("protocol", AT)
async def test_the_backend_gets_what_the_guard_fetched(
    fetching_guard: str, network: Network, protocol: str
) -> None:
    path, _, said = PROTOCOLS[protocol]
    asking = AT[protocol]
    backend = Backend([json.dumps(said).encode()])
    guard = Recording(fetching_guard)
    app = Wrapped(backend, guard, image_urls="guard")
    async with network.serving(http(SAFE)):
        passed = await call(app, path, asking(URL, url(SAFE)))
    assert SAID.encode() in passed.body
    assert backend.asked == asking(url(SAFE), url(SAFE))
    assert len(network.requests) == 1
    assert digests(guard.outcomes[0]) == [hashlib.sha256(SAFE).hexdigest()] * 2
    async with network.serving(http(UNSAFE)):
        stopped = await call(app, path, asking(URL))
    async with network.serving(http(BROKEN)):
        broken = await call(app, path, asking(URL))
    elsewhere = await call(app, path, asking("http://evil.example/a.png"))
    many = await call(app, path, asking(*[URL] * 17))
    for refused in (stopped, broken, elsewhere, many):
        assert refused.status == 200 and SAID.encode() not in refused.body
    assert len(backend.bodies) == 1
    await app.close()


async def test_a_request_that_its_images_make_too_large_is_refused(
    fetching_guard: str, network: Network
) -> None:
    backend = Backend([json.dumps(reply(SAID)).encode()])
    large = encoded(image(size=(64, 64)), "BMP")
    app = Wrapped(backend, Recording(fetching_guard), image_urls="guard", max_body_bytes=8192)
    async with network.serving(http(large)):
        got = await call(app, "/v1/chat/completions", chat_at(URL))
    assert got.status == 413 and not backend.bodies
    await app.close()


async def test_through_the_sidecar_the_backend_gets_what_the_guard_fetched(
    fetching_guard: str, network: Network
) -> None:
    backend = Backend([json.dumps(reply(SAID)).encode()])
    path = "/v1/chat/completions"
    async with listening(backend) as upstream:
        settings = Settings(guard=fetching_guard, guarded=("/",), image_urls="guard")
        made = Sidecar(Places(upstream), settings)
        async with behind(made.middleware) as client:
            network.ours |= {httpx.URL(upstream).port, client.base_url.port}
            async with network.serving(http(SAFE)):
                passed = await client.post(path, json=chat_at(URL))
            async with network.serving(http(UNSAFE)):
                stopped = await client.post(path, json=chat_at(URL))
            elsewhere = await client.post(path, json=chat_at("http://evil.example/a.png"))
    assert passed.json() == reply(SAID) and backend.asked == chat(SAFE)
    for refused in (stopped, elsewhere):
        assert refused.json()["choices"][0]["finish_reason"] == "content_filter"
    assert len(backend.bodies) == 1


async def test_clients_get_the_image_behind_an_address_as_it_was_judged(
    fetching_guard: str, network: Network
) -> None:
    for data, blocked in ((SAFE, False), (UNSAFE, True)):
        async with network.serving(http(data)):
            seen = await asyncio.to_thread(asked_at, fetching_guard, URL)
        assert seen.outcome.judged and seen.outcome.blocked is blocked
        assert seen.data_url == url(data)
    with pytest.raises(GuardError):
        await asyncio.to_thread(asked_at, fetching_guard, "http://evil.example/a.png")
    with pytest.raises(ValueError, match="not well-formed") as raised:
        await asyncio.to_thread(asked_at, fetching_guard, "http://\ud800")
    assert raised.value.__context__ is None or raised.value.__suppress_context__


def asked_at(target: str, address: str) -> SeenImage:
    with GuardClient(target) as client:
        return client.image_at(address)
