"""No byte of any channel leaves before a verdict that allowed it, in any protocol, however cut.

Each property is tried on GUARD_TEST_EXAMPLES replies of each protocol (default 40).
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from guard_middleware import GuardMiddleware
from guard_middleware.metrics import Metrics
from guard_middleware.testing import FakeGuard, forbids
from tests.middleware.asgi_calls import Backend, Reply, call
from tests.middleware.formats.speech import Said, Speech
from tests.middleware.formats.speeches import SPEECHES

BAD = "§BÄD§"
REFUSAL = "No."
METRICS = Metrics(CollectorRegistry())
EXAMPLES = settings(max_examples=int(os.environ.get("GUARD_TEST_EXAMPLES", "40")), deadline=None)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="§"), max_size=60)

every_speech = pytest.mark.parametrize("speech", SPEECHES, ids=lambda one: one.format.name)


@st.composite
def scripts(draw: st.DrawFn, speech: Speech) -> list[tuple[Said, str]]:
    """Pieces of several channels of several choices, interleaved; one channel may hold BAD."""
    choices = st.integers(0, speech.most_choices - 1)
    saids = st.builds(Said, choices, st.sampled_from(list(speech.channels)))
    pieces: list[tuple[Said, str]] = []
    texts = {
        said: draw(TEXTS) * draw(st.integers(1, 4))
        for said in draw(st.sets(saids, min_size=1, max_size=4))
    }
    for said in texts:
        if draw(st.integers(0, 2)):
            at = draw(st.integers(0, len(texts[said])))
            texts[said] = texts[said][:at] + BAD + texts[said][at:]
    left = {said: text for said, text in texts.items() if text}
    while left:
        said = draw(st.sampled_from(sorted(left)))
        size = draw(st.integers(1, 40))
        pieces.append((said, left[said][:size]))
        left[said] = left[said][size:]
        left = {said: text for said, text in left.items() if text}
    return pieces


def recut(draw: st.DrawFn, chunks: list[bytes]) -> list[bytes]:
    """The same bytes, split at any places."""
    whole = b"".join(chunks)
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def exchange(
    speech: Speech, chunks: list[bytes], guard: FakeGuard, streamed: bool, **more: Any
) -> Reply:
    kind = speech.stream_type if streamed else "application/json"
    given: dict[str, Any] = {"refusal": REFUSAL, "first_check_chars": 8, **more}
    app = GuardMiddleware(Backend(chunks, kind), guard, metrics=METRICS, **given)
    path = speech.stream_path if streamed else speech.path
    request = speech.request("Hi", streamed, speech.most_choices)
    return asyncio.run(call(app, path, request))


@every_speech
@given(data=st.data())
@EXAMPLES
def test_streams_give_out_only_what_was_allowed(speech: Speech, data: st.DataObject) -> None:
    pieces = data.draw(scripts(speech))
    chunks = speech.events(pieces)
    if data.draw(st.booleans()):
        chunks = data.draw(st.composite(recut)(chunks))
    guard = FakeGuard(forbids(BAD), every_chars=data.draw(st.integers(1, 60)))
    back = data.draw(st.sampled_from((0, 4, 50)))
    got = exchange(speech, chunks, guard, streamed=True, hold_back_chars=back)
    check_stream(speech, pieces, guard, got)


def check_stream(
    speech: Speech, pieces: list[tuple[Said, str]], guard: FakeGuard, got: Reply
) -> None:
    """What a client got of a stream that says these pieces."""
    assert got.status == 200 and got.ended
    whole = joined(pieces)
    heard = speech.heard(got.body, streamed=True)
    bad = any(BAD in text for text in whole.values())
    assert speech.refused(got.body, streamed=True) == bad
    for said, text in heard.items():
        text = text.removesuffix(REFUSAL)
        assert BAD not in text
        assert whole.get(said, "").startswith(text)
        assert not text or any(allowed.startswith(text) for allowed in guard.allowed)
    if not bad:
        assert {said: text for said, text in heard.items() if text} == whole


@every_speech
@given(data=st.data())
@EXAMPLES
def test_whole_replies_are_given_out_whole_or_not_at_all(
    speech: Speech, data: st.DataObject
) -> None:
    whole = joined(data.draw(scripts(speech)))
    body = speech.whole(whole)
    guard = FakeGuard(forbids(BAD))
    check_whole(speech, whole, guard, exchange(speech, [body], guard, streamed=False))


def check_whole(speech: Speech, whole: dict[Said, str], guard: FakeGuard, got: Reply) -> None:
    """What a client got of a whole reply that says this."""
    assert got.status == 200 and got.ended
    if any(BAD in text for text in whole.values()):
        assert speech.refused(got.body, streamed=False)
        assert BAD not in "".join(speech.heard(got.body, streamed=False).values())
    else:
        assert got.body == speech.whole(whole)
        allowed = "\n".join(guard.allowed)
        # Arguments that are objects on the wire are judged as the JSON that they are.
        assert all(text in allowed or _in_json(text) in allowed for text in whole.values())


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def joined(pieces: list[tuple[Said, str]]) -> dict[Said, str]:
    whole: dict[Said, str] = {}
    for said, text in pieces:
        whole[said] = whole.get(said, "") + text
    return whole
