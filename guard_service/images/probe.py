"""What an image file says of itself, read and bounded before anything is decoded.

The format follows from the content. The whole file is walked, so that nothing is left that another
program could take for something else: bytes behind the image's end are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from guard_service.images import bmp, gif, jpeg, png, webp
from guard_service.images.reasons import Reason, Refused
from guard_service.images.structure import Structure

MAX_ASPECT = 32  # at the 2240 pixels that Llama Guard 3 11B Vision sees at most, 70 of height
MAX_FRAMES = 1_000
MAX_METADATA = 2**20  # profiles of printers are the largest that are in use: 0.5 MiB

_WALKS: Mapping[bytes, tuple[str, Callable[[bytes], Structure]]] = {
    jpeg.SIGNATURE: ("JPEG", jpeg.walk),
    png.SIGNATURE: ("PNG", png.walk),
    gif.SIGNATURE: ("GIF", gif.walk),
    webp.SIGNATURE: ("WEBP", webp.walk),
    bmp.SIGNATURE: ("BMP", bmp.walk),
}


@dataclass(frozen=True, slots=True)
class Probed:
    """A file that may be decoded. `format` is Pillow's name of it."""

    format: str
    width: int
    height: int
    frames: int


def probe(data: bytes, max_pixels: int) -> Probed:
    """Walk a file; raises Refused for what is not a whole image within bounds."""
    if not data:
        raise Refused(Reason.EMPTY)
    name, walk = _format(data)
    found = walk(data)
    short, long = sorted((found.width, found.height))
    if short < 1 or found.frames < 1:
        raise Refused(Reason.MALFORMED)
    if short * long > max_pixels:
        raise Refused(Reason.TOO_MANY_PIXELS)
    if long > short * MAX_ASPECT:
        raise Refused(Reason.TOO_NARROW)
    if found.frames > MAX_FRAMES:
        raise Refused(Reason.TOO_MANY_FRAMES)
    if found.metadata > MAX_METADATA:
        raise Refused(Reason.TOO_MUCH_METADATA)
    return Probed(name, found.width, found.height, found.frames)


def _format(data: bytes) -> tuple[str, Callable[[bytes], Structure]]:
    for signature, known in _WALKS.items():
        if data.startswith(signature):
            return known
    raise Refused(Reason.UNKNOWN_FORMAT)
