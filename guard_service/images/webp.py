"""The structure of a WebP file (RFC 9649)."""

from __future__ import annotations

from guard_service.images.reasons import Reason
from guard_service.images.structure import Cursor, Structure, check

SIGNATURE = b"RIFF"
PIXELS = (b"VP8 ", b"VP8L", b"ALPH", b"ANIM")


def walk(data: bytes) -> Structure:
    """All chunks of the one RIFF form, behind which there must be nothing."""
    cursor = Cursor(data, len(SIGNATURE))
    (size,) = cursor.unpack("<I")
    check(cursor.take(4) == b"WEBP", Reason.UNKNOWN_FORMAT)
    check(size <= len(data) - 8, Reason.TRUNCATED)
    check(size == len(data) - 8, Reason.TRAILING_DATA)
    found, still, first = Structure(), 0, True
    while cursor.left:
        name, length = cursor.unpack("<4sI")
        body = cursor.take(length)
        cursor.skip(length & 1)  # padding
        if first:
            found.width, found.height = _size(name, body)
        elif name not in PIXELS and name != b"ANMF":
            found.metadata += length
        still += name in (b"VP8 ", b"VP8L")
        found.frames += name == b"ANMF"
        first = False
    check(still <= 1)
    found.frames = found.frames or still
    return found


def _size(name: bytes, body: bytes) -> tuple[int, int]:
    """Width and height from the first chunk."""
    cursor = Cursor(body)
    if name == b"VP8 ":
        frame, start, width, height = cursor.unpack("<3s3sHH")
        check(start == b"\x9d\x01\x2a" and not frame[0] & 1)  # a key frame
        return width & 0x3FFF, height & 0x3FFF
    if name == b"VP8L":
        signature, bits = cursor.unpack("<BI")
        check(signature == 0x2F)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    check(name == b"VP8X")
    _, width, height = cursor.unpack("<4s3s3s")
    return int.from_bytes(width, "little") + 1, int.from_bytes(height, "little") + 1
