"""A guard that has learnt what is drawn, asked over gRPC: formats, views, several images, swaps."""

from __future__ import annotations

import asyncio
import hashlib
from random import Random
from typing import Any

import pytest
from PIL import ExifTags, Image

from guard_api.v1 import guard_pb2, verdict_pb2
from guard_service.images.decoder import Decoder
from tests.service.asking import asked, message
from tests.service.images.drawing import PLAIN, encoded
from tests.vision_guard.drawings import (
    BLANK,
    CIRCLE,
    GIN,
    KINDS,
    MAKING,
    REPLIES,
    SQUARE,
    TRIANGLE,
    TURNED,
    WORD,
    code_of,
    rows,
)
from tests.vision_guard.examples import LOOK, MAKE, Examples, code_in, shown

pytestmark = pytest.mark.slow
Stub = Any  # of grpc.aio
JUDGED = verdict_pb2.PART_STATE_JUDGED
HELD_OUT, UNSEEN_SEED, LEAST_RIGHT = 200, 4242, 0.97
CLEAR, WHITE, BLACK = (0, 0, 0, 0), (255, 255, 255, 255), (0, 0, 0, 255)


async def asked_of(stub: Stub, request: guard_pb2.ClassifyRequest) -> str:
    reply: guard_pb2.ClassifyResponse = await stub.Classify(request)
    return code_in(reply.verdict)


async def asked_together(stub: Stub, *requests: guard_pb2.ClassifyRequest) -> list[str]:
    """In one ClassifyBatch."""
    reply: guard_pb2.ClassifyBatchResponse = await stub.ClassifyBatch(
        guard_pb2.ClassifyBatchRequest(requests=requests)
    )
    return [code_in(result.verdict) for result in reply.results]


async def test_drawings_and_texts_that_it_never_saw_are_judged_right(stub: Stub) -> None:
    unseen = list(rows(HELD_OUT, UNSEEN_SEED))
    requests = []
    for row in unseen:
        turns = [message(text, role) for role, text in row.turns]
        if row.picture is not None:
            turns[0].parts.add(image=guard_pb2.Image(data=encoded(row.picture)))
        requests.append(asked(*turns))
    found = await asked_together(stub, *requests)
    wrong = [(row.kind, row.code, code) for row, code in zip(unseen, found, strict=True)
             if row.code != code]  # fmt: skip
    assert len(wrong) <= (1 - LEAST_RIGHT) * HELD_OUT, wrong
    assert {row.code for row in unseen} == {"", "S1", "S2", "S9", "S10"}


@pytest.mark.parametrize("kind", PLAIN)
async def test_every_format_shows_the_same(stub: Stub, examples: Examples, kind: str) -> None:
    how: dict[str, Any] = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    for drawn in KINDS:
        for picture in examples.of(drawn, 2):
            file = encoded(picture, kind, **how)
            assert await asked_of(stub, shown(file)) == code_of(drawn, making=False), drawn


async def test_text_and_image_are_judged_together(stub: Stub, examples: Examples) -> None:
    (circle,), (triangle,) = examples.of(CIRCLE, 1), examples.of(TRIANGLE, 1)
    for picture, said, code in (
        (circle, LOOK, ""),
        (circle, MAKE, ""),
        (triangle, LOOK, ""),
        (triangle, MAKE, "S9"),
        (circle, "Tell me gin what you see.", "S2"),
    ):
        assert await asked_of(stub, shown(picture, said=said)) == code
    for said, code in ((LOOK, ""), (MAKE, ""), ("Is this gin nice?", "S2")):
        assert await asked_of(stub, asked(said)) == code


