"""A hundred files that no decoder should be given, by kind, each with the reason to refuse it.

All are made by code, the same ones each time.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

from guard_service.images.reasons import Reason
from tests.service.images.drawing import PLAIN, drawn, encoded, image

MOST_PIXELS = 2**22  # what the tests allow
MIB = 2**20


class Hostile(NamedTuple):
    """One file."""

    kind: str
    name: str
    data: bytes
    reason: Reason


def hostile() -> list[Hostile]:
    """All of them."""
    return [
        *_unknown(),
        *_truncated(),
        *_trailing(),
        *_too_many_pixels(),
        *_narrow(),
        *_zero_sized(),
        *_metadata(),
        *_frames(),
        *_broken_png(),
        *_broken_jpeg(),
        *_broken_others(),
        *_unsupported(),
    ]


def chunk(name: bytes, body: bytes = b"") -> bytes:
    """A chunk of PNG."""
    crc = zlib.crc32(name + body)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)


def png(*chunks: bytes, size: tuple[int, int] = (4, 4), depth: int = 8) -> bytes:
    """A PNG file of RGB: IHDR, then these chunks, then IEND."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND")


PIXELS = chunk(b"IDAT", zlib.compress(bytes(13 * 4)))


def segment(marker: int, body: bytes) -> bytes:
    """A segment of JPEG."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg_with(*segments: bytes) -> bytes:
    """A JPEG file with these segments behind its start."""
    whole = drawn(kind="JPEG")
    return whole[:2] + b"".join(segments) + whole[2:]


def jpeg_frame(marker: int, precision: int = 8) -> bytes:
    """A JPEG file whose frame is of another sort."""
    whole = drawn(kind="JPEG")
    at = whole.index(b"\xff\xc0")
    return (
        whole[:at]
        + bytes([0xFF, marker])
        + whole[at + 2 : at + 4]
        + bytes([precision])
        + (whole[at + 5 :])
    )


def gif(*blocks: bytes, size: tuple[int, int] = (4, 4)) -> bytes:
    """A GIF file of these blocks."""
    head = b"GIF89a" + struct.pack("<HHBBB", *size, 0x80, 0, 0) + bytes(6)
    return head + b"".join(blocks) + b";"


def gif_frame(left: int = 0, size: tuple[int, int] = (4, 4)) -> bytes:
    """An image block, all of one colour."""
    return b"," + struct.pack("<HHHHB", left, 0, *size, 0) + b"\x02\x02\x84\x51\x00"


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP file of these chunks."""
    body = b"".join(
        name + struct.pack("<I", len(data)) + data + bytes(len(data) & 1) for name, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webp_head(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    """The chunk VP8X."""
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"VP8X", bytes([flags, 0, 0, 0]) + sizes


def bmp(
    width: int, height: int, rows: bytes, depth: int = 24, compression: int = 0, planes: int = 1
) -> bytes:
    """A BMP file."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, planes, depth, compression, *(0,) * 5)
    return b"BM" + struct.pack("<IHHI", 54 + len(rows), 0, 0, 54) + head + rows


def _unknown() -> Iterator[Hostile]:
    others = {
        "text": b"hello, I am a picture",
        "tiff": encoded(image(), "TIFF"),
        "ico": encoded(image(), "ICO"),
        "ppm": encoded(image(), "PPM"),
        "pdf": b"%PDF-1.7\n1 0 obj <</Type /Catalog>> endobj\ntrailer <</Root 1 0 R>>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (w) file\n",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "html": b"<!doctype html><script>alert(1)</script>",
        "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "avif": b"\0\0\0\x18ftypavif\0\0\0\0mif1avif",
        "jpeg 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
        "jpeg xl": b"\xff\x0a" + bytes(20),
        "psd": b"8BPS\0\1" + bytes(20),
        "zip": b"PK\x03\x04" + bytes(26),
        "fli": struct.pack("<IH", 128, 0xAF11) + bytes(122),
        "noise": random.Random(5).randbytes(4096),
        "riff that is no webp": b"RIFF" + struct.pack("<I", 40) + b"WAVEfmt " + bytes(32),
    }
    yield Hostile("unknown format", "nothing", b"", Reason.EMPTY)
    for name, data in others.items():
        yield Hostile("unknown format", name, data, Reason.UNKNOWN_FORMAT)


def _truncated() -> Iterator[Hostile]:
    for kind in PLAIN:
        whole = drawn(kind=kind)
        for name, end in (
            ("a third", len(whole) // 3),
            ("half", len(whole) // 2),
            ("all but one", -1),
        ):
            yield Hostile("truncated", f"{kind}, {name}", whole[:end], Reason.TRUNCATED)


def _trailing() -> Iterator[Hostile]:
    tails = {"a zip": b"PK\x03\x04" + bytes(26), "a script": b"<script>alert(1)</script>"}
    for kind in PLAIN:
        for name, tail in tails.items():
            data = drawn(kind=kind) + tail
            yield Hostile("polyglot", f"{kind} and {name}", data, Reason.TRAILING_DATA)
    twice = drawn(kind="JPEG") * 2
    yield Hostile("polyglot", "a second JPEG, not announced", twice, Reason.TRAILING_DATA)
    yield Hostile("polyglot", "PNG and a zero", drawn() + b"\0", Reason.TRAILING_DATA)


def _too_many_pixels() -> Iterator[Hostile]:
    whole = drawn(kind="JPEG")
    at = whole.index(b"\xff\xc0") + 5
    square = 2_100  # 4.4 million pixels
    rows = zlib.compress(bytes((1 + 3 * square) * square), 9)
    files = {
        "PNG that says 2^31 - 1": png(PIXELS, size=(2**31 - 1, 2**31 - 1)),
        "PNG that expands a thousandfold": png(chunk(b"IDAT", rows), size=(square, square)),
        "JPEG that says 65,535": whole[:at] + b"\xff\xff\xff\xff" + whole[at + 4 :],
        "GIF that says 65,535": gif(gif_frame(), size=(65_535, 65_535)),
        "WebP that says 2^24": webp(webp_head(2**24, 2**24), (b"VP8L", bytes(8))),
        "WebP, lossless, that says 16,384": webp((b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(8))),
    }
    for name, data in files.items():
        yield Hostile("decompression bomb", name, data, Reason.TOO_MANY_PIXELS)


def _narrow() -> Iterator[Hostile]:
    for kind in PLAIN:
        data = encoded(image(size=(2, 3000)), kind)
        yield Hostile("narrow", f"{kind}, 2 x 3000", data, Reason.TOO_NARROW)
    yield Hostile("narrow", "PNG, 5000 x 1", encoded(image(size=(5000, 1))), Reason.TOO_NARROW)


def _zero_sized() -> Iterator[Hostile]:
    whole = drawn(kind="JPEG")
    at = whole.index(b"\xff\xc0") + 5
    files = {
        "PNG": png(PIXELS, size=(0, 4)),
        "JPEG whose height is told later": whole[:at] + b"\0\0" + whole[at + 2 :],
        "GIF": gif(gif_frame(size=(0, 0)), size=(0, 0)),
        "BMP": bmp(0, 4, b""),
    }
    for name, data in files.items():
        yield Hostile("zero-sized", name, data, Reason.MALFORMED)


def _metadata() -> Iterator[Hostile]:
    much, bomb = bytes(MIB + 1), zlib.compress(bytes(8 * MIB), 9)
    files = {
        "PNG with a text of 8 MiB, compressed": png(chunk(b"zTXt", b"a\0\0" + bomb), PIXELS),
        "PNG with a profile of 8 MiB": png(chunk(b"iCCP", b"a\0\0" + bomb), PIXELS),
        "PNG with a text in UTF-8, compressed": png(chunk(b"iTXt", b"a\0\1\0\0\0" + bomb), PIXELS),
        "PNG with a long text": png(chunk(b"tEXt", b"a\0" + much), PIXELS),
        "PNG with many small texts": png(*[chunk(b"tEXt", b"a\0" + bytes(99))] * 10_400, PIXELS),
        "JPEG with many comments": jpeg_with(*[segment(0xFE, bytes(65_000))] * 17),
        "JPEG with a profile in pieces": jpeg_with(
            *[segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(65_000))] * 17
        ),
        "WebP with much EXIF": webp(
            webp_head(4, 4, 8), (b"VP8L", b"\x2f\x03\xc0\0\0" + bytes(8)), (b"EXIF", much)
        ),
        "GIF with long comments": gif(
            b"!\xfe" + (b"\xff" + bytes(255)) * 4_200 + b"\0", gif_frame()
        ),
        "BMP with a gap before its rows": _bmp_with_gap(much),
    }
    for name, data in files.items():
        yield Hostile("metadata bomb", name, data, Reason.TOO_MUCH_METADATA)


def _bmp_with_gap(gap: bytes) -> bytes:
    whole = bmp(4, 4, gap + bytes(48))
    return whole[:10] + struct.pack("<I", 54 + len(gap)) + whole[14:]


def _frames() -> Iterator[Hostile]:
    control = chunk(b"fcTL", bytes(26))
    frame = b"ANMF", bytes(16)
    files = {
        "GIF": gif(*[gif_frame()] * 1_001),
        "APNG": png(chunk(b"acTL", bytes(8)), PIXELS, *[control] * 1_001),
        "WebP": webp(webp_head(4, 4, 2), (b"ANIM", bytes(6)), *[frame] * 1_001),
    }
    for name, data in files.items():
        yield Hostile("frames", name, data, Reason.TOO_MANY_FRAMES)


def _broken_png() -> Iterator[Hostile]:
    flipped = bytearray(png(PIXELS))
    flipped[-20] ^= 1
    cut = chunk(b"IDAT", zlib.compress(bytes(13 * 4))[:-6])
    files = {
        "a wrong checksum": bytes(flipped),
        "no header": b"\x89PNG\r\n\x1a\n" + PIXELS + chunk(b"IEND"),
        "two headers": png(chunk(b"IHDR", bytes(13)), PIXELS),
        "a header that is too long": png(PIXELS).replace(
            chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)), chunk(b"IHDR", bytes(14))
        ),
        "no pixels": png(),
        "pixels in two places": png(PIXELS, chunk(b"tEXt", b"a\0b"), PIXELS),
        "pixels that are not compressed": png(chunk(b"IDAT", b"not deflated")),
        "pixels that break off": png(cut),
        "an impossible depth": png(PIXELS, depth=3),
    }
    for name, data in files.items():
        yield Hostile("malformed", f"PNG, {name}", data, Reason.MALFORMED)


def _broken_jpeg() -> Iterator[Hostile]:
    whole = drawn(kind="JPEG")
    at, scan = whole.index(b"\xff\xc0"), whole.index(b"\xff\xda")
    length = struct.unpack(">H", whole[at + 2 : at + 4])[0]
    frame = whole[at : at + 2 + length]
    files = {
        "no frame": whole.replace(frame, b""),
        "two frames": whole.replace(frame, frame * 2),
        "no scan": whole[:scan] + b"\xff\xd9",
        "a segment that is too short": whole[:2] + b"\xff\xe0\0\1" + whole[2:],
        "bytes between segments": whole[:at] + b"\0" + whole[at:],
        "no quantization tables": whole.replace(b"\xff\xdb", b"\xff\xe9"),
    }
    for name, data in files.items():
        yield Hostile("malformed", f"JPEG, {name}", data, Reason.MALFORMED)
    many = whole[:-2] + whole[scan:-2] * 100 + b"\xff\xd9"
    yield Hostile("costly", "JPEG of 101 scans", many, Reason.TOO_COSTLY)


def _broken_others() -> Iterator[Hostile]:
    files = {
        "GIF, a frame outside of it": gif(gif_frame(left=3)),
        "GIF, no frame": gif(),
        "GIF, an unknown block": gif(b"?", gif_frame()),
        "WebP, two images": webp(*[(b"VP8L", b"\x2f\x03\xc0\0\0" + bytes(8))] * 2),
        "WebP, no key frame": webp((b"VP8 ", b"\x01\0\0\x9d\x01\x2a\x04\0\x04\0" + bytes(8))),
        "WebP, an image of another size": webp(
            webp_head(9, 9), (b"VP8L", b"\x2f\x03\xc0\0\0" + bytes(8))
        ),
        "BMP, no planes": bmp(4, 4, bytes(48), planes=0),
        "BMP, an image of negative width": bmp(-4, 4, bytes(48)),
    }
    for name, data in files.items():
        yield Hostile("malformed", name, data, Reason.MALFORMED)


def _unsupported() -> Iterator[Hostile]:
    clear = chunk(b"tRNS", bytes(6))
    files = {
        "PNG with a chunk that nobody knows": png(chunk(b"EVIL", b"x"), PIXELS),
        "PNG of 16 bits with a transparent colour": png(clear, PIXELS, depth=16),
        "JPEG of 12 bits": jpeg_frame(0xC1, precision=12),
        "JPEG without loss": jpeg_frame(0xC3),
        "JPEG with arithmetic codes": jpeg_frame(0xC9),
        "BMP, run lengths": bmp(4, 4, bytes(48), depth=8, compression=1),
        "BMP around a PNG": bmp(4, 4, png(PIXELS), compression=5),
    }
    for name, data in files.items():
        yield Hostile("unsupported", name, data, Reason.UNSUPPORTED)


def noise(seed: int) -> bytes:
    """A sound file of some format, with some bytes changed."""
    chance = random.Random(seed)
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    data = bytearray(encoded(picture, chance.choice(PLAIN)))
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)
