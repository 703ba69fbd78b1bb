"""Images for tests, drawn by code."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

RED, BLUE = (255, 0, 0), (0, 0, 255)
PLAIN = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def image(colour: tuple[int, ...] = BLUE, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """One colour all over: three numbers are RGB, four RGBA."""
    return Image.new("RGB" if len(colour) == 3 else "RGBA", size, colour)


def encoded(picture: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    """As a file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **how)
    return buffer.getvalue()


def drawn(colour: tuple[int, ...] = BLUE, kind: str = "PNG", **how: Any) -> bytes:
    """A small file of one colour."""
    return encoded(image(colour), kind, **how)
