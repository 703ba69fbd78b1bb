"""What is logged of failures: never their own words, which could quote a request."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from guard_middleware.guards import Conversation
from guard_middleware.messages import Receive, Scope, Send
from guard_middleware.testing import FakeGuard, forbids
from guard_middleware.verdict import Outcome
from tests.middleware.asgi_calls import EVENTS, Backend, body_of, call
from tests.middleware.formats.openai_replies import PATH, asking
from tests.middleware.wrapped import BAD, Wrapped

WORDS = "what the user had written"


class Quoting(FakeGuard):
    async def judge(self, conversations: Sequence[Conversation]) -> Sequence[Outcome]:
        raise LookupError(WORDS)


def breaks(error: Exception) -> Wrapped:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await body_of(receive)
        headers = [(b"content-type", EVENTS.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            raise LookupError(WORDS)
        except LookupError as first:
            raise error from first

    return Wrapped(app)


async def test_application_that_fails_is_told_without_its_words(
    caplog: pytest.LogCaptureFixture,
) -> None:
    await call(breaks(ValueError(WORDS)), PATH, asking("Hi", stream=True))
    assert "ValueError" in caplog.text and "test_failures.py" in caplog.text
    assert WORDS not in caplog.text


async def test_connection_that_breaks_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    await call(breaks(ConnectionResetError(WORDS)), PATH, asking("Hi", stream=True))
    (line,) = (one.getMessage() for one in caplog.records if one.levelname == "WARNING")
    assert line == "the application failed while it answered: ConnectionResetError"


async def test_guard_that_fails_is_told_without_its_words(
    caplog: pytest.LogCaptureFixture,
) -> None:
    got = await call(Wrapped(Backend([b"{}"]), Quoting(forbids(BAD))), PATH, asking("Hi"))
    assert got.json["choices"][0]["finish_reason"] == "content_filter"
    assert "LookupError" in caplog.text and WORDS not in caplog.text
