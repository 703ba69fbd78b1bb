"""The structure of a PNG file (W3C, PNG specification, third edition)."""

from __future__ import annotations

import zlib

from guard_service.images.reasons import Reason
from guard_service.images.structure import Cursor, Structure, check

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
EXPANDS_TO = 2**21  # as far as compressed metadata is followed; more than may be


def walk(data: bytes) -> Structure:
    """From the signature to IEND, behind which there must be nothing."""
    cursor, found = Cursor(data, len(SIGNATURE)), Structure()
    first, ended_pixels, name = True, False, b""
    animation = depth = 0
    while name != b"IEND":
        before, (length,) = name, cursor.unpack(">I")
        name = cursor.take(4)
        body = cursor.take(length)
        check(cursor.unpack(">I") == (zlib.crc32(body, zlib.crc32(name)),))
        check((name == b"IHDR") == first)
        if name == b"IHDR":
            check(length == 13)
            found.width, found.height, depth = Cursor(body).unpack(">IIB")
        elif name == b"IDAT":
            check(not ended_pixels)
            found.frames = 1
        elif name[:1].isupper():
            check(name in PIXELS, Reason.UNSUPPORTED)  # a chunk that decoders must understand
        elif name == b"fcTL":
            animation += 1
        elif name == b"tRNS":
            check(depth <= 8, Reason.UNSUPPORTED)  # a colour of 16 bits that is transparent
        elif name != b"fdAT":
            found.metadata += _expanded(name, body)
        ended_pixels |= before == b"IDAT" != name
        first = False
    check(not cursor.left, Reason.TRAILING_DATA)
    found.frames = max(found.frames, animation) if found.frames else 0
    return found


def _expanded(name: bytes, body: bytes) -> int:
    """Bytes of an ancillary chunk, with its text or profile decompressed."""
    start = {b"zTXt": 2, b"iCCP": 2, b"iTXt": 3}.get(name)
    head, zero, rest = body.partition(b"\0")
    if start is None or not zero:
        return len(body)
    if name == b"iTXt":  # flag, method, language, translated keyword, text
        if rest[:1] != b"\x01":
            return len(body)
        rest = rest[2:].split(b"\0", 2)[-1]
    else:
        rest = rest[1:]  # the method
    try:
        return len(body) + len(zlib.decompressobj().decompress(rest, EXPANDS_TO))
    except zlib.error:
        return len(body)
