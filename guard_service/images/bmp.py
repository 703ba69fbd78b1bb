"""The structure of a BMP file (Microsoft, bitmap storage): uncompressed ones."""

from __future__ import annotations

from guard_service.images.reasons import Reason
from guard_service.images.structure import Cursor, Structure, check

SIGNATURE = b"BM"
HEADERS = (12, 40, 52, 56, 108, 124)  # sizes, by version
PLAIN, MASKED = 0, 3  # the compressions that are none
DEPTHS = (1, 4, 8, 16, 24, 32)


def walk(data: bytes) -> Structure:
    """Header, palette and rows, which must fill the file."""
    cursor = Cursor(data, len(SIGNATURE))
    size, _, pixels_at, header = cursor.unpack("<IIII")
    check(header in HEADERS, Reason.UNKNOWN_FORMAT)
    check(size <= len(data), Reason.TRUNCATED)
    check(size == len(data), Reason.TRAILING_DATA)
    compression = PLAIN
    if header == 12:
        width, height, planes, depth = cursor.unpack("<HHHH")
    else:
        width, height, planes, depth, compression = cursor.unpack("<iiHHI")
    check(planes == 1 and width > 0)
    check(compression in (PLAIN, MASKED) and depth in DEPTHS, Reason.UNSUPPORTED)
    row = (width * depth + 31) // 32 * 4
    end = pixels_at + row * abs(height)
    check(pixels_at >= 14 + header)
    check(end <= size, Reason.TRUNCATED)
    check(end == size, Reason.TRAILING_DATA)
    palette = 4 << depth if depth <= 8 else 0
    masks = 16 if compression == MASKED else 0
    metadata = max(pixels_at - 14 - header - palette - masks, 0)  # between the header and the rows
    return Structure(width, abs(height), frames=1, metadata=metadata)
