"""What a model is shown of images of every kind."""

from __future__ import annotations

import zlib

import pytest
from PIL import Image

from guard_service.images.probe import probe
from guard_service.images.reasons import Reason, Refused
from guard_service.images.views import View, views
from tests.service.images.drawing import BLUE, RED, drawn, encoded, image
from tests.service.images.hostile import chunk, png

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def seen(data: bytes) -> list[View]:
    return views(data, probe(data, 2**20))


def corners(data: bytes) -> list[tuple[int, ...]]:
    """The first pixel of each view."""
    return [tuple(rows[:3]) for _, _, rows in seen(data)]


def upright(orientation: int, kind: str = "PNG") -> bytes:
    """Left half red, right half blue, to be turned as EXIF says."""
    picture = image(BLUE)
    picture.paste(RED, (0, 0, 20, 30))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture, kind, exif=exif)


def grey16(*values: int) -> bytes:
    """A row of grey pixels of 16 bits."""
    row = b"".join(value.to_bytes(2, "little") for value in values)
    return encoded(Image.frombytes("I;16", (len(values), 1), row))


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (drawn(RED), RED),
        (encoded(image(RED).quantize(4)), RED),
        (encoded(image(RED).convert("1", dither=Image.Dither.NONE)), BLACK),
        (encoded(image((200, 200, 200)).convert("L")), (200, 200, 200)),
        (encoded(image(RED), "BMP"), RED),
        (encoded(image(RED).quantize(4), "BMP"), RED),
        (encoded(image(RED), "WEBP", lossless=True), RED),
        (encoded(image((*RED, 255))), RED),  # transparent in name only
    ],
    ids=["RGB", "palette", "one bit", "grey", "BMP", "BMP with palette", "WebP", "opaque"],
)
def test_there_is_one_view_of_what_looks_the_same_to_all(
    data: bytes, colour: tuple[int, int, int]
) -> None:
    assert corners(data) == [colour]


@pytest.mark.parametrize("how", [{"progressive": True}, {"subsampling": 0}, {"quality": 10}])
def test_jpeg_is_read_in_its_variants(how: dict[str, int]) -> None:
    ((width, height, rows),) = seen(drawn(RED, "JPEG", **how))
    assert (width, height, len(rows)) == (40, 30, 3600)
    assert rows[0] > 240 and max(rows[1:3]) < 16


def test_cmyk_becomes_rgb() -> None:
    ((red, green, blue),) = corners(encoded(image(RED).convert("CMYK"), "JPEG"))
    assert red > 240 and max(green, blue) < 16


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    ((_, _, rows),) = seen(grey16(0, 0x0100, 0x7FFF, 0x8000, 0xFFFF))
    assert [*rows[::3]] == [0, 1, 127, 128, 255]


def test_sixteen_bits_of_colour_are_scaled() -> None:
    row = b"\0" + b"\x80\x01\x00\xff\x12\x34" * 4
    data = png(chunk(b"IDAT", zlib.compress(row * 4)), depth=16)
    assert corners(data) == [(0x80, 0x00, 0x12)]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_transparent_image_is_seen_on_white_on_black_and_without_transparency(kind: str) -> None:
    how = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(image((200, 0, 0, 51)), kind, **how)  # a fifth
    assert corners(data) == [(244, 204, 204), (40, 0, 0), (200, 0, 0)]


def test_what_hides_below_full_transparency_is_seen() -> None:
    data = encoded(image((*RED, 0)))
    assert corners(data) == [WHITE, BLACK, RED]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_counts(kind: str) -> None:
    picture = image(RED).quantize(2)
    data = encoded(picture, kind, transparency=picture.getpixel((0, 0)))
    assert corners(data) == [WHITE, BLACK, RED]


@pytest.mark.parametrize(
    ("orientation", "first"),
    [(2, BLUE), (3, BLUE), (4, RED), (5, RED), (6, RED), (7, BLUE), (8, BLUE)],
)
def test_a_turned_image_is_seen_upright_and_as_it_is_stored(
    orientation: int, first: tuple[int, int, int]
) -> None:
    found = seen(upright(orientation))
    assert tuple(found[0][2][:3]) == first
    assert found[0][:2] == ((30, 40) if orientation > 4 else (40, 30))
    stored = encoded(Image.frombytes("RGB", (40, 30), found[-1][2]))
    assert found[-1][:2] == (40, 30) and corners(stored) == [RED]


def test_an_image_that_looks_the_same_turned_has_one_view() -> None:
    assert len(seen(upright(1))) == 1
    assert len(seen(upright(4))) == 1  # upside down, and the halves are left and right


def test_interlaced_png_is_read() -> None:
    # Seven passes of a 1 x 1 image are one row of it.
    head = chunk(b"IHDR", b"\0\0\0\1\0\0\0\1\x08\2\0\0\1")
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + bytes(RED)))
    assert corners(b"\x89PNG\r\n\x1a\n" + head + pixels + chunk(b"IEND")) == [RED]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "MPO"])
def test_of_several_frames_the_first_is_seen(kind: str) -> None:
    how = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(image(RED), kind, save_all=True, append_images=[image(BLUE)], **how)
    assert probe(data, 2**20).frames == 2
    ((red, green, blue),) = corners(data)
    assert red > 240 and max(green, blue) < 16


def test_a_profile_changes_nothing() -> None:
    data = encoded(image(RED), icc_profile=bytes(200))
    assert b"iCCP" in data and corners(data) == [RED]


def test_broken_exif_is_no_picture() -> None:
    data = encoded(image(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12\0\3")
    with pytest.raises(Refused) as refused:
        seen(data)
    assert refused.value.reason is Reason.MALFORMED
