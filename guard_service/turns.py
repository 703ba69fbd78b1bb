"""From a conversation to the turns that a template shows the model, each part accounted for.

Any conversation that has a message can be judged; nothing in it is dropped.

- A turn is a run of messages of one role. Its parts stand below each other, one newline between.
- System and tool messages are input: turns of their own under the user's label.
- A conversation may begin with the assistant; no turn is made up.
- Empty text, or a message without parts, is an empty turn.
- A tool call reads `name(arguments)`; a tool result reads as its text.
- An image is not text. A model that sees images gets it beside the conversation; with any other,
  or where it could not be read, it is reported as not judged, and its message keeps its place.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from guard_policies.assessment import Direction
from guard_service.conversation import (
    Conversation,
    Image,
    Message,
    Part,
    Role,
    Text,
    ToolCall,
    ToolResult,
)
from guard_service.delimiters import breaks, neutralise

MODEL_IS_TEXT_ONLY = "MODEL_IS_TEXT_ONLY"


class InvalidConversation(ValueError):
    """The conversation cannot be put before a model. The text names no content and may be shown."""


@dataclass(frozen=True, slots=True)
class PartReport:
    """What became of one part of one message."""

    message_index: int
    part_index: int
    kind: str  # "text", "image", "tool_call" or "tool_result"
    judged: bool  # all of it
    reason: str = ""  # why not, when not judged: "MODEL_IS_TEXT_ONLY"
    neutralised: int = 0  # spaces inserted into delimiter look-alikes
    partly: bool = False  # some of it was judged, and `reason` says what was not
    digest: str = ""  # of the encoded image that was judged


@dataclass(frozen=True, slots=True)
class Turn:
    """One labelled turn of the conversation, as the model reads it."""

    direction: Direction
    text: str


def direction_of(conversation: Conversation) -> Direction:
    """RESPONSE if and only if the last message is the assistant's."""
    if not conversation.messages:
        raise InvalidConversation("the conversation has no messages")
    return _direction(conversation.messages[-1])


def turns_of(
    conversation: Conversation, trims: bool, judges_images: bool
) -> tuple[list[Turn], list[PartReport]]:
    """Turns in order, and a report for every part in order.

    `trims` strips white space from both ends of each part, as the official templates do.
    """
    turns, reports, index = [], [], 0
    for _, run in groupby(conversation.messages, key=lambda message: message.role):
        messages = list(run)
        turn, parts = _turn(messages, index, trims, judges_images)
        turns.append(turn)
        reports += parts
        index += len(messages)
    return turns, reports


def images_of(conversation: Conversation) -> tuple[Image, ...]:
    """What a model is shown, in order: each view of each image that could be read."""
    parts = (part for message in conversation.messages for part in message.parts)
    return tuple(shown for part in parts if isinstance(part, Image) for shown in _shown(part))


def _shown(image: Image) -> Iterator[Image]:
    if image.picture is not None or not image.unread:
        yield replace(image, other_views=())
    for view in image.other_views:
        yield replace(image, picture=view, other_views=())


def _direction(message: Message) -> Direction:
    return Direction.RESPONSE if message.role is Role.ASSISTANT else Direction.PROMPT


def _turn(
    messages: Sequence[Message], index: int, trims: bool, judges_images: bool
) -> tuple[Turn, list[PartReport]]:
    shown = [
        (index + at, part_index, part)
        for at, message in enumerate(messages)
        for part_index, part in enumerate(message.parts)
    ]
    texts = [_text(part, trims) for _, _, part in shown]
    text = "\n".join(text for text in texts if text is not None)
    places = breaks(text)
    reports, start = [], 0
    for (message_index, part_index, part), own in zip(shown, texts, strict=True):
        if isinstance(part, Image):
            reports.append(_image_report(part, message_index, part_index, judges_images))
            continue
        end = start + len(own or "") + 1  # the newline behind a part counts as its own
        count = bisect_right(places, end) - bisect_right(places, start)
        kind = _KINDS[type(part)]
        reports.append(PartReport(message_index, part_index, kind, True, "", count))
        start = end
    return Turn(_direction(messages[0]), neutralise(text, places)), reports


def _image_report(
    image: Image, message_index: int, part_index: int, judges_images: bool
) -> PartReport:
    reason = image.unread if judges_images else MODEL_IS_TEXT_ONLY
    return PartReport(
        message_index,
        part_index,
        "image",
        judged=not reason,
        reason=reason,
        partly=judges_images and bool(reason) and image.picture is not None,
        digest=image.digest,
    )


_KINDS: dict[type[Part], str] = {Text: "text", ToolCall: "tool_call", ToolResult: "tool_result"}


def _text(part: Part, trims: bool) -> str | None:
    """The part as the model reads it; None for what isn't text."""
    match part:
        case Text(text) | ToolResult(text):
            pass
        case ToolCall(name, arguments):
            text = f"{name}({arguments})"
        case Image():
            return None
    return text.strip() if trims else text
