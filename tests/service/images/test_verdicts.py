"""Images on the road to a verdict, over real sockets, before a model that sees red."""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_service.engines.fake import FakeEngine
from guard_service.errors import NotAssessed, PolicyNotSupported
from guard_service.images import process
from guard_service.images.fetch import Fetcher
from tests.service.asking import BOMB, Running, asked, message, piece, refused, start
from tests.service.conftest import RunGuard
from tests.service.images.drawing import BLUE, PLAIN, RED, drawn, encoded, image
from tests.service.images.network import HOST, Network, http

BLOCK, ALLOW, FLAG = verdict_pb2.ACTION_BLOCK, verdict_pb2.ACTION_ALLOW, verdict_pb2.ACTION_FLAG
JUDGED = verdict_pb2.PART_STATE_JUDGED
NOT_JUDGED = verdict_pb2.PART_STATE_NOT_JUDGED
PARTLY_JUDGED = verdict_pb2.PART_STATE_PARTLY_JUDGED
BROKEN = drawn()[:-1]
MOVING = encoded(image(BLUE), "GIF", save_all=True, append_images=[image(RED)])
LENIENT = """
name: lenient
version: "1"
on_unscannable: allow
"""
FLAGGING = """
name: flagging
version: "1"
on_unscannable: flag
"""
PROMPTS_OFF = """
name: prompts-off
version: "1"
prompt: off
"""
FETCHING = f"""
name: fetching
version: "1"
image_uris: {{hosts: [{HOST}], ports: [80], schemes: [http]}}
"""
Seeing = Callable[..., Awaitable[Running]]


@pytest.fixture
def run_seeing(run_guard: RunGuard) -> Seeing:
    """Starts a guard that sees images."""

    async def run(*policies: str, **knobs: Any) -> Running:
        return await run_guard(FakeEngine(sees_images=True), policies=policies, **knobs)

    return run


def pictured(text: str, *files: bytes | str, role: str = "user") -> guard_pb2.Message:
    """A message with a text and images, by value or by address."""
    made = message(text, role)
    for file in files:
        given = guard_pb2.Image(uri=file) if isinstance(file, str) else guard_pb2.Image(data=file)
        made.parts.add(image=given)
    return made


def shown(*files: bytes | str, text: str = "look", **fields: Any) -> guard_pb2.ClassifyRequest:
    """A request with one such message."""
    return asked(pictured(text, *files), **fields)


async def verdict(guard: Running, request: guard_pb2.ClassifyRequest) -> verdict_pb2.Verdict:
    reply: guard_pb2.ClassifyResponse = await guard.stub.Classify(request)
    return reply.verdict


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.mark.parametrize("kind", PLAIN)
async def test_what_the_model_sees_decides_in_every_format(run_seeing: Seeing, kind: str) -> None:
    guard = await run_seeing()
    red = await verdict(guard, shown(drawn(RED, kind)))
    assert red.action == BLOCK
    assert [one.code for one in red.categories if one.fired] == ["S9"]
    assert (await verdict(guard, shown(drawn(BLUE, kind)))).action == ALLOW


async def test_coverage_names_each_image_and_the_windows_beside_it(run_seeing: Seeing) -> None:
    guard = await run_seeing()
    red, blue = drawn(RED), drawn(BLUE)
    found = await verdict(guard, shown(blue, red, blue))
    assert found.action == BLOCK  # the worst of them counts
    assert found.coverage.complete
    assert [one.state for one in found.coverage.parts] == [JUDGED] * 4
    assert [one.image_digest for one in found.coverage.parts] == [
        "",
        *map(digest, (blue, red, blue)),
    ]
    windows = [(one.image_digest, one.unsafe_score > 0.5) for one in found.coverage.windows]
    assert windows == [(digest(blue), False), (digest(red), True), (digest(blue), False)]
    assert found.timing.images.ToNanoseconds() > 0


async def test_the_text_beside_an_image_counts_too(run_seeing: Seeing) -> None:
    guard = await run_seeing()
    assert (await verdict(guard, shown(drawn(BLUE), text=BOMB))).action == BLOCK


async def test_an_image_of_an_earlier_turn_is_seen_with_every_later_one(run_seeing: Seeing) -> None:
    guard = await run_seeing()
    earlier = pictured("look", drawn(RED)), message("nice", "assistant"), message("and now?")
    assert (await verdict(guard, asked(*earlier))).action == BLOCK
    broken = pictured("look", BROKEN), message("nice", "assistant"), message("and now?")
    assert "IMAGE_TRUNCATED" in (await refused(guard.stub.Classify(asked(*broken)))).message


async def test_each_view_of_an_image_is_judged(run_seeing: Seeing) -> None:
    guard = await run_seeing()
    hidden = drawn((*RED, 0))  # white or black to those who know of transparency
    found = await verdict(guard, shown(hidden))
    assert found.action == BLOCK
    scores = [one.unsafe_score > 0.5 for one in found.coverage.windows]
    assert scores == [False, False, True]
    assert {one.image_digest for one in found.coverage.windows} == {digest(hidden)}


