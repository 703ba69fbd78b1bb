"""The structure of a GIF file (CompuServe, GIF89a specification)."""

from __future__ import annotations

from guard_service.images.reasons import Reason
from guard_service.images.structure import Cursor, Structure, check

SIGNATURE = b"GIF8"
IMAGE, EXTENSION, END = 0x2C, 0x21, 0x3B


def walk(data: bytes) -> Structure:
    """From the header to the trailer, behind which there must be nothing."""
    cursor = Cursor(data)
    check(cursor.take(6) in (b"GIF87a", b"GIF89a"))
    width, height, flags, _, _ = cursor.unpack("<HHBBB")
    found = Structure(width, height)
    _skip_palette(cursor, flags)
    while (kind := cursor.take(1)[0]) != END:
        if kind == EXTENSION:
            cursor.skip(1)
            found.metadata += _skip_blocks(cursor)
            continue
        check(kind == IMAGE)
        left, top, wide, high, flags = cursor.unpack("<HHHHB")
        check(left + wide <= width and top + high <= height)
        _skip_palette(cursor, flags)
        cursor.skip(1)  # size of the first codes
        _skip_blocks(cursor)
        found.frames += 1
    check(not cursor.left, Reason.TRAILING_DATA)
    return found


def _skip_palette(cursor: Cursor, flags: int) -> None:
    if flags & 0x80:
        cursor.skip(3 << (flags & 7) + 1)


def _skip_blocks(cursor: Cursor) -> int:
    """Pass over a chain of blocks; its bytes."""
    start = cursor.at
    while size := cursor.take(1)[0]:
        cursor.skip(size)
    return cursor.at - start
