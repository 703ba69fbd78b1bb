"""A hundred hostile files through the whole service: each refused for its reason, cheaply."""

from __future__ import annotations

import resource
from collections import Counter

import pytest

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_service.engines.fake import FakeEngine
from guard_service.images.decoder import Decoder, DecoderBounds
from guard_service.images.reasons import Reason, Refused
from tests.service.asking import asked
from tests.service.conftest import RunGuard
from tests.service.images.drawing import drawn
from tests.service.images.hostile import MIB, MOST_PIXELS, Hostile, hostile, noise

FLAGGING = 'name: flagging\nversion: "1"\non_unscannable: flag\n'
KINDS = {
    "unknown format": 18,
    "truncated": 15,
    "polyglot": 12,
    "decompression bomb": 6,
    "narrow": 6,
    "zero-sized": 4,
    "metadata bomb": 10,
    "frames": 3,
    "malformed": 23,
    "costly": 1,
    "unsupported": 7,
}


@pytest.fixture(scope="module")
def files() -> list[Hostile]:
    return hostile()


def request(data: bytes) -> guard_pb2.ClassifyRequest:
    sent = asked("look", policy="flagging")
    sent.conversation.messages[0].parts.add(image=guard_pb2.Image(data=data))
    return sent


def peak_bytes() -> int:
    """The most memory that this process has ever taken."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_there_are_a_hundred_of_many_kinds(files: list[Hostile]) -> None:
    assert Counter(file.kind for file in files) == KINDS
    assert len({file.data for file in files}) == len(files) >= 100


async def test_each_is_refused_for_its_reason_and_the_text_is_judged(
    run_guard: RunGuard, files: list[Hostile]
) -> None:
    engine = FakeEngine(sees_images=True)
    guard = await run_guard(
        engine,
        policies=(FLAGGING,),
        max_image_pixels=MOST_PIXELS,
        max_message_bytes=64 * MIB,
    )
    before = peak_bytes()
    batch = guard_pb2.ClassifyBatchRequest(requests=[request(file.data) for file in files])
    reply = await guard.stub.ClassifyBatch(batch)
    found = {}
    for file, result in zip(files, reply.results, strict=True):
        assert result.WhichOneof("outcome") == "verdict", (file.name, result)
        assert result.verdict.action == verdict_pb2.ACTION_FLAG, file.name
        text, image = result.verdict.coverage.parts
        assert text.state == verdict_pb2.PART_STATE_JUDGED
        assert image.state == verdict_pb2.PART_STATE_NOT_JUDGED and not image.image_digest
        found[file.kind, file.name] = image.reason
    assert found == {(file.kind, file.name): file.reason.value for file in files}
    assert not engine.pictures
    # What was sent, 8 MiB, is there several times over; of the bombs one alone would be more.
    assert peak_bytes() - before < 128 * MIB


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(DecoderBounds(2, MOST_PIXELS, 10.0, 64 * MIB))


async def test_what_chance_breaks_is_a_picture_or_a_reason(decoder: Decoder) -> None:
    try:
        for seed in range(40):
            try:
                await decoder.decode(noise(seed))
            except Refused as refused:
                assert refused.reason not in (Reason.DECODER_DIED, Reason.TOO_COSTLY)
        assert (await decoder.decode(drawn())).frames == 1
    finally:
        decoder.close()