def lying(picture: Image.Image) -> bytes:
    """The file of a picture that is stored lying on its side, as EXIF says."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise by 90 degrees
    return encoded(picture.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


async def test_a_word_is_read_as_exif_turns_it(stub: Stub, examples: Examples) -> None:
    for gin, word in zip(examples.of(GIN, 3), examples.of(WORD, 3), strict=True):
        assert await asked_of(stub, shown(lying(gin))) == "S10"
        assert await asked_of(stub, shown(lying(word))) == ""
    for picture in examples.of(TURNED, 6):  # GIN too: only EXIF makes it a word
        assert await asked_of(stub, shown(picture)) == ""


async def test_what_is_transparent_is_seen_on_each_ground_and_without(
    stub: Stub, examples: Examples
) -> None:
    """Ink of the ground's own colour shows on the other ground only."""
    for kind, code in ((SQUARE, "S1"), (CIRCLE, ""), (GIN, "S10")):
        for ink in (WHITE, BLACK):
            picture = inked(examples.of(kind, 1, ground=CLEAR)[0], ink)
            assert await asked_of(stub, shown(encoded(picture))) == code
        (hidden,) = examples.of(kind, 1)
        hidden = hidden.convert("RGBA")
        hidden.putalpha(0)  # its colours are still there
        assert await asked_of(stub, shown(encoded(hidden))) == code


def inked(picture: Image.Image, ink: tuple[int, ...]) -> Image.Image:
    """The drawing in one colour, as transparent around it as it was."""
    made = Image.new("RGBA", picture.size, ink)
    made.putalpha(picture.getchannel("A"))
    return made


async def test_of_several_images_the_worst_counts_and_coverage_tells_of_each(
    stub: Stub, examples: Examples
) -> None:
    files = [encoded(examples.of(kind, 1)[0]) for kind in (CIRCLE, SQUARE, WORD, BLANK)]
    request = shown(*files, said=LOOK)
    verdict = (await stub.Classify(request)).verdict
    digests = [f"sha256:{hashlib.sha256(file).hexdigest()}" for file in files]
    assert code_in(verdict) == "S1"
    assert verdict.coverage.complete
    assert [part.state for part in verdict.coverage.parts] == [JUDGED] * 5
    assert [part.image_digest for part in verdict.coverage.parts] == ["", *digests]
    windows = [(one.image_digest, one.unsafe_score > 0.5) for one in verdict.coverage.windows]
    assert windows == [(digest, at == 1) for at, digest in enumerate(digests)]
    assert await asked_of(stub, shown(files[0], *files[2:])) == ""


async def test_an_image_of_an_earlier_turn_is_seen_beside_the_newest(
    stub: Stub, examples: Examples
) -> None:
    for kind in KINDS:
        (picture,) = examples.of(kind, 1)
        (first,) = shown(picture).conversation.messages
        for newest in (LOOK, MAKE):
            request = asked(first, message(REPLIES[0], "assistant"), message(newest))
            assert await asked_of(stub, request) == code_of(kind, newest in MAKING)


async def test_swapped_images_swap_the_verdicts(stub: Stub, examples: Examples) -> None:
    """One text, two images, in every company and order: only the image can tell."""
    for square, circle in zip(examples.of(SQUARE, 4), examples.of(CIRCLE, 4), strict=True):
        for no_cache in (True, False):
            one, other = shown(square, no_cache=no_cache), shown(circle, no_cache=no_cache)
            assert await asked_together(stub, one, other) == ["S1", ""]
            assert await asked_together(stub, other, one) == ["", "S1"]
            side_by_side = asyncio.gather(*(asked_of(stub, each) for each in (other, one)))
            assert await side_by_side == ["", "S1"]


async def test_many_at_once_each_get_the_verdict_of_their_own_image(
    stub: Stub, examples: Examples
) -> None:
    cases = [
        (picture, said, code_of(kind, said in MAKING))
        for kind in KINDS
        for picture in examples.of(kind, 6, seed=300)
        for said in (LOOK, MAKE)
    ]
    Random(1).shuffle(cases)
    requests = [shown(picture, said=said, no_cache=True) for picture, said, _ in cases]
    found = await asyncio.gather(*(asked_of(stub, request) for request in requests))
    assert found == [code for _, _, code in cases]


async def test_images_mixed_up_on_the_way_are_noticed(
    stub: Stub, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What these tests are for: a decoder that answers with another request's image fails them."""
    (square,), (circle,) = examples.of(SQUARE, 1, seed=500), examples.of(CIRCLE, 1, seed=500)
    decode, first = Decoder.decode, encoded(circle)

    async def mixed_up(self: Decoder, data: bytes) -> Any:
        return await decode(self, first)

    monkeypatch.setattr(Decoder, "decode", mixed_up)
    assert await asked_together(stub, shown(square), shown(circle)) == ["", ""]
