"""Through a real Envoy, in each of its modes: no byte leaves before a verdict that allowed it, and
with a guard that allows everything nothing is changed.

The leak properties are tried on a quarter of GUARD_TEST_EXAMPLES replies of each protocol and mode.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guard_middleware.loop_thread import LOOP
from guard_middleware.testing import FakeGuard, forbids
from tests.middleware.asgi_calls import JSON, Backend
from tests.middleware.ext_proc.real_envoy import MODES, Setup, Stage, modes, needs_envoy, stage
from tests.middleware.formats.speech import Speech
from tests.middleware.formats.speeches import SPEECHES
from tests.middleware.test_fidelity import OWN, said_of, same, whole_of
from tests.middleware.test_no_leaks import (
    BAD,
    REFUSAL,
    check_stream,
    check_whole,
    joined,
    recut,
    scripts,
)

pytestmark = needs_envoy
MOST = max(1, int(os.environ.get("GUARD_TEST_EXAMPLES", "40")) // 4)
EXAMPLES = settings(
    max_examples=MOST,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NOBODY = Backend([])

every_speech = pytest.mark.parametrize("speech", SPEECHES, ids=lambda one: type(one).__name__)


@pytest.fixture(scope="module", params=MODES)
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    """A stage in each mode, in a loop of its own, for all tests of this file."""
    stack, folder = AsyncExitStack(), tmp_path_factory.mktemp("envoy")
    opened = stage(
        Setup(modes(request.param)), folder, NOBODY, refusal=REFUSAL, first_check_chars=8
    )
    yield LOOP.wait(stack.enter_async_context(opened))
    LOOP.wait(stack.aclose())


@every_speech
@given(data=st.data())
@EXAMPLES
def test_streams_give_out_only_what_was_allowed(
    running: Stage, speech: Speech, data: st.DataObject
) -> None:
    pieces = data.draw(scripts(speech))
    chunks = speech.events(pieces)
    if data.draw(st.booleans()):
        chunks = data.draw(st.composite(recut)(chunks))
    guard = FakeGuard(forbids(BAD), every_chars=data.draw(st.integers(1, 60)))
    running.backend, running.guard = Backend(chunks, speech.stream_type), guard
    request = speech.request("Hi", True, speech.most_choices)
    check_stream(speech, pieces, guard, LOOP.wait(running.ask(speech.stream_path, request)))


@every_speech
@given(data=st.data())
@EXAMPLES
def test_whole_replies_are_given_out_whole_or_not_at_all(
    running: Stage, speech: Speech, data: st.DataObject
) -> None:
    whole = joined(data.draw(scripts(speech)))
    guard = FakeGuard(forbids(BAD))
    running.backend, running.guard = Backend([speech.whole(whole)]), guard
    request = speech.request("Hi", False, speech.most_choices)
    check_whole(speech, whole, guard, LOOP.wait(running.ask(speech.path, request)))


@every_speech
@given(data=st.data())
@EXAMPLES
def test_prompts_reach_the_backend_only_when_they_were_allowed(
    running: Stage, speech: Speech, data: st.DataObject
) -> None:
    text = data.draw(st.text(st.characters(codec="utf-8", exclude_characters="§"), min_size=1))
    said = "x" + (text + BAD if data.draw(st.booleans()) else text)
    streamed = data.draw(st.booleans())
    backend = Backend([whole_of(speech)])
    running.backend, running.guard = backend, FakeGuard(forbids(BAD))
    path = speech.stream_path if streamed else speech.path
    request = speech.request(said, streamed, speech.most_choices)
    got = LOOP.wait(running.ask(path, request))
    if BAD in said:
        assert speech.refused(got.body, streamed) and not any(backend.bodies)
    else:
        assert backend.asked == request


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@every_speech
def test_allowed_replies_come_as_they_were_sent(
    running: Stage, speech: Speech, streamed: bool
) -> None:
    chunks = speech.events(said_of(speech)) if streamed else [whole_of(speech)]
    kind = speech.stream_type if streamed else JSON
    backend = Backend(chunks, kind, headers=OWN)
    running.backend, running.guard = backend, FakeGuard()
    request = speech.request("Hi", streamed, speech.most_choices)
    got = LOOP.wait(running.ask(speech.stream_path if streamed else speech.path, request))
    assert got.status == 200 and same(speech, got.body, b"".join(chunks))
    assert got.headers["content-type"] == kind and got.headers["x-own"] == "1"
    assert got.headers["set-cookie"] == "a=1, b=2" and got.headers["vary"] == "origin"
    assert got.headers["x-guard-verdict-id"]
    assert backend.asked == json.loads(json.dumps(request))
