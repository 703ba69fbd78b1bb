"""The structure of a JPEG file (ITU-T T.81, annex B), and of several one behind the other (MPO)."""

from __future__ import annotations

import re

from guard_service.images.reasons import Reason
from guard_service.images.structure import Cursor, Structure, check

SIGNATURE = b"\xff\xd8\xff"
START, END, SCAN, APP2 = 0xD8, 0xD9, 0xDA, 0xE2
FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, by Huffman codes
OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
TABLES = (0xC4, 0xDB, 0xDD)  # Huffman, quantization, restart interval
METADATA = (*range(0xE0, 0xF0), 0xFE)
MAX_SCANS = 100  # each costs a pass over the whole image; progressive encoders write some ten
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in entropy-coded data: what ends it


def walk(data: bytes) -> Structure:
    """From the first image's start to the last one's end, behind which there must be nothing.

    More than one image stands in a file only where the first announces it (CIPA DC-007, MPF).
    """
    cursor = Cursor(data)
    found, announced = _image(cursor)
    while cursor.left:
        check(announced and data.startswith(SIGNATURE, cursor.at), Reason.TRAILING_DATA)
        more, _ = _image(cursor)
        found.frames += more.frames
        found.metadata += more.metadata
    return found


def _image(cursor: Cursor) -> tuple[Structure, bool]:
    """One image, and whether it announces others."""
    found, scans, announced = Structure(), 0, False
    cursor.skip(2)
    while (marker := _marker(cursor)) != END:
        (length,) = cursor.unpack(">H")
        check(length >= 2)
        body = cursor.take(length - 2)
        if marker in FRAMES:
            check(not found.frames)
            found.frames = 1
            precision, found.height, found.width = Cursor(body).unpack(">BHH")
            check(precision == 8, Reason.UNSUPPORTED)
        elif marker == SCAN:
            scans += 1
            check(found.frames == 1)
            check(scans <= MAX_SCANS, Reason.TOO_COSTLY)
            end = _MARKER.search(cursor.data, cursor.at)
            check(end is not None, Reason.TRUNCATED)
            cursor.at = end.start() if end else 0
        elif marker in METADATA:
            found.metadata += len(body)
            announced |= marker == APP2 and body.startswith(b"MPF\0")
        else:
            check(marker not in OTHER_FRAMES, Reason.UNSUPPORTED)
            check(marker in TABLES)
    check(scans > 0)
    return found, announced


def _marker(cursor: Cursor) -> int:
    check(cursor.take(1) == b"\xff")
    while (marker := cursor.take(1)[0]) == 0xFF:
        pass
    return marker
