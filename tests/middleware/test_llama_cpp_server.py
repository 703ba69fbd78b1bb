"""llama_cpp.server with a tiny GGUF: its application behind the middleware, and what its command
starts behind the sidecar.

Where it is installed (pip install 'llama-cpp-python[server]' gguf): it is compiled, which takes
long.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry

from guard_middleware import GuardMiddleware
from guard_middleware.guards import Guard
from guard_middleware.metrics import Metrics
from guard_middleware.proxy import Proxy
from guard_middleware.testing import FakeGuard
from guard_policies.assessment import Action
from tests.middleware.asgi_calls import listening
from tests.middleware.clients import NO, every_way
from tests.middleware.tiny_gguf import LOADED, tiny_gguf
from tests.middleware.wrapped import BAD, Wrapped

pytest.importorskip("gguf")
server = pytest.importorskip("llama_cpp.server.app")

# It does not close the stream that its events come through.
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed <MemoryObjectReceiveStream")

KNOBS: dict[str, Any] = {"max_tokens": 60, "temperature": 0.0}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALLED = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bare(file: Path) -> Iterator[str]:
    """The address of `python -m llama_cpp.server`."""
    told = {"model": file, "host": "127.0.0.1", "port": 0, "verbose": False, **LOADED}
    flags = [text for name, value in told.items() for text in (f"--{name}", str(value))]
    with subprocess.Popen(
        [sys.executable, "-m", "llama_cpp.server", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as started:
        assert started.stderr is not None
        found = (re.search(r"running on (http://\S+)", line) for line in started.stderr)
        address = next(one[1] for one in found if one)
        yield address
        started.terminate()


@asynccontextmanager
async def in_front(way: str, bare: str, file: Path, guard: Guard) -> AsyncIterator[str]:
    """The address of its application with the middleware, or of a sidecar's proxy before it."""
    if way == "middleware":
        app = application(file)
        app.add_middleware(GuardMiddleware, guard, metrics=Metrics(CollectorRegistry()), refusal=NO)
        async with listening(app) as address:
            yield address
        gc.collect()  # while the warning of it is ignored
        return
    proxy = Proxy(bare)
    app = Wrapped(proxy, guard, refusal=NO, guarded=("/",))
    async with listening(app, lifespan="off") as address:
        yield address
    await proxy.close()


def application(file: Path) -> Any:
    model = server.ModelSettings(model=str(file), verbose=False, **LOADED)
    return server.create_app(server_settings=server.ServerSettings(), model_settings=[model])


@asynccontextmanager
async def client(
    way: str, bare: str, file: Path, guard: Guard
) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        in_front(way, bare, file, guard) as address,
        openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as own,
    ):
        yield own


def asking(path: str, text: str) -> dict[str, Any]:
    if path == CHAT:
        return {"model": "tiny", "messages": [{"role": "user", "content": text}], **KNOBS}
    return {"model": "tiny", "prompt": text, **KNOBS}


async def said(own: openai.AsyncOpenAI, path: str, text: str, streams: bool) -> tuple[str, Any]:
    """The text of a reply, and why it ended."""
    create: Any = (own.chat.completions if path == CHAT else own.completions).create
    got = await create(**asking(path, text), stream=streams)
    choices = [one.choices[0] async for one in got] if streams else [got.choices[0]]
    if path == TEXT:
        texts = [one.text for one in choices]
    else:
        texts = [(one.delta if streams else one.message).content or "" for one in choices]
    return "".join(texts), choices[-1].finish_reason


def long_replies(text: str) -> Action:
    """Blocks what the model says at its 31st letter, and prompts with BAD."""
    return Action.BLOCK if BAD in text or len(text) > 30 else Action.ALLOW


def plain(value: Any) -> Any:
    """JSON without what is new in every reply."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if key not in ("id", "created")}
    return [plain(one) for one in value] if isinstance(value, list) else value


def events(body: str) -> list[Any]:
    """What a reply says, event by event if it is a stream."""
    if not body.startswith("data: "):
        return [plain(json.loads(body))]
    assert body.endswith("data: [DONE]\n\n")
    return [plain(json.loads(one[6:])) for one in body.split("\n\n")[:-2]]


every_path = pytest.mark.parametrize("path", [CHAT, TEXT])
streamed_or_not = pytest.mark.parametrize("streams", [False, True], ids=["whole", "streamed"])


@every_way
@streamed_or_not
@pytest.mark.parametrize(
    ("path", "more"),
    [
        (CHAT, {}),
        (CHAT, {"response_format": {"type": "json_object"}}),
        (CHAT, CALLED),
        (TEXT, {}),
        (TEXT, {"echo": True, "stop": ["j"]}),
    ],
)
async def test_allowed_reply_is_the_bare_servers(
    way: str, bare: str, file: Path, path: str, more: dict[str, Any], streams: bool
) -> None:
    body = {**asking(path, "Hi"), **more, "stream": streams}
    async with in_front(way, bare, file, FakeGuard()) as guarded, httpx.AsyncClient() as http:
        wanted, got = [await http.post(f"{at}{path}", json=body) for at in (bare, guarded)]
    assert events(got.text) == events(wanted.text)
    assert (got.status_code, got.headers["content-type"]) == (200, wanted.headers["content-type"])


@every_way
async def test_its_errors_pass(way: str, bare: str, file: Path) -> None:
    body = asking(TEXT, "too long " * 60)
    async with in_front(way, bare, file, FakeGuard()) as guarded, httpx.AsyncClient() as http:
        wanted, got = [await http.post(at + TEXT, json=body) for at in (bare, guarded)]
    assert got.status_code == wanted.status_code == 400
    assert got.json()["error"]["code"] == "context_length_exceeded" and got.text == wanted.text


@every_way
@every_path
@streamed_or_not
async def test_blocked_prompts_and_replies_are_refused(
    way: str, bare: str, file: Path, path: str, streams: bool
) -> None:
    guard = FakeGuard(long_replies, every_chars=8)
    async with client(way, bare, file, guard) as own:
        assert await said(own, path, BAD, streams) == (NO, "content_filter")
        text, reason = await said(own, path, "Hi", streams)
    assert reason == "content_filter" and (text == NO or streams and len(text) <= 30)


@every_way
@every_path
async def test_what_it_generates_is_what_is_judged(
    way: str, bare: str, file: Path, path: str
) -> None:
    guard = FakeGuard()
    async with client(way, bare, file, guard) as own:
        text, reason = await said(own, path, "Hi", streams=True)
    assert (len(text), reason) == (60, "length") and guard.streamed == [text]


@every_way
async def test_its_other_paths_are_screened_or_refused(way: str, bare: str, file: Path) -> None:
    completions = "/v1/engines/copilot-codex/completions"
    async with in_front(way, bare, file, FakeGuard(long_replies)) as at, httpx.AsyncClient() as to:
        blocked = await to.post(at + completions, json=asking(TEXT, BAD))
        refused = await to.post(f"{at}/v1/other", json=asking(TEXT, "Hi"))
        models = await to.get(f"{at}/v1/models")
    assert blocked.json()["choices"][0]["finish_reason"] == "content_filter"
    assert refused.status_code == 403 and models.json()["data"]
