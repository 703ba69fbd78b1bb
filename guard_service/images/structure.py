"""What the walk over an image file finds, and the cursor that it walks with."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from guard_service.images.reasons import Reason, Refused


@dataclass(slots=True)
class Structure:
    """Sizes in pixels; `metadata` counts bytes that are no pixels, expanded where compressed."""

    width: int = 0
    height: int = 0
    frames: int = 0
    metadata: int = 0


class Cursor:
    """Reads a file from front to back; raises Refused(TRUNCATED) at a premature end."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data = data
        self.at = at

    @property
    def left(self) -> int:
        """Bytes that were not read yet."""
        return len(self.data) - self.at

    def take(self, count: int) -> bytes:
        """The next bytes."""
        self.skip(count)
        return self.data[self.at - count : self.at]

    def skip(self, count: int) -> None:
        """Pass over the next bytes."""
        if count > self.left:
            raise Refused(Reason.TRUNCATED)
        self.at += count

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """The next fields, as `struct` lays them out."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))


def check(holds: bool, otherwise: Reason = Reason.MALFORMED) -> None:
    """Raises Refused unless it holds."""
    if not holds:
        raise Refused(otherwise)