async def test_what_cannot_be_read_is_no_verdict_unless_the_policy_says_so(
    run_seeing: Seeing,
) -> None:
    guard = await run_seeing(FLAGGING, LENIENT)
    refusal = await refused(guard.stub.Classify(shown(BROKEN)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "UNSCANNABLE")
    assert refusal.message == "cannot judge images: IMAGE_TRUNCATED"
    for policy, action in ("flagging", FLAG), ("lenient", ALLOW):
        found = await verdict(guard, shown(BROKEN, policy=policy))
        assert found.action == action and not found.coverage.complete
        state, reason = found.coverage.parts[1].state, found.coverage.parts[1].reason
        assert (state, reason) == (NOT_JUDGED, "IMAGE_TRUNCATED")
        both = await verdict(guard, shown(BROKEN, drawn(RED), policy=policy))
        assert both.action == BLOCK  # what can be read is judged all the same


async def test_of_an_animation_the_first_frame_is_judged_and_the_rest_is_not(
    run_seeing: Seeing,
) -> None:
    guard = await run_seeing(FLAGGING)
    assert "IMAGE_FIRST_FRAME_ONLY" in (await refused(guard.stub.Classify(shown(MOVING)))).message
    found = await verdict(guard, shown(MOVING, policy="flagging"))
    part = found.coverage.parts[1]
    assert (part.state, part.reason) == (PARTLY_JUDGED, "IMAGE_FIRST_FRAME_ONLY")
    assert part.image_digest == digest(MOVING)
    assert found.action == FLAG and not found.coverage.complete
    red_first = encoded(image(RED), "GIF", save_all=True, append_images=[image(BLUE)])
    assert (await verdict(guard, shown(red_first, policy="flagging"))).action == BLOCK


async def test_another_image_is_another_question_and_the_same_one_is_not(
    run_seeing: Seeing,
) -> None:
    guard = await run_seeing()
    first, again, other = [
        await verdict(guard, shown(drawn(colour))) for colour in (BLUE, BLUE, RED)
    ]
    assert (first.from_cache, again.from_cache, other.from_cache) == (False, True, False)
    assert (first.action, again.action, other.action) == (ALLOW, ALLOW, BLOCK)
    assert len(guard.engine.pictures) == 2


async def test_a_policy_that_judges_nothing_has_nothing_decoded(run_seeing: Seeing) -> None:
    guard = await run_seeing(PROMPTS_OFF)
    found = await verdict(guard, shown(drawn(RED), policy="prompts-off"))
    assert found.action == ALLOW
    assert {one.reason for one in found.coverage.parts} == {"POLICY_IS_OFF"}
    assert not guard.engine.pictures


async def test_images_are_bounded_in_number_and_size(run_seeing: Seeing) -> None:
    guard = await run_seeing(max_images=2, max_image_bytes=len(drawn()))
    assert (await verdict(guard, shown(drawn(), drawn()))).action == ALLOW
    refusal = await refused(guard.stub.Classify(shown(drawn(), drawn(), drawn())))
    assert refusal.message == "the conversation has 3 images, over the limit of 2"
    large = encoded(image(size=(400, 300)))
    assert "IMAGE_TOO_LARGE" in (await refused(guard.stub.Classify(shown(large)))).message


async def test_images_times_windows_are_bounded(run_seeing: Seeing) -> None:
    guard = await run_seeing(max_queue_items=8)
    long = "word " * 400  # of one byte each: five windows
    assert (await verdict(guard, shown(drawn(), text=long))).action == ALLOW
    refusal = await refused(guard.stub.Classify(shown(drawn(), drawn(RED), text=long)))
    assert refusal.reason == "CONVERSATION_TOO_LONG"
    assert "10 runs of the model, over the limit of 8" in refusal.message


async def test_a_guard_that_cannot_decode_does_not_start(
    run_seeing: Seeing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CODE", "{}{}{}; raise SystemExit")
    with pytest.raises(NotAssessed, match="does not come up"):
        await run_seeing()


async def test_fetching_needs_its_packages(
    run_seeing: Seeing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "guard_service.images.fetch", None)
    with pytest.raises(PolicyNotSupported, match=r"policy fetching .*\[fetch\]"):
        await run_seeing(FETCHING)
    await run_seeing(FLAGGING)


async def test_a_growing_reply_to_an_image_decodes_it_once(run_seeing: Seeing) -> None:
    guard = await run_seeing()
    begin = start("x")
    begin.start.conversation.messages[0].CopyFrom(pictured("look", drawn(BLUE)))

    async def steps() -> Any:
        yield begin
        for text in ("one ", "two ", "three"):
            yield piece(text, check=True)
        yield piece("", end=True)

    found = [reply.verdict async for reply in guard.stub.ClassifyStream(steps())]
    assert [one.action for one in found] == [ALLOW] * len(found)
    assert found[-1].coverage.parts[1].image_digest == digest(drawn(BLUE))
    assert len({id(one) for one in guard.engine.pictures}) == 1 < len(guard.engine.pictures)


async def test_results_are_counted(run_seeing: Seeing) -> None:
    guard = await run_seeing(FLAGGING)
    await verdict(guard, shown(drawn(), BROKEN, MOVING, policy="flagging"))
    registry = guard.server._metrics.registry
    for result in ("JUDGED", "IMAGE_TRUNCATED", "IMAGE_FIRST_FRAME_ONLY"):
        assert registry.get_sample_value("guard_images_total", {"result": result}) == 1


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    """Every fetcher resolves by it."""
    made = Network(monkeypatch)
    monkeypatch.setattr(Fetcher, "_by_system", lambda self, host, port: made.resolve(host, port))
    yield made


def inline(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


async def test_an_address_that_holds_the_image_is_read(run_seeing: Seeing) -> None:
    guard = await run_seeing()
    assert (await verdict(guard, shown(inline(drawn(RED))))).action == BLOCK
    assert (await verdict(guard, shown(inline(drawn(BLUE))))).action == ALLOW
    for uri in ("data:,red", "data:image/png;base64,@@@@", inline(drawn(RED)) + "\n"):
        assert "IMAGE_URI_MALFORMED" in (await refused(guard.stub.Classify(shown(uri)))).message
    refusal = await refused(guard.stub.Classify(shown("data:image/png;base64,")))
    assert "IMAGE_EMPTY" in refusal.message


async def test_nothing_is_fetched_unless_the_policy_says_so(
    run_seeing: Seeing, network: Network
) -> None:
    guard = await run_seeing(FETCHING)
    refusal = await refused(guard.stub.Classify(shown(f"http://{HOST}/a.png")))
    assert refusal.message == "cannot judge images: IMAGE_URI_NOT_ALLOWED"
    other = await refused(guard.stub.Classify(shown("http://b.example/", policy="fetching")))
    assert other.message == "cannot judge images: IMAGE_URI_HOST"
    assert not network.asked and not network.connected


async def test_what_was_fetched_is_judged_and_returned(
    run_seeing: Seeing, network: Network
) -> None:
    guard = await run_seeing(FETCHING)
    request = shown(drawn(BLUE), f"http://{HOST}/a.png", policy="fetching", return_images=True)
    async with network.serving(http(drawn(RED))):
        reply = await guard.stub.Classify(request)
    assert reply.verdict.action == BLOCK
    assert reply.verdict.coverage.parts[2].image_digest == digest(drawn(RED))
    (fetched,) = reply.images
    assert (fetched.message_index, fetched.part_index) == (0, 2)
    assert (fetched.data, fetched.mime_type) == (drawn(RED), "image/png")
    request.return_images = False
    async with network.serving(http(drawn(BLUE))):  # a server may send something else next time
        again = await guard.stub.Classify(request)
    assert again.verdict.action == ALLOW and not again.images


async def test_a_growing_reply_to_an_address_fetches_it_once(
    run_seeing: Seeing, network: Network
) -> None:
    guard = await run_seeing(FETCHING)
    begin = start("x", policy="fetching")
    begin.start.conversation.messages[0].CopyFrom(pictured("look", f"http://{HOST}/a.png"))

    async def steps() -> Any:
        yield begin
        yield piece("one ", check=True)
        yield piece("two", end=True)

    async with network.serving(http(drawn(BLUE))):
        found = [reply.verdict async for reply in guard.stub.ClassifyStream(steps())]
    assert found[-1].action == ALLOW
    assert len(network.requests) == 1


async def test_a_text_only_model_decodes_and_fetches_nothing(
    run_guard: RunGuard, network: Network
) -> None:
    guard = await run_guard(policies=(FETCHING, FLAGGING))
    request = shown(f"http://{HOST}/a.png", policy="fetching")
    assert "text-only" in (await refused(guard.stub.Classify(request))).message
    found = await verdict(guard, shown(drawn(), BROKEN, policy="flagging"))
    assert {one.reason for one in found.coverage.parts} == {"", "MODEL_IS_TEXT_ONLY"}
    assert not network.asked


async def test_a_photograph_s_size_comes_through_and_bounds_are_told(run_guard: RunGuard) -> None:
    guard = await run_guard(FakeEngine(sees_images=True))
    limits = (await guard.stub.GetInfo(guard_pb2.GetInfoRequest())).limits
    assert (limits.max_images, limits.max_image_pixels) == (16, 16 * 2**20)
    assert limits.max_message_bytes > limits.max_image_bytes == 8 * 2**20
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    photograph = encoded(Image.fromarray(noise))
    assert 6 * 2**20 < len(photograph) < limits.max_image_bytes
    asking = message("hello")
    asking.parts.add(image=guard_pb2.Image(data=photograph))
    verdict = (await guard.stub.Classify(asked(asking))).verdict
    assert [part.state for part in verdict.coverage.parts] == [JUDGED, JUDGED]
