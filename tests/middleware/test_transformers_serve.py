"""The application of `transformers serve`, with a tiny Llama, behind the middleware."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from transformers.commands import serving

from guard_middleware.testing import FakeGuard
from guard_policies.assessment import Action
from tests.middleware.asgi_calls import listening
from tests.middleware.formats.openai_replies import asking
from tests.middleware.tiny_chat_model import tiny_chat_model
from tests.middleware.wrapped import BAD, Wrapped


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("model")
    for one in tiny_chat_model():
        one.save_pretrained(place)
    return str(place)


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the command would serve."""
    served: list[Any] = []
    monkeypatch.setattr(serving.uvicorn, "run", lambda app, **where: served.append(app))
    serving.ServeCommand(serving.ServeArguments(device="cpu", log_level="error")).run()
    return served[0]


@asynccontextmanager
async def client(app: Any, guard: FakeGuard) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        listening(Wrapped(app, guard, refusal="No.")) as address,
        openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as own,
    ):
        yield own


async def said(own: openai.AsyncOpenAI, folder: str, text: str) -> tuple[str, str | None]:
    """The text of a streamed chat, and why it ended."""
    body = {**asking(text, stream=True), "model": folder, "max_tokens": 60, "temperature": 0.0}
    stream = await own.chat.completions.create(**body)
    choices = [event.choices[0] async for event in stream if event.choices]
    return "".join(one.delta.content or "" for one in choices), choices[-1].finish_reason


async def test_what_it_generates_is_screened(app: Any, folder: str) -> None:
    guard = FakeGuard(every_chars=8)
    async with client(app, guard) as own:
        text, reason = await said(own, folder, "Hi")
    assert (len(text), reason) == (60, "stop") and guard.streamed == [text]


async def test_blocked_prompts_and_replies_are_refused(app: Any, folder: str) -> None:
    def judge(text: str) -> Action:
        return Action.BLOCK if BAD in text or len(text) > 30 else Action.ALLOW

    guard = FakeGuard(judge, every_chars=8)
    async with client(app, guard) as own:
        assert await said(own, folder, BAD) == ("No.", "content_filter")
        text, reason = await said(own, folder, "Hi")
    assert reason == "content_filter" and len(text) <= 30
