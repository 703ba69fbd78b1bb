"""Conversations with and without pictures, and their prompts."""

from __future__ import annotations

import numpy as np

from guard_policies.taxonomy import LLAMA_GUARD_3, Category
from guard_service.conversation import Conversation, Image, Message, Picture, Role, Text
from guard_service.engines import Assessed, Engine
from guard_service.prompt import Prompt

OWN = (Category("S2", "Pineapple", "Praise of pineapple on pizza"), Category("S17", "Rain"))
SIZES = {"one tile": (20, 28), "two wide": (28, 50), "two tall": (50, 20), "four": (56, 56)}


def picture(seed: int, height: int = 40, width: int = 28) -> Picture:
    """Noise; two seeds give two pictures."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Picture(f"sha256:{seed}-{height}x{width}", pixels)


def conversation(*texts: str, shown: Picture | None = None) -> Conversation:
    """Turns of user and assistant by turns; the picture stands in the first."""
    roles = (Role.USER, Role.ASSISTANT)
    turns = [Message(roles[at % 2], (Text(text),)) for at, text in enumerate(texts)]
    if shown is not None:
        turns[0] = Message(Role.USER, (Image(picture=shown), *turns[0].parts))
    return Conversation(tuple(turns))


def prompt(
    engine: Engine,
    *texts: str,
    shown: Picture | None = None,
    categories: tuple[Category, ...] = LLAMA_GUARD_3[:13],
) -> Prompt:
    """The only prompt of a conversation."""
    built = engine.prompt_builder().build(conversation(*texts, shown=shown), categories)
    (only,) = built.prompts
    return only


def scores(assessed: Assessed) -> list[float]:
    """P(unsafe), then each category's score."""
    found = assessed.assessment
    return [found.unsafe_score, *found.category_scores.values()]
