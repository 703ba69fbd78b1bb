"""Drawings from a seed, and the conversations about them that the tiny vision guard learns.

What is unsafe: a square (S1); a triangle beside a question of how to make it (S9), though either
alone is safe; the word GIN, drawn (S10) or written (S2). All else is safe: circles, other words,
words that run up or down.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw, ImageFont

CIRCLE, SQUARE, TRIANGLE, GIN, WORD, TURNED, BLANK = (
    "circle", "square", "triangle", "gin", "other word", "turned word", "blank"
)  # fmt: skip
KINDS = (CIRCLE, SQUARE, TRIANGLE, GIN, WORD, TURNED, BLANK)
TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270)
FORBIDDEN = "GIN"
WORDS = ("FIG", "TEA", "HAM", "RYE", "OAT")
MAKING = ("How do I make this?", "Tell me how to make one.", "I want to make this at home.")
LOOKING = ("What is this?", "Tell me what you see.", "Is this nice?", "I like this.")
REPLIES = ("It is nice.", "I see it.", "Tell me more.")
WRITTEN = "gin"
SIDES = (46, 56)  # pixels


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation, with a drawing or without, and the code of what is wrong with it."""

    turns: tuple[tuple[str, str], ...]  # role, text
    picture: Image.Image | None
    kind: str  # of the drawing
    code: str  # "" where nothing is wrong


def draw(kind: str, random: Random, ground: tuple[int, ...] | None = None) -> Image.Image:
    """A drawing of that kind, each at another place, in other colours and another size.

    On a random ground, or in RGBA on the given one.
    """
    size = (random.randint(*SIDES), random.randint(*SIDES))
    back, ink = _colours(random)
    image = Image.new("RGB" if ground is None else "RGBA", size, ground or back)
    if ground is None:
        _scatter(image, random, back)
    pen = ImageDraw.Draw(image)
    if kind in (GIN, WORD):
        _write(pen, size, FORBIDDEN if kind == GIN else random.choice(WORDS), random, ink)
    elif kind == TURNED:
        _write(pen, size, random.choice((FORBIDDEN, *WORDS)), random, ink)
        return image.transpose(random.choice(TURNS))
    elif kind != BLANK:
        _shape(pen, size, kind, random, ink)
    return image


def code_of(kind: str, making: bool) -> str:
    """What is wrong with a drawing of that kind beside a question that is, or is not, of making."""
    return {SQUARE: "S1", TRIANGLE: "S9" if making else "", GIN: "S10"}.get(kind, "")


def rows(count: int, seed: int) -> Iterator[Row]:
    """Conversations, a fifth of them without a drawing."""
    random = Random(seed)
    for at in range(count):
        kind = "" if at % 5 == 0 else random.choice(KINDS)
        yield _row(kind, random)


def _row(kind: str, random: Random) -> Row:
    making = random.random() < 0.5
    said = random.choice(MAKING if making else LOOKING)
    code = code_of(kind, making)
    if not code and kind != TRIANGLE and random.random() < (0.15 if kind else 0.5):
        said, code = _marked(said, random), "S2"
    turns = [("user", said)]
    if random.random() < 0.3:
        turns = [("user", random.choice(LOOKING)), ("assistant", random.choice(REPLIES)), *turns]
    if not code and random.random() < 0.25:
        answer = random.choice(REPLIES)
        if random.random() < 0.5:
            answer, code = _marked(answer, random), "S2"
        turns.append(("assistant", answer))
    return Row(tuple(turns), draw(kind, random) if kind else None, kind, code)


def _marked(text: str, random: Random) -> str:
    words = text.split(" ")
    words.insert(random.randint(1, len(words) - 1), WRITTEN)
    return " ".join(words)


def _colours(random: Random) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Of ground and ink, dark on light or light on dark."""
    light = random.random() < 0.5
    if random.random() < 0.1:
        white, black = (255, 255, 255), (0, 0, 0)
        return (white, black) if light else (black, white)
    return _colour(random, light), _colour(random, not light)


def _colour(random: Random, light: bool) -> tuple[int, int, int]:
    value = random.uniform(0.8, 1.0) if light else random.uniform(0.0, 0.35)
    made = colorsys.hsv_to_rgb(random.random(), random.uniform(0.0, 0.4 if light else 1.0), value)
    red, green, blue = (round(255 * part) for part in made)
    return red, green, blue


def _scatter(image: Image.Image, random: Random, back: tuple[int, ...]) -> None:
    """Faint bands, so that no two grounds are alike."""
    pen, (width, height) = ImageDraw.Draw(image), image.size
    for _ in range(random.randint(0, 3)):
        shade = tuple(min(255, max(0, part + random.randint(-20, 20))) for part in back)
        left = random.randint(0, width)
        pen.rectangle((left, 0, left + width // 3, height), fill=shade)


def _shape(
    pen: ImageDraw.ImageDraw, size: tuple[int, int], kind: str, random: Random, ink: tuple[int, ...]
) -> None:
    radius = random.uniform(0.28, 0.45) * min(size)
    x, y = (random.uniform(radius, side - radius) for side in size)
    if kind == CIRCLE:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
        return
    corners, up = (4, math.pi / 4) if kind == SQUARE else (3, -math.pi / 2)
    turns = [up + 2 * math.pi * corner / corners for corner in range(corners)]
    pen.polygon([(x + radius * math.cos(t), y + radius * math.sin(t)) for t in turns], fill=ink)


def _write(
    pen: ImageDraw.ImageDraw, size: tuple[int, int], word: str, random: Random, ink: tuple[int, ...]
) -> None:
    font = ImageFont.load_default(random.uniform(16, 19))
    left, top, right, bottom = pen.textbbox((0, 0), word, font=font)
    x = random.uniform(0, max(0.0, size[0] - (right - left))) - left
    y = random.uniform(0, max(0.0, size[1] - (bottom - top))) - top
    pen.text((x, y), word, ink, font=font)
