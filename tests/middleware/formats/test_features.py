"""The README's tables of what is read of each protocol, cell by cell."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from guard_middleware.testing import FakeGuard
from tests.middleware.asgi_calls import Backend, call
from tests.middleware.formats.features import (
    COLUMNS,
    ENCODED,
    IMAGE,
    MARK,
    NUMBER,
    REPLIES,
    REQUESTS,
    At,
)
from tests.middleware.formats.speech import Said, Speech
from tests.middleware.wrapped import Wrapped

README = (Path(__file__).parents[3] / "middleware/README.md").read_text()
MARKS = (MARK.encode(), ENCODED.encode(), str(NUMBER).encode())


class Exchange:
    """One exchange in front of a guard that allows everything, and what became of the mark."""

    def __init__(self, speech: Speech, backend: Backend) -> None:
        self._speech = speech
        self._backend = backend
        self._guard = FakeGuard()
        self._app = Wrapped(backend, self._guard)

    async def of_request(self, body: object, path: str = "") -> str:
        """The mark is in the request: it should come to the backend."""
        packed = isinstance(body, bytes) and body[:2] == b"\x1f\x8b"
        headers = [(b"content-encoding", b"gzip")] if packed else []
        await call(self._app, path or self._speech.path, body, headers=headers)
        return self._outcome(b"".join(self._backend.bodies))

    async def of_reply(self, streamed: bool) -> str:
        """The mark is in the reply: it should come to the client."""
        speech = self._speech
        request = speech.request("Hi", streamed, speech.most_choices)
        got = await call(self._app, speech.stream_path if streamed else speech.path, request)
        return self._outcome(got.body)

    def _outcome(self, arrived: bytes) -> str:
        asked = b"".join(one.SerializeToString() for one in self._guard.asked)
        seen = any(MARK in text for text in self._guard.allowed) or IMAGE in asked
        if not self._app.results["passed"]:
            return "refused"
        if not any(mark in arrived for mark in MARKS):
            return "removed"
        return "read" if seen else "passes"


def whole(speech: Speech) -> dict[str, Any]:
    """A reply that says something else."""
    said: dict[str, Any] = json.loads(speech.whole({Said(0, speech.channels[0]): "Hello."}))
    return said


async def of_request(column: str, feature: dict[str, Any] | At | bytes | None) -> str:
    """A cell of the table of requests."""
    speech = COLUMNS[column]
    reply = whole(speech)
    path = ""
    if feature is None:
        return "—"
    if isinstance(feature, At):
        path, feature = feature
        reply = {"batch": [reply, reply]} if "batch" in path else reply
    elif isinstance(feature, dict):
        plain = speech.request("Hi", False)
        assert isinstance(plain, dict)
        feature = {**plain, **feature}
    exchange = Exchange(speech, Backend([json.dumps(reply).encode()]))
    return await exchange.of_request(feature, path)


async def of_reply(column: str, feature: Said | dict[str, Any] | bytes | None) -> str:
    """A cell of the table of replies; what can be said whole and streamed is said both ways."""
    speech = COLUMNS[column]
    outcomes = set()
    if feature is None:
        return "—"
    if not isinstance(feature, bytes):
        body = speech.whole({feature: MARK}) if isinstance(feature, Said) else None
        body = body or json.dumps({**whole(speech), **feature}).encode()  # type: ignore[dict-item]
        outcomes.add(await Exchange(speech, Backend([body])).of_reply(streamed=False))
    if not isinstance(feature, dict):
        plain = speech.events([(Said(0, speech.channels[0]), "Hello.")])
        chunks = (
            [feature, *plain] if isinstance(feature, bytes) else speech.events([(feature, MARK)])
        )
        backend = Backend(chunks, speech.stream_type)
        outcomes.add(await Exchange(speech, backend).of_reply(streamed=True))
    (outcome,) = outcomes
    return outcome


def table(first: str) -> dict[str, dict[str, str]]:
    """The cells of the README's table whose first column has this title."""
    lines = README.partition(f"\n| {first} |")[2].partition("\n\n")[0].splitlines()
    columns = [cell.strip() for cell in lines[0].split("|")][:-1]
    rows = [[cell.strip() for cell in line.split("|")][1:-1] for line in lines[2:]]
    return {row[0]: dict(zip(columns, row[1:], strict=True)) for row in rows}


OF_REQUESTS: Mapping[str, Mapping[str, dict[str, Any] | At | bytes]] = {
    "the user's turn": {
        column: json.dumps(one.request(MARK, False)).encode() for column, one in COLUMNS.items()
    },
    **REQUESTS,
    "packed body (gzip)": {
        column: gzip.compress(json.dumps(one.request(MARK, False)).encode())
        for column, one in COLUMNS.items()
    },
    "a key twice": {
        column: b'{"a":1,"a":2,' + json.dumps(one.request(MARK, False)).encode()[1:]
        for column, one in COLUMNS.items()
    },
}


@pytest.mark.parametrize("feature", OF_REQUESTS)
async def test_the_readme_tells_what_becomes_of_requests(feature: str) -> None:
    cells = OF_REQUESTS[feature]
    assert table("of requests")[feature] == {
        column: await of_request(column, cells.get(column)) for column in COLUMNS
    }


@pytest.mark.parametrize("feature", REPLIES)
async def test_the_readme_tells_what_becomes_of_replies(feature: str) -> None:
    cells = REPLIES[feature]
    assert table("of replies")[feature] == {
        column: await of_reply(column, cells.get(column)) for column in COLUMNS
    }


def test_the_readme_has_no_other_rows() -> None:
    assert [*table("of requests")] == [*OF_REQUESTS]
    assert [*table("of replies")] == [*REPLIES]
